"""An installed copy: a wheel alone, in an empty folder, without DeepSpeed."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, environment, launch, tiny_config_file
from packaging.requirements import Requirement

import rear_scale
from rear_scale import __main__ as commands
from rear_scale import places
from rear_scale.config import InputError
from rear_scale.evaluate.networks.inception import Inception
from rear_scale.parallel import facts
from rear_scale.parallel.engine import check_installed
from rear_scale.run import versions

LAUNCHERS = sorted(path.stem for path in (ROOT / "launchers").glob("*.py"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to import from: the unpacked wheel of this checkout."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("rear_scale", "configs", "launchers"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "data").mkdir()
    for path in (ROOT / "data").glob("*.py"):  # a checkout's data/ may hold data sets too
        shutil.copy(path, source / "data")
    # Left by an earlier build, and removed from the package since.
    (source / "build/lib/rear_scale").mkdir(parents=True)
    (source / "build/lib/rear_scale/removed.py").touch()
    build = "from setuptools.build_meta import build_wheel; build_wheel('wheel')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True, env=environment())
    (wheel,) = (source / "wheel").glob("rear_scale-*-py3-none-any.whl")
    zipfile.ZipFile(wheel).extractall(site)
    return site


@pytest.fixture(scope="module")
def python(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a clean environment: the wheel and the packages that it requires without extras, as links to this
    environment's, so that no network is needed."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for path in site.iterdir():
        (packages / path.name).symlink_to(path)
    (found,) = importlib.metadata.distributions(name="rear_scale", path=[str(site)])
    waiting, seen = list(found.requires or []), set()
    while waiting:
        wanted = Requirement(waiting.pop())
        if wanted.name in seen or (wanted.marker is not None and not wanted.marker.evaluate({"extra": ""})):
            continue
        seen.add(wanted.name)
        package = importlib.metadata.distribution(wanted.name)
        waiting += package.requires or []
        for name in {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}:
            if not (packages / name).exists():
                (packages / name).symlink_to(str(package.locate_file(name)))
    return folder / "bin/python"


def typed(python: Path, folder: Path, *words: str | Path, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """`python -m rear_scale WORDS` in a folder; of several ranks, under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return subprocess.run(
        [str(python), *torchrun, "-m", "rear_scale", *map(str, words)],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_a_wheel_holds_the_configs_scripts_and_templates(site: Path) -> None:
    patterns = ("configs/**/*.yaml", "launchers/*.py", "data/*.py")
    expected = {path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern)}
    package = [path for path in (ROOT / "rear_scale").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    expected |= {path.relative_to(ROOT / "rear_scale").as_posix() for path in package}
    assert {"configs/rear_xl.yaml", "configs/devices/gpus.yaml", "launchers/train.py", "report/page.html"} <= expected
    found = [path for path in (site / "rear_scale").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert {path.relative_to(site / "rear_scale").as_posix() for path in found} == expected


def test_a_dry_run_in_an_empty_folder_names_the_engine_that_is_missing(python: Path, tmp_path: Path) -> None:
    done = typed(python, tmp_path, "train", "--config", "rear_xl.yaml", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "961,721,088" in done.stdout  # its parameters
    (note,) = [line for line in done.stdout.splitlines() if line.startswith("note: strategy=zero2 needs")]
    assert "the package deepspeed, which is not installed. Install it: DS_BUILD_OPS=0 pip install 'deepspeed" in note
    assert "<0.20" in note
    assert not list(tmp_path.iterdir())


def test_help_lists_the_commands_with_a_line_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["rear_scale", "--help"])
    commands.main()
    usage, empty, *lines = capsys.readouterr().out.splitlines()
    assert usage.startswith("usage: python -m rear_scale COMMAND")
    assert not empty
    assert [line.split()[0] for line in lines][: len(LAUNCHERS)] == LAUNCHERS
    for line in lines:
        assert len(line.split()) > 3
        assert line.endswith("."), line


def test_a_command_is_the_script_of_its_name() -> None:
    script = str(ROOT / "launchers/train.py")
    assert commands.script_line(["train", "--config", "x"]) == [script, "--config", "x"]
    # as `deepspeed --module rear_scale train` starts it
    assert commands.script_line(["--local_rank=1", "train", "--check"]) == [script, "--check", "--local_rank=1"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "no command is given. Use one of analyze, bench, compare, "),
        (["smaple"], "smaple is not a command; did you mean sample? Use one of "),
        (["--config", "x"], "--config is not a command"),
    ],
)
def test_other_commands_are_refused_in_one_line(words: list[str], expected: str) -> None:
    with pytest.raises(InputError) as caught:
        commands.script_line(words)
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("python launchers/plan.py --config x", "python -m rear_scale plan --config x"),
        ("srun --nodes 2 python launchers/train.py a", "srun --nodes 2 python -m rear_scale train a"),
        ("torchrun --nproc-per-node 8 launchers/train.py a", "torchrun --nproc-per-node 8 -m rear_scale train a"),
        ("deepspeed --num_gpus 2 launchers/train.py a", "deepspeed --num_gpus 2 --module rear_scale train a"),
        ("bash launchers/demo.sh --seeds 3", "python -m rear_scale demo --seeds 3"),
        ("Make it with launchers/sample.py, or", "Make it with python -m rear_scale sample, or"),
        ("not found: /home/me/data/show.py", "not found: /home/me/data/show.py"),
    ],
)
def test_texts_name_scripts_as_they_are_started(monkeypatch: pytest.MonkeyPatch, text: str, expected: str) -> None:
    assert places.as_typed(text) == text
    monkeypatch.setattr(places, "IN_CHECKOUT", False)
    assert places.as_typed(text) == expected


def test_a_strategy_without_its_engine_is_refused_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    for row in facts.rows():
        if row.needs is None:
            check_installed(row)
            continue
        with pytest.raises(InputError, match=rf"^strategy={row.name} needs .* --no-build-isolation, or use .*=single"):
            check_installed(row)


def test_without_a_checkout_the_version_takes_the_place_of_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in an environment that lies inside of a repository of somebody else's."""
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "versions.py").touch()
    monkeypatch.setattr(versions, "__file__", str(tmp_path / "versions.py"))
    assert versions.commit.__wrapped__() == f"version {rear_scale.__version__}"


@pytest.mark.long
def test_the_commands_run_from_a_wheel(site: Path, python: Path, tmp_path: Path, tokens: Path) -> None:
    """In a clean environment: training by two ranks under torchrun, conversion, samples of the file, scores, a plan; then
    what ends in one line. With DeepSpeed: training by its launcher."""
    config = tiny_config_file(tmp_path, tokens)
    weights, inception, images = tmp_path / "tiny.safetensors", tmp_path / "inception.pth", tmp_path / "images.npz"
    torch.save(Inception().state_dict(), inception)
    np.savez(images, arr_0=np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), np.uint8))
    sample = ("sample", "--checkpoint", weights, "--out", "out.npz", "sample.num_images=4", "tokenizer.name=vqplus")
    files = (f"evaluate.reference.r={images}", f"evaluate.inception_weights={inception}")
    outputs = {}
    for words, ranks in (
        (("train", "--config", config, "strategy=fsdp2", "train.total_steps=2"), 2),
        (("convert", tmp_path / "run", "--to", "consolidated", "--out", weights), 1),
        (sample, 1),
        (("evaluate", "--json", "--samples", images, *files), 1),
        (("plan", "--config", "rear_xl.yaml", "cluster.gpus=8"), 1),
        (("train", "--help"), 1),
    ):
        done = typed(python, tmp_path, *words, ranks=ranks)
        assert done.returncode == 0, done.stderr
        outputs[words[0]] = done.stdout
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "done"
    assert list(tmp_path.glob("out*"))
    assert json.loads((tmp_path / "images.result.json").read_text())["provenance"]["commit"].startswith("version ")
    scores = json.loads(outputs["evaluate"])["scores"]
    assert scores["fid/r"] == 0.0
    assert {"sfid/r", "inception_score", "precision_adm_fp16/r", "recall_adm_fp16/r"} <= scores.keys()
    assert "-m rear_scale train --config rear_xl.yaml" in outputs["plan"]
    assert "usage: python -m rear_scale train" in outputs["train"]
    for name in ("plan", "train"):
        assert "launchers/" not in outputs[name]

    for words, expected in (
        (("bench", "data"), "a checkout of the project"),
        (("demo",), "error: the demo needs the package scikit-learn"),
        (("train", "--config", "demo.yaml"), "error: strategy=zero"),
        (("trian",), "error: trian is not a command; did you mean train?"),
    ):
        done = typed(python, tmp_path, *words)
        assert done.returncode == 2, done.stderr
        assert expected in done.stderr.splitlines()[-1]

    shutil.rmtree(tmp_path / "run")
    started = (
        "deepspeed",
        "--num_gpus",
        "2",
        "--module",
        "rear_scale",
        "train",
        "--config",
        config,
        "train.total_steps=2",
    )
    done = launch(*started, cwd=tmp_path, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["state"] == "done"
