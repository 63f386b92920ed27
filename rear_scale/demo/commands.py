"""The commands of a demo as stages, and its folder."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rear_scale.config import CONFIG_DIR, ExperimentConfig, InputError, derive
from rear_scale.demo.recipe import MODELS, TITLES, Recipe
from rear_scale.files import write_text_atomically
from rear_scale.places import PACKAGE, commands
from rear_scale.progress import say
from rear_scale.run.stages import Stage, StageFolder
from rear_scale.shards.inputs import Inputs


@dataclass(frozen=True)
class Planned:
    """All stages up to the report."""

    data: list[Stage]  # in order: images, tokenizer, token shards, and scores that no generator has a part in
    runs: list[list[Stage]]  # training, sampling and evaluation of each model with each seed

    @property
    def stages(self) -> list[Stage]:
        return [*self.data, *(stage for run in self.runs for stage in run)]


def planned(recipe: Recipe, seeds: list[int], overrides: Sequence[str]) -> Planned:
    """The stages. The overrides go to every command that reads a config. Raises InputError as `check` does."""
    check(recipe, overrides)
    maker = _Maker(recipe, tuple(overrides))
    images = maker.images()
    tokenizer = maker.tokenizer(images[-1])
    tokens = [maker.tokens(split, tokenizer) for split in ("train", "val")]
    data = [*images, tokenizer, *tokens]
    if recipe.yardsticks:
        data += maker.yardsticks(tokenizer)
    # Sample sheets during training only for the first seed, which the report shows.
    runs = [maker.of_model(model, seed, tokens, with_sheets=seed == seeds[0]) for seed in seeds for model in MODELS]
    return Planned(data, runs)


def check(recipe: Recipe, overrides: Sequence[str]) -> None:
    """Raises InputError for overrides that the commands would refuse, or that the table cannot do with."""
    for model in MODELS:
        cfg = recipe.load(model, overrides)
        derive(cfg, processes_of_a_run(), None)
        _check_scores(recipe, cfg)


def _check_scores(recipe: Recipe, cfg: ExperimentConfig) -> None:
    """Raises InputError for overrides that take away a score of the table, which is written last."""
    evaluate, base = cfg.evaluate, recipe.load("rear").evaluate
    gone = [f"evaluate.reference.{name}" for name in base.reference if name not in evaluate.reference]
    if evaluate.classifier is None:
        gone.append("evaluate.classifier")
    if recipe.yardsticks and evaluate.efficientnet_weights is None:
        gone.append("evaluate.efficientnet_weights")
    if recipe.yardsticks and "exact" not in evaluate.precision_recall_arithmetic:
        gone.append("evaluate.precision_recall_arithmetic with exact")
    if cfg.tokenizer.training is None:
        gone.append("tokenizer.training")
    if gone:
        raise InputError(f"the demo needs {', '.join(gone)}. Leave out the override that takes it away")


@dataclass(frozen=True)
class _Maker:
    """The stages of one recipe."""

    recipe: Recipe
    overrides: tuple[str, ...]  # the user's

    def images(self) -> list[Stage]:
        """The stages that write the images; the last of them writes the validation images."""
        stages: list[Stage] = []
        for split, (title, command) in self.recipe.prepare.items():
            inputs: Inputs = {stage.name: stage.key for stage in stages}
            name = "images" if split == "val" else f"images_{split}"
            stages.append(Stage(name, title, command, (self.recipe.images / split / "index.json",), inputs))
        return stages

    def tokenizer(self, images: Stage) -> Stage:
        weights = self.recipe.load("rear", self.overrides).tokenizer.weights
        assert weights is not None
        command = ["python", "launchers/train_tokenizer.py", *self._config("rear")]
        return Stage("tokenizer", "train the tokenizer", command, (Path(weights),), {"images": images.key})

    def tokens(self, split: str, tokenizer: Stage) -> Stage:
        images, tokens = self.recipe.images / split, self.recipe.folder / "tokens" / split
        return Stage(
            f"tokens_{split}",
            f"images to token shards ({split})",
            [*_torchrun(), "launchers/pretokenize.py", *self._config("rear"),
             f"pretokenize.images={images}", f"pretokenize.out={tokens}"],
            (tokens / "index.json",),
            {"tokenizer": tokenizer.key},
            num_processes(),
        )  # fmt: skip

    def yardsticks(self, tokenizer: Stage) -> list[Stage]:
        """The stages that score upper bounds for any generator: the tokenizer's reconstructions, and real images."""
        recipe, command = self.recipe, [*_torchrun(), "launchers/evaluate.py", *self._config("rear")]
        return [
            Stage(
                "reconstruct",
                "score the tokenizer's reconstructions",
                [*command, "--reconstruct", str(recipe.images / "val"), "--out", str(recipe.reconstruction)],
                (recipe.reconstruction,),
                {"tokenizer": tokenizer.key},
                num_processes(),
            ),
            Stage(
                "held_in",
                "score real images of the training part",
                [*command, "--samples", str(recipe.images / "held_in"), "--out", str(recipe.held_in)],
                (recipe.held_in,),
                {"tokenizer": tokenizer.key},
                num_processes(),
            ),
        ]

    def of_model(self, model: str, seed: int, tokens: list[Stage], *, with_sheets: bool) -> list[Stage]:
        """Training, sampling and evaluation of one model with one seed. with_sheets: of samples during training."""
        label = f"{TITLES[model]}, seed {seed}"
        run, samples = self.recipe.run_folder(model, seed), self.recipe.samples_file(model, seed)
        own = [f"sample.grid_every_images={self.recipe.grid_every_images}"] if with_sheets else []
        if not any(override.startswith("train.micro_batch_size=") for override in self.overrides):
            batch = self.recipe.load(model, self.overrides).train.global_batch_size
            own.append(f"train.micro_batch_size={batch // processes_of_a_run()}")  # in one micro-step, which is faster
        train = Stage(
            f"train_{model}_{seed}",
            f"train {label}",
            ["deepspeed", "--num_gpus", str(processes_of_a_run()), "launchers/train.py", "--config", self.recipe.config(model),
             f"run.name={run.name}", f"run.dir={run}", f"run.seed={seed}", *own, *self.overrides],
            (run / "checkpoints/latest",),
            {stage.name: stage.key for stage in tokens},
            num_processes(),  # those that share the cores, of this run and of the one beside it
        )  # fmt: skip
        sample = Stage(
            f"sample_{model}_{seed}",
            f"sample {label}",
            [*_start_of_a_run(), "launchers/sample.py", "--checkpoint", str(run), "--out", str(samples)],
            (samples,),
            {"training": train.key},
            num_processes(),
        )
        evaluate = Stage(
            f"evaluate_{model}_{seed}",
            f"evaluate {label}",
            [*_start_of_a_run(), "launchers/evaluate.py", "--checkpoint", str(run), "--samples", str(samples)],
            (run / "result.json",),
            {"samples": sample.key},
            num_processes(),
        )
        return [train, sample, evaluate]

    def _config(self, model: str) -> list[str]:
        return ["--config", self.recipe.config(model), *self.overrides]


def _torchrun() -> list[str]:
    return ["torchrun", "--nproc-per-node", str(num_processes())]


def num_processes() -> int:
    """The number of processes at a time: two, but with GPUs at most one per GPU."""
    return min(2, torch.cuda.device_count()) or 2


def runs_at_a_time() -> int:
    """The number of models that are trained, sampled and scored at a time.

    On CPUs two, each by one process: two models so small train about one and a half times as fast as one after the other on all
    cores.
    """
    return 1 if torch.cuda.device_count() else num_processes()


def processes_of_a_run() -> int:
    """The number of processes that train, sample and score one model."""
    return num_processes() // runs_at_a_time()


def _start_of_a_run() -> list[str]:
    return ["python"] if processes_of_a_run() == 1 else _torchrun()


def open_folder(recipe: Recipe, overrides: Sequence[str]) -> StageFolder:
    """The demo's folder with its configs. A folder made by other code or other overrides is renamed first, and not continued."""
    folder = recipe.folder
    mark, fingerprint = folder / "stages/fingerprint", _fingerprint(_made_from(recipe, overrides))
    if mark.exists() and mark.read_text() != fingerprint:
        _set_aside(folder)
    if not mark.exists():
        mark.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(mark, fingerprint)
    recipe.write_configs()
    return StageFolder(folder)


def _made_from(recipe: Recipe, overrides: Sequence[str]) -> list[str]:
    """All that the results depend on besides the code."""
    return [*map(str, [*recipe.settings.items(), *recipe.inputs.items()]), *overrides]


def _fingerprint(overrides: list[str]) -> str:
    """A hash of the code and settings that the results depend on."""
    digest = hashlib.sha256(repr(overrides).encode())
    code = [*PACKAGE.rglob("*.py"), *CONFIG_DIR.rglob("*.yaml"), *commands().values()]
    for path in sorted(code):
        digest.update(path.relative_to(PACKAGE.parent).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def _set_aside(folder: Path) -> None:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old{number}")).exists():
        number += 1
    say(
        f"{folder} was made by other code or settings, or from other images: it is kept as {aside}, and the demo starts afresh"
    )
    shutil.move(folder, aside)
