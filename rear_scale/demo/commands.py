"""The commands of the demo as stages, and its folder."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from pathlib import Path

import torch

from rear_scale.config import CONFIG_DIR, InputError, derive, load
from rear_scale.files import write_text_atomically
from rear_scale.places import PACKAGE, commands, how_to_install
from rear_scale.progress import say
from rear_scale.run.stages import Stage, StageFolder

FOLDER = Path("runs/demo")  # relative to the current directory, as configs/demo.yaml has it
MODELS = {"ar": "demo_ar.yaml", "rear": "demo.yaml"}

_GRID_EVERY_IMAGES = 19_200  # 300 steps


def run_folder(model: str, seed: int) -> Path:
    return FOLDER / f"{model}_seed{seed}"


def samples_file(model: str, seed: int) -> Path:
    return run_folder(model, seed) / "samples.npz"


def stages(seeds: list[int], overrides: list[str]) -> list[Stage]:
    """All stages up to the report. The overrides go to both trainings. Raises InputError for what these would refuse."""
    for config in MODELS.values():
        derive(load(config, overrides), _num_processes(), None)
    images, tokens = FOLDER / "images", FOLDER / "tokens"
    command = ["python", "data/prepare_digits.py", "--out", str(images)]
    digits = Stage("images", "digits as image shards", command, (images / "val/index.json",))
    command = ["python", "launchers/train_tokenizer.py", "--config", "demo.yaml"]
    weights = Path(load("demo.yaml").tokenizer.weights)
    tokenizer = Stage("tokenizer", "train the tokenizer", command, (weights,), {"images": digits.key})
    encoded = [
        Stage(
            f"tokens_{split}",
            f"images to token shards ({split})",
            [*_torchrun(), "launchers/pretokenize.py", "--config", "demo.yaml",
             f"pretokenize.images={images / split}", f"pretokenize.out={tokens / split}"],
            (tokens / split / "index.json",),
            {"tokenizer": tokenizer.key},
            _num_processes(),
        )
        for split in ("train", "val")
    ]  # fmt: skip
    found = [digits, tokenizer, *encoded]
    for seed in seeds:
        # The report shows the first seed.
        shown = [f"sample.grid_every_images={_GRID_EVERY_IMAGES}"] if seed == seeds[0] else []
        for model in MODELS:
            found += _model_stages(model, seed, [*shown, *overrides], encoded)
    return found


def check_packages() -> None:
    """Raises InputError when a package is not installed that only the demo needs: the digits come with scikit-learn, and
    DeepSpeed trains on them."""
    for package, module in (("scikit-learn", "sklearn"), ("deepspeed", "deepspeed")):
        if importlib.util.find_spec(module) is None:
            raise InputError(
                f"the demo needs the package {package}, which is not installed. Install it: {how_to_install(package)}"
            )


def _model_stages(model: str, seed: int, overrides: list[str], tokens: list[Stage]) -> list[Stage]:
    """Training, sampling and evaluation of one model with one seed."""
    label = f"{'vanilla AR' if model == 'ar' else 'reAR'}, seed {seed}"
    run, samples = run_folder(model, seed), samples_file(model, seed)
    processes = _num_processes()
    train = Stage(
        f"train_{model}_{seed}",
        f"train {label}",
        ["deepspeed", "--num_gpus", str(processes), "launchers/train.py", "--config", MODELS[model],
         f"run.name={run.name}", f"run.dir={run}", f"run.seed={seed}", *overrides],
        (run / "checkpoints/latest",),
        {stage.name: stage.key for stage in tokens},
        processes,
    )  # fmt: skip
    sample = Stage(
        f"sample_{model}_{seed}",
        f"sample {label}",
        [*_torchrun(), "launchers/sample.py", "--checkpoint", str(run), "--out", str(samples)],
        (samples,),
        {"training": train.key},
        processes,
    )
    evaluate = Stage(
        f"evaluate_{model}_{seed}",
        f"evaluate {label}",
        [*_torchrun(), "launchers/evaluate.py", "--checkpoint", str(run), "--samples", str(samples)],
        (run / "result.json",),
        {"samples": sample.key},
        processes,
    )
    return [train, sample, evaluate]


def _torchrun() -> list[str]:
    return ["torchrun", "--nproc-per-node", str(_num_processes())]


def _num_processes() -> int:
    """Two; where there are GPUs, at most one per GPU."""
    return min(2, torch.cuda.device_count()) or 2


def open_folder(overrides: list[str]) -> StageFolder:
    """The demo's folder, after one of other code or other overrides was renamed: its results are not continued."""
    mark, fingerprint = FOLDER / "stages/fingerprint", _fingerprint(overrides)
    if mark.exists() and mark.read_text() != fingerprint:
        _set_aside()
    if not mark.exists():
        mark.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(mark, fingerprint)
    return StageFolder(FOLDER)


def _fingerprint(overrides: list[str]) -> str:
    """A hash of the code and settings that the results depend on."""
    digest = hashlib.sha256(repr(overrides).encode())
    code = [*PACKAGE.rglob("*.py"), *CONFIG_DIR.rglob("*.yaml"), *commands().values()]
    for path in sorted(code):
        digest.update(path.relative_to(PACKAGE.parent).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def _set_aside() -> None:
    number = 1
    while (aside := FOLDER.with_name(f"{FOLDER.name}.old{number}")).exists():
        number += 1
    say(f"{FOLDER} was made by other code or settings: it is kept as {aside}, and the demo starts afresh")
    shutil.move(FOLDER, aside)
