"""The jobs that tests/kills.py interrupts, their inputs, and the parts of their outputs that must be equal in every run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
STEPS, EVERY = 8, 2  # of training, and between its checkpoints
# What differs from run to run in the JSON files that are made: when, and how fast.
_TIMES = {"time", "seconds", "wall_s", "images_per_second"}


@dataclass(frozen=True)
class Job:
    """A command line that writes files below a folder, on one or several ranks."""

    name: str
    launcher: str
    arguments: Callable[[Path, Path], list[str]]  # of inputs and case folder
    ranks: int = 1

    @property
    def trains(self) -> bool:
        return self.launcher == "train.py"


def _training(strategy: str, ranks: int) -> Callable[[Path, Path], list[str]]:
    def arguments(inputs: Path, case: Path) -> list[str]:
        from helpers import tiny_config_file

        return [
            "--config", str(tiny_config_file(inputs, inputs / "tokens")), f"strategy={strategy}", f"run.dir={case / 'run'}",
            f"data.cache_dir={case / 'cache'}", f"data.val={inputs / 'val'}", f"train.total_steps={STEPS}", "model.depth=1",
            f"train.micro_batch_size={12 // ranks}",
            f"train.val_every={EVERY}", f"checkpoint.every_steps={EVERY}", "checkpoint.keep_last=2",
            "optim.ema_decay=0.9", "optim.posthoc_ema=[0.1]", "checkpoint.ema_every_steps=4",
            f"tokenizer.weights={inputs / 'weights'}", "sample.grid_every_images=48",
            "evaluate.training={every_images: 48, num_images: 10}", f"evaluate.reference.images={inputs / 'images.npz'}",
            "evaluate.inception_weights=small", "evaluate.batch_size=10",
        ]  # fmt: skip

    return arguments


def _sampling(copies: str) -> Callable[[Path, Path], list[str]]:
    def arguments(inputs: Path, case: Path) -> list[str]:
        return [
            "--checkpoint", str(inputs / "run"), "--out", str(case / "samples.npz"), f"tokenizer.weights={inputs / 'weights'}",
            "sample.num_images=12", "sample.batch_size=5", f"sample.also_write={copies}",
        ]  # fmt: skip

    return arguments


def _evaluating(inputs: Path, case: Path) -> list[str]:
    return [
        "--checkpoint", str(inputs / "run"), "--out", str(case / "result.json"), f"tokenizer.weights={inputs / 'weights'}",
        "--write-statistics", str(case / "statistics.npz"), "sample.num_images=12", "sample.batch_size=5",
        "evaluate.inception_weights=small", f"evaluate.reference.images={inputs / 'images.npz'}", "evaluate.batch_size=5",
        f"data.cache_dir={case / 'cache'}",
    ]  # fmt: skip


def _converting(form: str, name: str) -> Callable[[Path, Path], list[str]]:
    return lambda inputs, case: [str(inputs / "run"), "--to", form, "--out", str(case / name)]


def _pretokenizing(inputs: Path, case: Path) -> list[str]:
    return [
        "--config", str(HERE.parent / "configs" / "demo.yaml"), f"tokenizer.weights={inputs / 'weights'}",
        "tokenizer.image_size=16", "tokenizer.num_tokens=16", "tokenizer.codebook_size=32", "tokenizer.codebook_dim=8",
        f"pretokenize.images={inputs / 'images'}", f"pretokenize.out={case / 'tokens'}", "pretokenize.batch_size=8",
        "pretokenize.samples_per_shard=10", "pretokenize.max_bad_fraction=0.2",
    ]  # fmt: skip


JOBS = {
    job.name: job
    for job in (
        Job("single", "train.py", _training("single", 1)),
        *(Job(name, "train.py", _training(name, 2), ranks=2) for name in ("ddp", "fsdp2", "zero1", "zero3")),
        Job("sample", "sample.py", _sampling("png")),
        Job("sample-tar", "sample.py", _sampling("tar")),
        Job("sample-two", "sample.py", _sampling("png"), ranks=2),
        Job("evaluate", "evaluate.py", _evaluating),
        Job("evaluate-two", "evaluate.py", _evaluating, ranks=2),
        *(
            Job(f"convert-{form}", "convert.py", _converting(form, name))
            for form, name in (("portable", "step_00000008"), ("consolidated", "w.safetensors"), ("official", "w.bin"))
        ),
        Job("pretokenize", "pretokenize.py", _pretokenizing),
        Job("pretokenize-two", "pretokenize.py", _pretokenizing, ranks=2),
    )
}


def make_inputs(inputs: Path) -> None:
    """The inputs of the jobs: token shards, a tokenizer, images."""
    import numpy as np
    import torch
    from helpers import write_token_shards
    from PIL import Image

    from rear_scale.tokenizer.compact import CompactTokenizer

    write_token_shards(inputs / "tokens", 100)
    write_token_shards(inputs / "val", 12, seed=1)
    torch.manual_seed(0)
    tokenizer = CompactTokenizer(16, 32, 8, 16)
    with torch.no_grad():  # codes among the latents, so that images get different tokens
        tokenizer.codes.copy_(tokenizer.latents(torch.rand(2, 3, 16, 16)))
    tokenizer.save(inputs / "weights")
    pixels = np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), dtype=np.uint8)
    np.savez(inputs / "images.npz", arr_0=pixels)
    for number, image in enumerate(pixels):
        path = inputs / "images" / "abc"[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (inputs / "images" / "b" / "bad.png").write_bytes(b"no image")


def tree(folder: Path) -> dict[str, str]:
    """All files and empty folders below a folder, with a hash of the parts that must be equal in every run."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file():
            found[name] = hashlib.sha256(_constant(path)).hexdigest()
        elif not any(path.iterdir()):
            found[f"{name}/"] = ""
    return found


def is_stray(name: str) -> bool:
    last = name.rstrip("/").rsplit("/", 1)[-1]
    return last.startswith(".") or last.endswith((".part", ".tmp", ".old")) or ".parts" in name


def _constant(path: Path) -> bytes:
    """The content without times; starts.jsonl, one line for each start, must be whole lines and nothing else, and the report,
    which shows times, a whole page."""
    from helpers import TIMES

    data = path.read_bytes()
    if path.name == "report.html":
        return b"" if data.rstrip().endswith(b"</html>") else b"torn: " + data
    if path.suffix not in (".json", ".jsonl"):
        return data
    try:
        values = [json.loads(line) for line in data.splitlines()] if path.suffix == ".jsonl" else json.loads(data)
    except ValueError:
        return b"torn: " + data
    if path.name == "starts.jsonl":
        return b""
    return json.dumps(_without(values, {*TIMES, *_TIMES})).encode()


def _without(value: Any, names: set[str]) -> Any:
    if isinstance(value, dict):
        return {name: _without(item, names) for name, item in value.items() if name not in names}
    return [_without(item, names) for item in value] if isinstance(value, list) else value


def newest_published(calls: list[str]) -> int:
    """The newest checkpoint that became visible in a start, by its calls, of which the last one may not have been made."""
    names = [line.partition("\t")[2] for line in calls[:-1] if line.startswith("rename\t")]
    steps = [name.removeprefix("run/checkpoints/step_") for name in names]
    return max((int(step) for step in steps if step.isdecimal()), default=0)


def logged_steps(path: Path) -> list[tuple[int, str]]:
    """(step, line without times) of a log."""
    from helpers import TIMES

    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [(line["step"], json.dumps(_without(line, set(TIMES)))) for line in lines]


def wrong_lines(path: Path, right: list[tuple[int, str]], some: bool) -> list[str]:
    """Differences from the steps of an unbroken run. some: steps may be missing where nothing has written them again."""
    lines = logged_steps(path)
    steps = [step for step, _ in lines]
    wrong = [f"step {step}" for step, line in lines if (step, line) not in right or steps.count(step) > 1]
    return wrong + [f"without step {step}" for step, _ in right if step not in steps and not some]


def fault_of(checkpoint: Path) -> str | None:
    """Errors of a visible checkpoint; empty when it is correct."""
    try:
        for item in json.loads((checkpoint / "meta.json").read_text())["files"]:
            if hashlib.sha256((checkpoint / item["file"]).read_bytes()).hexdigest() != item["sha256"]:
                return f"{item['file']} has another checksum"
    except (OSError, ValueError, KeyError) as error:
        return repr(error)
    return None
