"""What arrives with weights and data is data: it runs nothing, leads nowhere, and costs bounded time and memory."""

from __future__ import annotations

import ast
import copy
import json
import resource
import runpy
import sys
import time
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzz_heads import Fuzzer
from helpers import ROOT, tiny_config, write_token_shards
from safetensors.torch import save_file

from rear_scale import cli, config
from rear_scale.checkpoint.meta import read_meta
from rear_scale.checkpoint.open import open_source
from rear_scale.checkpoint.released_config import is_released_yaml
from rear_scale.checkpoint.writer import write_portable
from rear_scale.config import InputError, to_dict
from rear_scale.config.derived import derive
from rear_scale.evaluate.images.npz import read_samples
from rear_scale.evaluate.metrics.statistics_file import read_statistics
from rear_scale.files import file_sha256, inside
from rear_scale.model import build_model
from rear_scale.sample.job import default_output, job_identity
from rear_scale.shards.crops import BadImage, decode_image
from rear_scale.shards.record import read_codebook, read_manifest
from rear_scale.shards.storage import address
from rear_scale.shards.tar_index import scan
from rear_scale.shards.token_files import _alitok_codes, export_alitok
from rear_scale.tokenizer.compact import CompactTokenizer
from rear_scale.weight_file import read_state, write_weights


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
        from rear_scale.checkpoint.writer import write_consolidated

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
        lambda values: values["evaluate"].update(precision_recall_arithmetic=["${now:%Y}"]),
    ],
)
def test_a_config_that_comes_with_weights_interpolates_nothing(tied: Path, change: Callable[[Any], object]) -> None:
    values = json.loads((tied / "meta.json").read_text())["config"]
    change(values)
    with pytest.raises(InputError, match=r"^FILE: .*\$\{.* is a reference") as caught:
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


def test_a_config_that_comes_with_weights_has_no_classifier_written_elsewhere(tmp_path: Path, tied: Path) -> None:
    values = json.loads((tied / "meta.json").read_text())["config"]
    for weights, kept in ((tmp_path / "new", False), ("../new", False), ("runs/new", True), (tmp_path / "there", True)):
        (tmp_path / "there").touch()
        values["evaluate"]["classifier"] = {"weights": str(weights), "images": "x"}
        assert (config.from_file(values, "FILE").evaluate.classifier is not None) is kept


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
        (lambda v: v["optim"].update(lr=float("nan")), r"NaN is not a number in JSON"),
        (lambda v: v.update(model=[]), r"model=\[\] in .* is a single value, but model is a section"),
        (lambda v: v.update({"a\nb": 1}), r"has the key 'a\\nb', which is not a name"),
        (lambda v: v["run"].update(name="x" * 5000), r"run\.name='x.* is not a text of one line"),
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


_BAD_NAMES = [
    "../../up",
    "/absolute",
    "..",
    ".",
    "",
    "a/b",
    "a\\b",
    "a\0b",
    "a\nb",
    "x" * 300,
    3,
    None,
    ["a"],
    "\x1b[2J",
]


@pytest.mark.parametrize("name", _BAD_NAMES, ids=ascii)
def test_a_name_out_of_a_file_is_one_name(tmp_path: Path, name: Any) -> None:
    with pytest.raises(InputError, match=r"^index\.json: file=.* cannot name a file or folder") as caught:
        inside(tmp_path, name, "index.json", "file")
    assert str(caught.value).isprintable()


def test_a_name_does_not_lead_out_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/out").symlink_to(tmp_path)
    (tmp_path / "in/here").symlink_to(tmp_path / "in/other")
    assert inside(tmp_path / "in", "here", "index.json", "file") == tmp_path / "in/here"
    assert inside(tmp_path / "in", "n01440764 tench, é", "index.json", "file").parent == tmp_path / "in"
    with pytest.raises(InputError, match=r"out is a link that leads out of .*, and index\.json names it"):
        inside(tmp_path / "in", "out", "index.json", "file")


def spoilt(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    values = json.loads((folder / "index.json").read_text())
    change(values)
    (folder / "index.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("name", ["../../up", "/tmp/absolute", "a/../../b", "..", "a\0", "x" * 256])
def test_codes_are_exported_to_folders_of_the_cache_alone(tmp_path: Path, name: str) -> None:
    folder = write_token_shards(tmp_path / "deep/set", 20)
    spoilt(folder, lambda values: values["class_names"].__setitem__(4, name))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=r"class_names\[4\]=.* cannot name a file or folder"):
        export_alitok(folder, tmp_path / "deep/cache")
    assert sorted(tmp_path.rglob("*")) == before


def test_codes_are_not_exported_through_a_link_or_into_one_folder(tmp_path: Path) -> None:
    folder = write_token_shards(tmp_path / "set", 20)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/0").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="0 is a link that leads out of"):
        export_alitok(folder, tmp_path / "cache")
    spoilt(folder, lambda values: values.update(class_names=["a", "b", "a", "c", "d"]))
    with pytest.raises(InputError, match="its 5 classes have 4 different names in class_names"):
        export_alitok(folder, tmp_path / "cache")
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda v: v["shards"].append(v["shards"][0]), r"lists shard-000000\.tar twice"),
        (lambda v: v["shards"][0].update(file="../shard.tar"), r"file='\.\./shard\.tar' cannot name"),
        (lambda v: v["shards"][0].update(file="/etc/passwd"), "cannot name a file"),
        (lambda v: v["shards"][0].update(size=1.5), "are not whole numbers and a sha256"),
        (lambda v: v["shards"][0].update(sha256="x" * 64), "are not whole numbers and a sha256"),
        (lambda v: v["shards"][0].update(block_crc32=[1, 2, 3]), "has 3 block checksums, but 1 blocks"),
        (lambda v: v["shards"][0].update(block_crc32=None), "are not whole numbers and a sha256"),
        (lambda v: v["shards"].__setitem__(0, [1]), "a shard has a missing or unknown field"),
        (lambda v: v.update(shards={"a": 1}), r"shards=\{'a': 1\} is not a list"),
        (lambda v: v.update(codebook_size=10**12), "codebook_size=1000000000000 is not a whole number"),
        (lambda v: v.update(num_tokens=2**40), "num_tokens=1099511627776 is not a whole number"),
        (lambda v: v.update(block_samples=0), "block_samples=0 is not a whole number"),
        (lambda v: v.update(layout="plain"), "layout='plain' is not packed"),
        (lambda v: v.update(class_names=[None] * 5), "class_names=.* is not a list of texts"),
        (lambda v: v.update(label_counts=[0] * 70_000), "70,000 classes, more than labels of 16 bits can number"),
        (lambda v: v.update(codebook_sha256="abc"), "codebook_sha256='abc' is not a checksum"),
        (lambda v: v.update(tokenizer=["x"]), r"tokenizer=\['x'\] is not a text"),
        (lambda v: v.update(num_samples=float("nan")), "NaN is not a number in JSON"),
        (lambda v: v.update(made_from="\udfff"), "half a surrogate pair"),
        (lambda v: v.update(made_from=nested(300)), "more than 64 levels of nesting"),
    ],
)
def test_manifests_of_tokens_hold_what_they_can(tmp_path: Path, change: Callable[[Any], object], expected: str) -> None:
    folder = spoilt(write_token_shards(tmp_path / "set", 20), change)
    with pytest.raises(InputError, match=expected) as caught:
        read_manifest(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"null", b'{"format": "a", "format": "b"}', b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"\xff\xfe",
     b'{"x": 1e999}', b"{}" * 2, b"[[],[]" + b",[]" * 1_100_000 + b"]"],
    ids=["empty", "list", "null", "twice", "deep lists", "deep objects", "digits", "bytes", "infinite", "two", "many"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["index.json", "meta.json"])
def test_texts_that_are_no_manifest_are_one_line(tmp_path: Path, name: str, text: bytes) -> None:
    (tmp_path / name).write_bytes(text)
    read = read_manifest if name == "index.json" else read_meta
    started = time.process_time()
    with pytest.raises(InputError, match=r"(index|meta)\.json is not valid JSON|has format None") as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)
    assert time.process_time() - started < 5


def test_a_file_larger_than_a_manifest_can_be_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "index.json", "wb") as file:
        file.truncate(2**40)  # without taking space
    with pytest.raises(InputError, match="1,099,511,627,776 bytes, more than"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.zeros((8, 32), np.float32), r"it has shape \[8, 32\], not \[32, 8\]"),
        (np.zeros((32, 8), np.int8), "it holds int8, not numbers"),
        (np.zeros((32, 8), bool), "it holds bool, not numbers"),
        (np.zeros((32, 8), np.complex64), "not numbers|more than the"),
        (np.full((32, 8), np.nan, np.float32), "holds values that are not finite"),
        (np.full((32, 8), 1e300), "holds values that are not finite"),
        (np.full((32, 8), {}, object), "not plain numbers"),
        (np.zeros((32, 8), [("a", "f4")]), "not plain numbers"),
        (np.zeros((4000, 8), np.float32), "more than the"),
    ],
)
def test_a_codebook_is_of_finite_floats_and_its_shape(tmp_path: Path, array: np.ndarray, expected: str) -> None:
    folder = write_token_shards(tmp_path / "set", 20)
    np.save(folder / "codebook.npy", array, allow_pickle=True)
    spoilt(folder, lambda values: values.update(codebook_sha256=file_sha256(folder / "codebook.npy")))
    with pytest.raises(InputError, match=rf"codebook\.npy.*({expected})"):
        read_codebook(folder, read_manifest(folder))


_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2\nsize 12345\n"
_PAGE = b"\n<!DOCTYPE html>\n<html><body>Not found</body></html>"
_REFUSAL = b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (_POINTER, "is a git-lfs pointer"),
        (_PAGE, "is an HTML page"),
        (_REFUSAL, "is an XML text"),
        (b"", "empty|gave nothing"),
    ],
    ids=["pointer", "page", "refusal", "nothing"],
)
@pytest.mark.parametrize(
    "kind", ["safetensors", "bin", "compact", "npz", "statistics", "codes", "codebook", "index", "tar", "image"]
)
def test_what_was_saved_in_place_of_a_file_is_called_what_it_is(
    tmp_path: Path, content: bytes, what: str, kind: str
) -> None:
    path = tmp_path / {"safetensors": "a.safetensors", "compact": "a.safetensors", "index": "index.json"}.get(
        kind, "a.bin"
    )
    path.write_bytes(content)
    readers: dict[str, Callable[[], object]] = {
        "safetensors": lambda: open_source(path),
        "bin": lambda: open_source(path),
        "compact": lambda: CompactTokenizer.from_file(str(path)),
        "npz": lambda: read_samples(path),
        "statistics": lambda: read_statistics(path, {}, {}),
        "codes": lambda: _alitok_codes(path, 16, None),
        "index": lambda: read_manifest(tmp_path),
        "tar": lambda: scan(path),
        "image": lambda: decode_image(content),
    }
    if kind == "codebook":
        folder = write_token_shards(tmp_path / "set", 20)
        (folder / "codebook.npy").write_bytes(content)
        readers["codebook"] = lambda: read_codebook(folder, read_manifest(folder))
    if content == b"":
        what = {"tar": "not a tar header", "image": "not an image"}.get(kind, what)
    with pytest.raises(BadImage if kind == "image" else InputError, match=what) as caught:
        readers[kind]()
    assert "\n" not in str(caught.value)


_DTYPES = [torch.bool, torch.int8, torch.uint8, torch.int32, torch.complex64, torch.float8_e4m3fn, torch.int64]


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
def test_weights_are_floats(tmp_path: Path, form: str, dtype: torch.dtype) -> None:
    path = tmp_path / f"weights.{form}"
    state = {"good": torch.zeros(2), "bad": torch.zeros(2, 2).to(dtype)}
    save_file(state, path) if form == "safetensors" else torch.save(state, path)
    with pytest.raises(InputError, match=r"'bad' holds \w+, but weights are floats of 16, 32 or 64 bits"):
        read_state(path, "train.init_from")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_weights_of_every_float_and_counts_of_batches_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {"weight": torch.zeros(2, dtype=dtype), "num_batches_tracked": torch.tensor(3)}
    torch.save(state, tmp_path / "a.pth")
    save_file(state, tmp_path / "a.safetensors")
    for name in ("a.pth", "a.safetensors"):
        assert read_state(tmp_path / name, "x").keys() == state.keys()


def test_tensors_larger_than_their_file_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(2**20, 2**20)}, tmp_path / "a.pth")
    with pytest.raises(InputError, match="a would have 4,398,046,511,104 bytes, more than are stored"):
        read_state(tmp_path / "a.pth", "x")
    torch.save({"a": torch.zeros(3).to_sparse()}, tmp_path / "b.pth")
    with pytest.raises(InputError, match="a is not a plain tensor"):
        read_state(tmp_path / "b.pth", "x")
    torch.save({"a": torch.zeros(2**20)}, tmp_path / "c.pth")
    with (
        zipfile.ZipFile(tmp_path / "c.pth") as old,
        zipfile.ZipFile(tmp_path / "d.pth", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(InputError, match="is compressed, which torch.save does not do"):
        read_state(tmp_path / "d.pth", "x")


@pytest.mark.parametrize(
    ("length", "head", "expected"),
    [
        (2**62, b"{}", "its header would have 4,611,686,018,427,387,904 bytes"),
        (None, b"[]", r"its header is \[\], not an object"),
        (None, b"null", "its header is None"),
        (None, b'{"a": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 4]}}', "does not take 4 bytes"),
        (None, b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', r"has shape \[-1\]"),
        (
            None,
            b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4000]}}',
            r"has data_offsets \[0, 4000\] in 4 bytes",
        ),
        (None, b'{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}', "has dtype"),
        (None, b'{"a": {"dtype": "a\\nb", "shape": [1], "data_offsets": [0, 4]}}', "has dtype"),
        (None, b'{"__metadata__": {"rear_scale": 3}}', "does not hold texts by name"),
        (None, b'{"__metadata__": {"rear_scale": "[]"}}', r"its rear_scale metadata are \[\], not an object"),
        (None, b'{"__metadata__": {"rear_scale": "' + b"[" * 70_000 + b'"}}', "nesting"),
        (None, b'{"a": 1, "a": 2}', "the key 'a' occurs twice"),
    ],
)
def test_heads_of_weight_files_hold_what_they_can(
    tmp_path: Path, length: int | None, head: bytes, expected: str
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes((length or len(head)).to_bytes(8, "little") + head + b"\0" * 4)
    with pytest.raises(InputError, match=expected) as caught:
        open_source(path)
    assert "\n" not in str(caught.value)


def test_sizes_in_the_head_of_a_small_model_are_those_of_its_tensors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = CompactTokenizer(16, 32, 8, 16)
    for change in ({"codebook_size": 65_536, "codebook_dim": 65_536}, {"channels": 65_536}, {"codebook_dim": 4}):
        architecture = {"image_size": 16, "codebook_size": 32, "codebook_dim": 8, "channels": 16, **change}
        write_weights(tmp_path / "a", tokenizer, "compact tokenizer", architecture)
        with pytest.raises(InputError, match="does not match its header"):
            CompactTokenizer.from_file(str(tmp_path / "a"))
    for change in ({"channels": 2**40}, {"channels": "16"}, {"channels": True}, {"codebook_dim": 0}, {"x": 1}):
        architecture = {"image_size": 16, "codebook_size": 32, "codebook_dim": 8, "channels": 16, **change}
        write_weights(tmp_path / "a", tokenizer, "compact tokenizer", architecture)
        with pytest.raises(InputError, match="its header says architecture="):
            CompactTokenizer.from_file(str(tmp_path / "a"))


@pytest.mark.parametrize("name", ["a'b.tar", "a b.tar", "$(id).tar", "a;b.tar", "-rf.tar", "a`b`.tar", 'a"b.tar'])
def test_names_of_remote_shards_go_into_a_command_only_when_a_shell_makes_nothing_of_them(name: str) -> None:
    with pytest.raises(InputError, match="is not safe in a command"):
        address("pipe:ssh host 'cat tokens/{file}'", name)


_LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in pairwise("abcdefghi")
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (_LAUGHS, r"values once its aliases \(\*NAME\) are expanded"),
        ("a: " + "[" * 100_000 + "]" * 100_000, "nested more than 30 levels deep"),
        ("".join(" " * level + "a:\n" for level in range(100)), "nested more than 30 levels deep"),
        ("a: &a [*a]", r"the alias \*a is inside the value that it refers to"),
        ("run: {name: " + "x" * 2_000_000 + "}", "has 2,000,013 characters, a config at most"),
    ],
    ids=["aliases", "lists", "maps", "itself", "size"],
)
def test_a_yaml_costs_bounded_time_and_memory(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    started = time.process_time()
    with pytest.raises(InputError, match=expected):
        config.load(str(tmp_path / "a.yaml"))
    assert not is_released_yaml(tmp_path / "a.yaml")
    assert time.process_time() - started < 5


def test_arrays_that_unpack_to_more_than_they_may_are_not_unpacked(tmp_path: Path) -> None:
    huge = np.broadcast_to(np.zeros(1), (6000, 1000))
    np.savez_compressed(tmp_path / "a.npz", codes=huge, manifest=np.full(3, "x" * 100_000))
    np.savez_compressed(tmp_path / "b.npz", mu=huge, sigma=huge)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="holds no array `codes`"):
        _alitok_codes(tmp_path / "a.npz", 16, None)
    with pytest.raises(InputError, match="manifest is not one of"):
        read_statistics(tmp_path / "a.npz", {"pool": "x"}, {"pool": 4})
    with pytest.raises(InputError, match="are not of 4 features"):
        read_statistics(tmp_path / "b.npz", {"pool": "x"}, {"pool": 4})
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40 * 1024  # KiB: less than one of them


# Calls that open, run or load something, by the last two parts of their names.
_OPENERS = {
    "gopen", "Popen", "subprocess.run", "torch.load", "np.load", "load_file", "safe_open", "np.memmap", "zipfile.ZipFile",
    "tarfile.open", "Image.open", "json.loads", "yaml.safe_load", "yaml.parse", "OmegaConf.load", "compose", "Environment",
    "OmegaConf.register_new_resolver", "ctypes.CDLL", "importlib.import_module", "util.spec_from_file_location",
    "tar_file_expander", "dist.all_gather_object", "dist.broadcast_object_list", "read_json", "parse_json", "npy_header",
    "npy_array", "safetensors_header",
}  # fmt: skip
_NEVER = {"eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load", "os.system", "os.popen",
          "tar.extractall", "archive.extractall", "tar.extract", "torch.hub.load", "marshal.loads"}  # fmt: skip


def _calls(path: Path) -> list[tuple[str, ast.Call]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found += [(name, node), (".".join(name.split(".")[-2:]), node)]
    return found


@pytest.mark.parametrize("folder", ["rear_scale", "launchers", "data"])
def test_every_place_that_opens_something_is_in_the_page_on_trust(folder: str) -> None:
    page = (ROOT / "docs/trust.md").read_text()
    for path in (ROOT / folder).rglob("*.py"):
        place = path.relative_to(ROOT).as_posix()
        for name, call in _calls(path):
            assert name not in _NEVER, f"{place}: {name}"
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert name != "torch.load" or given.get("weights_only") == "True", place
            assert given.get("allow_pickle", "False") == "False", place
            assert given.get("shell", "False") == "False", place
            if name in _OPENERS:
                assert place in page or f"{Path(place).parent.as_posix()}/`" in page, f"{place} calls {name}"


def test_hostile_inputs_are_refused_and_nothing_else(tmp_path: Path) -> None:
    found = Fuzzer(tmp_path, seed=0).run(210)
    assert found.faults == []
    assert found.refused > 100
    assert found.slowest[0] < 20


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_many_hostile_inputs_are_refused_and_nothing_else(tmp_path: Path, seed: int) -> None:
    found = Fuzzer(tmp_path, seed=seed + 1).run(4000)
    assert found.faults == []
    assert found.slowest[0] < 20
