"""What arrives with weights and data is data: it runs nothing, leads nowhere, and costs bounded time and memory."""

from __future__ import annotations

import copy
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, tiny_config

from rear_scale import cli, config
from rear_scale.config import InputError, to_dict
from rear_scale.config.plan import derive
from rear_scale.model import build_model
from rear_scale.parallel.sources import open_source, write_portable
from rear_scale.sample.job import default_output, job_identity


def written(folder: Path, tokens: Path, *overrides: str) -> Path:
    """A checkpoint folder of drawn weights."""
    cfg = tiny_config(folder, tokens, *overrides)
    model = build_model(cfg)
    model.init_weights(0)
    path = folder / "run/checkpoints/step_00000002"
    path.parent.mkdir(parents=True)
    write_portable(path, 2, {"param": dict(model.state_dict())}, {"optimizer_step": 2, "config": to_dict(cfg)})
    return path


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> Path:
    """Of a model that needs a codebook from outside."""
    return written(tmp_path_factory.mktemp("tied"), tokens, "model.tie_codebook=both")


def with_config(source: Path, out: Path, form: str, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a checkpoint, as a folder or as one file, whose config was changed by hand."""
    meta = json.loads((source / "meta.json").read_text())
    change(meta["config"])
    if form == "consolidated":
        path = out / "model.safetensors"
        found = open_source(source)
        found.meta["config"] = meta["config"]
        from rear_scale.parallel.sources import write_consolidated

        write_consolidated(path, found, {name: found.reader("param")(name) for name in found.names()})
        return path
    path = out / source.name
    path.mkdir(parents=True)
    for item in meta["files"]:
        (path / item["file"]).symlink_to(source / item["file"])
    (path / "meta.json").write_text(json.dumps(meta))
    return path


def opened(monkeypatch: pytest.MonkeyPatch, path: Path, *overrides: str) -> cli.CheckpointCommand:
    monkeypatch.setattr(sys, "argv", ["launcher", "--checkpoint", str(path), *overrides])
    return cli.parse_checkpoint(cli.make_parser("", from_checkpoint=True))


@pytest.mark.parametrize("form", ["folder", "consolidated"])
@pytest.mark.parametrize("place", ["pipe:touch {mark}; cat {{file}}", "file://{mark}", "s3://bucket/{mark}"])
def test_a_config_that_comes_with_weights_names_no_command_and_no_remote_place(
    tmp_path: Path, tied: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, form: str, place: str
) -> None:
    mark = tmp_path / "ran"
    named = place.format(mark=mark)

    def change(values: dict[str, Any]) -> None:
        values["data"].update(train=named, val=named)
        values["train"]["val_every"] = 1

    path = with_config(tied, tmp_path / "copy" if form == "folder" else tmp_path, form, change)
    command = opened(monkeypatch, path)
    assert command.cfg.data.train is command.cfg.data.val is None
    with pytest.raises(
        InputError, match=r"data\.train is not set, but .* needs the codebook .* Set data\.train=FOLDER"
    ):
        job_identity(command.cfg, command.checkpoint)
    # The user may name it: a folder, or a command.
    command = opened(monkeypatch, path, f"data.train={tokens}", "tokenizer.name=vqplus")
    assert job_identity(command.cfg, command.checkpoint)
    command = opened(monkeypatch, path, f"data.train='pipe:cat {tokens}/{{file}}'", "tokenizer.name=vqplus")
    assert job_identity(command.cfg, command.checkpoint)
    assert not mark.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values["data"].update(train="${oc.env:HOME}/tokens"),
        lambda values: values["tokenizer"].update(weights="${oc.env:SECRET}"),
        lambda values: values["run"].update(name="a${run.dir}"),
        lambda values: values["evaluate"].update(reference={"adm": "${oc.decode:x}"}),
        lambda values: values["evaluate"].update(neighbour_modes=["${now:%Y}"]),
    ],
)
def test_a_config_that_comes_with_weights_interpolates_nothing(tied: Path, change: Callable[[Any], object]) -> None:
    values = json.loads((tied / "meta.json").read_text())["config"]
    change(values)
    with pytest.raises(InputError, match=r"^FILE: .*\$\{.* refers to something else") as caught:
        config.from_file(values, "FILE")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "folder"),
    [
        ({"dir": "/somewhere/else"}, "runs/tiny"),
        ({"dir": "../up"}, "runs/tiny"),
        ({"dir": "runs/../../up", "name": "../../x"}, "runs/run"),
        ({"dir": None, "name": ".."}, "runs/run"),
        ({"dir": "runs/mine"}, "runs/mine"),
    ],
)
def test_samples_of_a_weight_file_go_below_the_current_folder(
    tmp_path: Path, tied: Path, tokens: Path, change: dict[str, Any], folder: str
) -> None:
    path = with_config(tied, tmp_path, "consolidated", lambda values: values["run"].update(change))
    found = open_source(path)
    cfg = config.from_file(found.meta["config"], "FILE", ["tokenizer.name=vqplus"])
    cfg.data.train = str(tokens)
    assert default_output(cfg, found).parent == Path(folder) / "samples"


def test_a_config_that_comes_with_weights_sends_nothing_to_wandb(tied: Path) -> None:
    values = json.loads((tied / "meta.json").read_text())["config"]
    values["wandb"]["mode"] = "online"
    assert config.from_file(values, "FILE").wandb.mode == "disabled"
    assert config.from_file(values, "FILE", ["wandb.mode=offline"]).wandb.mode == "offline"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda v: v["model"].update(depth=1_000_000_000), r"model\.depth=1000000000 is above 1,024"),
        (lambda v: v["model"].update(depth=1_000), r"holds 2 blocks, but its config says model\.depth=1000"),
        (lambda v: v["model"].update(width=2**40, num_heads=3), r"model\.width=1099511627776 is above"),
        (lambda v: v["model"].update(num_classes=10**12), r"model\.num_classes=1000000000000 does not fit"),
        (lambda v: v["model"].update(mlp_width=1_000_000), r"has blocks\.0\.mlp.* instead of"),
        (lambda v: v["sample"].update(num_images=10**15), r"sample\.num_images=1000000000000000 is above"),
        (lambda v: v["model"].update(depth=10**25), r"cannot be read|not valid JSON"),
        (lambda v: v["model"].update(depth=True), r"model\.depth"),
        (lambda v: v["model"].update(width=[1, [2]]), r"model\.width"),
        (lambda v: v["optim"].update(lr=float("nan")), r"NaN is no number of JSON"),
        (lambda v: v.update(model=[]), r"model=\[\] in .* is a single value, but model is a section"),
        (lambda v: v.update({"a\nb": 1}), r"has the key 'a\\nb', which is no name"),
        (lambda v: v["run"].update(name="x" * 5000), r"run\.name='x.* is no text of one line"),
        (lambda v: v["run"].update(name="\ud800"), r"half a surrogate pair"),
        (lambda v: v["run"].update(name=nested(200)), r"nest"),
    ],
)
def test_values_that_no_config_has_are_one_line(
    tmp_path: Path, tied: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], object], expected: str
) -> None:
    path = with_config(tied, tmp_path, "folder", change)
    with pytest.raises(InputError, match=expected) as caught:
        opened(monkeypatch, path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def nested(levels: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(levels):
        found = [found]
    return found


def test_what_a_config_says_beyond_its_weights_is_no_matter(tied: Path) -> None:
    values = json.loads((tied / "meta.json").read_text())["config"]
    before = copy.deepcopy(values)
    assert config.from_file(values, "FILE", ["run.dir=/elsewhere"]).run.dir == "/elsewhere"
    assert values == before


COMMANDS = {
    "train": ["train.py", "--config", "CONFIG"],
    "pretokenize": ["pretokenize.py", "--config", "CONFIG", "pretokenize.images=PIPE", "pretokenize.out=out"],
    "train_tokenizer": ["train_tokenizer.py", "--config", "CONFIG"],
    "plan": ["plan.py", "--config", "CONFIG"],
    "evaluate": ["evaluate.py", "--config", "CONFIG", "evaluate.reference.adm=PIPE"],
    "evaluate a checkpoint": ["evaluate.py", "--checkpoint", "CHECKPOINT"],
    "sample": ["sample.py", "--checkpoint", "CHECKPOINT"],
    "convert": ["convert.py", "CHECKPOINT", "--to", "consolidated", "--out", "out.safetensors"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_dry_runs_run_no_command_and_open_nothing_remote(
    tmp_path: Path,
    tied: Path,
    tokens: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    tiny_config(tmp_path, tokens)
    pipe = f"pipe:touch {tmp_path}/ran; cat {{file}}"
    names = {"CONFIG": str(tmp_path / "tiny.yaml"), "CHECKPOINT": str(tied)}
    words = [names.get(word, word.replace("PIPE", f"'{pipe}'")) for word in COMMANDS[command]]
    launcher, *arguments = words
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [launcher, f"data.train='{pipe}'", f"data.val='{pipe}'", *arguments, "--dry-run"])
    before = sorted(tmp_path.iterdir())
    runpy.run_path(str(ROOT / "launchers" / launcher))["main"]()
    assert sorted(tmp_path.iterdir()) == before
    if launcher in ("train.py", "evaluate.py", "sample.py"):
        assert f"not checked in a dry run: data.train={pipe}" in capsys.readouterr().out


def test_micro_batches_that_fit_are_found_at_once(tokens: Path, tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path, tokens, "train.global_batch_size=2147483648", "train.micro_batch_size=7")
    with pytest.raises(InputError, match=r"Use train\.micro_batch_size=4 or 8"):
        derive(cfg, 8, 100)


def test_null_is_no_place_for_the_tokens_of_a_users_own_config(tmp_path: Path, tokens: Path) -> None:
    with pytest.raises(InputError, match=r"data\.train is null in .*tiny\.yaml or on the command line"):
        tiny_config(tmp_path, tokens, "data.train=null")
