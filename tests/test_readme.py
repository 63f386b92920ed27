"""What the texts promise exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers import ROOT

from rear_scale import config
from rear_scale.config.overrides import field_type

TEXTS = [
    ROOT / "README.md",
    ROOT / "data/README.md",
    ROOT / "docs/trust.md",
    *sorted((ROOT / "configs").rglob("*.yaml")),
    *sorted((ROOT / "launchers").iterdir()),
    *sorted((ROOT / "launchers/slurm").iterdir()),
]
TEXTS = [path for path in TEXTS if path.is_file()]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_path_and_config_that_a_text_names_is_there(path: Path) -> None:
    text = path.read_text()
    for named in re.findall(r"(?:launchers|configs|rear_scale|tests|data|docs)/[\w/.-]*\w", text):
        if not named.startswith("data/imagenet256") and "NAME" not in named:
            assert (ROOT / named).exists(), named
    for named in re.findall(r"--config (\w[\w/.]*\.yaml)", text):
        assert (config.CONFIG_DIR / named).is_file(), named


def test_every_option_of_the_readme_exists() -> None:
    text = (ROOT / "README.md").read_text()
    options = set(
        re.findall(
            r"\b((?:run|model|tokenizer|data|objective|optim|train|checkpoint|resume|sample|evaluate|wandb)\.[a-z_]+)\b",
            text,
        )
    )
    assert len(options) > 5
    for option in options:
        if option.split(".")[1] not in ("py", "sh", "yaml", "sbatch"):
            field_type(option)
    groups = {path.name for path in config.CONFIG_DIR.iterdir() if path.is_dir()}
    for group, value in re.findall(r"\b(\w+)=(\w+)", text):
        if group in groups:
            assert (config.CONFIG_DIR / group / f"{value}.yaml").is_file(), f"{group}={value}"


def test_the_first_screen_has_the_two_commands() -> None:
    first = (ROOT / "README.md").read_text().splitlines()[:15]
    assert any("bash launchers/demo.sh" in line for line in first)
    assert any("bash launchers/test.sh" in line for line in first)


def test_folders_import_only_what_stands_to_their_left() -> None:
    order = ["config", "device", "untrusted", "progress", "rng", "files", "locks", "weight_file", "peers", "world"]
    order += ["tokenizer", "shards", "model", "objective", "optim", "parallel", "checkpoint", "run", "cli"]
    order += ["scaling", "train", "sample", "evaluate", "analysis", "report", "bench", "demo"]
    for path in (ROOT / "rear_scale").rglob("*.py"):
        here = path.relative_to(ROOT / "rear_scale").parts[0].removesuffix(".py")
        if here == "__init__":
            continue
        for imported in re.findall(r"^\s*(?:from|import) rear_scale(?:\.(\w+))?", path.read_text(), re.MULTILINE):
            names = (
                [imported] if imported else re.findall(r"from rear_scale import (.*)", path.read_text())[0].split(", ")
            )
            for name in names:
                assert order.index(name) <= order.index(here), f"{path.relative_to(ROOT)} imports {name}"


def test_engines_are_imported_where_they_belong() -> None:
    for engine, homes in (
        ("deepspeed", ["optim/deepspeed_adam.py", "parallel/deepspeed.py"]),
        ("wandb", ["run/wandb.py"]),
    ):
        importers = [
            str(path.relative_to(ROOT / "rear_scale"))
            for path in (ROOT / "rear_scale").rglob("*.py")
            if re.search(rf"^\s*(?:import|from) {engine}\b", path.read_text(), re.MULTILINE)
        ]
        assert sorted(importers) == homes
    for folder in ("model", "objective"):
        for path in (ROOT / "rear_scale" / folder).rglob("*.py"):
            assert "torch.distributed" not in path.read_text()
