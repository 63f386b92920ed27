"""Overrides of the command line: the schema's types say how a value is read."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import pytest

from rear_scale import cli, config
from rear_scale.config import InputError, check_override, combinations
from rear_scale.config.overrides import field_type, is_map, quoted
from rear_scale.config.schema import ExperimentConfig
from rear_scale.evaluate.targets import _settings
from rear_scale.run.requeue import _run_dir

DEMO = config.to_dict(config.load("demo.yaml"))


def refusal(*overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        config.from_dict(DEMO, "demo", overrides)
    message = str(caught.value)
    assert message.isprintable()
    return message


@pytest.mark.parametrize(
    "text",
    [
        "ckpt/epoch=9-step=87.safetensors", "/data/a,b", "/data/a, b", "/data/100%", "/data/me@lab", "/data/été", "/data/数据",
        "/data/Ω≈ç√", "/data/x#1", "/data/[old]/x", "/data/{a}", "/data/(copy)", "/data/a&b;c|d<e>f", "/data/it's",
        '/data/5"', "'a' and 'b'", "/data/!^*?`", "/data/$HOME", "/data/a\\b", "/data/a\\,b", "~/x", "~user", "~", "+x", "-x",
        "s3://b/k?x=1&y=2", "gs://b/[a]/{b}", "hf://datasets/o/n@main/x", "https://h/x?a=1,2#f", "pipe:ssh HOST cat {file}",
        "pipe:sh -c 'zcat \"$0\"' {file}", "/data/train-{0000..0003}.tar", "a:b", "a: b", " lead", "trail ", ".", "..",
        "1.10", "1e5", "007", "1_000", "0x10", "0b11", "1:30", "2024-01-01", "2024-01-01T10:00:00", "true", "False", "yes",
        "off", "null", "None", "none", "nan", "inf", "-", "%d", "=", "==x", "[a, b]", "{a: 1}", "int(3)", "a=b,c=d",
    ],
)  # fmt: skip
def test_text_is_taken_as_it_was_typed(text: str) -> None:
    assert check_override(f"run.name={text}").value == text
    if text not in ("null", "None"):  # data.val may be null
        assert check_override(f"data.val={text}").value == text


@pytest.mark.parametrize(
    "text", ["a,b", "x=1", "null", "choice(a,b)", "it's", 'a "b"', "back\\", "q\\'", "range(1,3)", "'x'"]
)
def test_quotes_around_all_of_a_text_are_dropped(text: str) -> None:
    (word,) = shlex.split(quoted("data.val", text))
    assert check_override(word).value == text


def test_texts_reach_the_config_unchanged_and_survive_being_saved(tmp_path: Path) -> None:
    texts = {
        "run.name": "1.10",
        "run.dir": "runs/é, [1]=x",
        "data.val": "pipe:ssh HOST cat {file}",
        "wandb.project": "007",
    }
    overrides = [f"{key}={value}" for key, value in texts.items()]
    cfg = config.load(
        "demo.yaml", [*overrides, "resume.allow=[1.10, optim.lr]", "evaluate.reference={a: 1e5, b: 'x, y'}"]
    )
    assert (cfg.run.name, cfg.run.dir, cfg.data.val, cfg.wandb.project) == tuple(texts.values())
    assert cfg.resume.allow == ["1.10", "optim.lr"]
    assert (cfg.evaluate.reference["a"], cfg.evaluate.reference["b"]) == ("1e5", "x, y")
    (tmp_path / "config.yaml").write_text(config.to_yaml(cfg), encoding="utf-8")
    assert config.load(str(tmp_path / "config.yaml")) == cfg


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optim.betas=0.9,0.95", [0.9, 0.95]),
        ("optim.betas=[0.9, 0.95]", [0.9, 0.95]),
        ("optim.betas=[ 9e-1 ,.95 ]", [0.9, 0.95]),
        ("sample.labels=207,360", [207, 360]),
        ("sample.labels=7", [7]),
        ("sample.labels=None", None),
        ("sample.labels=[]", []),
        ("resume.allow=optim.lr,train.total_steps", ["optim.lr", "train.total_steps"]),
        ("resume.allow=['a,b', \"c\", 1.10, null]", ["a,b", "c", "1.10", "null"]),
        ("profile.steps=10,12", [10, 12]),
        ("data.val=null", None),
        ("data.val=NULL", None),
        ("model.mlp_width=None", None),
        ("evaluate.reference={adm: /x/a=1.npz, val: s3://b/1.10}", {"adm": "/x/a=1.npz", "val": "s3://b/1.10"}),
        ("evaluate.reference=/x/{a}.npz", "/x/{a}.npz"),
        ("evaluate.reference.adm=/x/a,b.npz", "/x/a,b.npz"),
        ("sample.guidance={scale: 3, schedule: constant}", {"scale": 3, "schedule": "constant"}),
        ("objective.noise={max: 0.5, rate: fixed}", {"max": 0.5, "rate": "fixed"}),
        ("+optim.lr=1e-3", 1e-3),
        ("++optim.lr=1e-3", 1e-3),
        ("train.total_steps=1_000", 1000),
        ("train.compile=TRUE", True),
        ("objective.heads.decode_tap=${model.depth}", "${model.depth}"),
    ],
)
def test_values_are_read_by_the_type_of_their_field(override: str, value: Any) -> None:
    assert check_override(override).value == value


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.seed=1,2", "has several values, as in a sweep"),
        ("optim.lr=choice(1,2)", "one run takes one value"),
        ("run.seed=range(1,3)", "one run takes one value"),
        ("optim.lr=interval(1,3)", "one run takes one value"),
        ("strategy=ddp,fsdp2", "strategy=ddp,fsdp2 has several values"),
        ("objective=glob(*)", "one run takes one value"),
        ("run.name=glob(*)", "to set this text itself, write 'run.name='\"'\"'glob(*)'\"'\"''"),
        ("train.precision=bf16,fp32", "start a run for each"),
        ("optim.lr=", "optim.lr= is empty: it takes a number"),
        ("run.name=", "run.name= is empty: it takes text"),
        ("run.name=   ", "is empty"),
        ("sample.labels=1,,2", "a value is missing between commas"),
        ("sample.labels=[1,2", r"takes a whole number"),
        ("resume.allow=['a]", "a quote is not closed"),
        ("evaluate.reference={a}", "has no value. The form is evaluate.reference={name: value"),
        ("evaluate.reference.a[0]=x", "a name has no spaces, dots, colons or brackets"),
        ("evaluate.reference.a\udcffb=x", "a name has no spaces"),
        ("evaluate.reference.a.b=x", "evaluate.reference.a is a single value"),
        ("optim.lr = 1e-3", "without spaces around the ="),
        ("optim.lr =1e-3", "without spaces around the ="),
        ("optim.lr", "has no value: the form is section.field=value"),
        ("=1", "has no key"),
        ("", "has no key"),
        ("~optim.lr", "optim.lr takes a number and is not removed"),
        ("~optim.lr=1", "what is removed has no value"),
        ("~evaluate.reference.trainign", "there is no such entry; did you mean training? It has validation, training"),
        ("~optim", "optim takes a section and is not removed"),
        ("optim@x.lr=1", "optim@x is not a config key"),
        ("optim.betas[0]=1", "optim.betas[0] is not a config key; did you mean optim.betas?"),
        ("official=rear_b", "official is not a config key"),
        ("../x=y", "is not a config key"),
        ("model.depth=true", "model.depth=True"),
        ("model.depth=" + "9" * 399, "a number of more than 30 digits"),
        ("model.depth=" + "9" * 5000, "a number of 5000 characters"),
        ("optim.lr=1e999", "optim.lr=inf must be above 0"),
        ("optim.lr=" + "(" * 300, "optim.lr=((("),
        ("run.name=" + "x" * 5000, "a text of 5000 characters"),
        ("run.name=a\nb", "control characters"),
        ("run.name=a\udcffb", "not UTF-8"),
        ("run.dir=/data/${oc.env:HOME}", "resolvers such as oc.env do not work on the command line"),
        ("run.dir=/data/${", "cannot be set"),
        ("run.dir=/data/${nothing}", "refers to a key that does not exist"),
        ("run.dir=${run.dir}", "run.dir"),
        ("run.name=???", "marks a value that is not set"),
        (r"run.dir=/data/\${x}", "which a name or path of a run cannot contain"),
    ],
)  # fmt: skip
def test_what_is_refused_is_one_line_with_a_way_out(override: str, expected: str) -> None:
    assert expected in refusal(override)


def test_the_last_of_two_overrides_wins_and_keys_of_the_config_are_looked_up() -> None:
    cfg = config.from_dict(DEMO, "demo", ["run.name=a", "run.name=b", "run.dir=/x/${run.name}_1"])
    assert (cfg.run.name, cfg.run.dir) == ("b", "/x/b_1")


@pytest.mark.parametrize("text", ["name: 1.10", "name: 007", "name: 1e5", "name: yes", "{name: x, dir: 3}"])
def test_a_text_that_yaml_reads_as_something_else_is_refused(tmp_path: Path, text: str) -> None:
    """The text as it was typed is gone by then: 1.10 has become 1.1."""
    section = text if text.startswith("{") else f"{{{text}}}"
    (tmp_path / "mine.yaml").write_text(f"defaults: [demo, _self_]\nrun: {section}\n")
    with pytest.raises(InputError, match=r"run\.\w+=\S+ in .*mine.yaml is read as .*Put it in quotes there"):
        config.load(str(tmp_path / "mine.yaml"))


def test_a_text_in_quotes_is_what_it_was_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "defaults: [demo, _self_]\nresume: {allow: ['1.10', optim.lr]}\nrun: {name: '1.10'}\n"
    )
    cfg = config.load(str(tmp_path / "mine.yaml"))
    assert (cfg.run.name, cfg.resume.allow) == ("1.10", ["1.10", "optim.lr"])


def test_home_is_meant_by_a_leading_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["run.dir=~/runs/x", "data.val=~user/x", "evaluate.reference.a=~/a.npz", "data.train=pipe:cat ~/{file}"]
    monkeypatch.setattr("sys.argv", ["launcher", "--config", "demo.yaml", *words])
    cfg = cli.parse(cli.make_parser("")).cfg
    assert (cfg.run.dir, cfg.data.val, cfg.data.train) == (f"{tmp_path}/runs/x", "~user/x", "pipe:cat ~/{file}")
    assert cfg.evaluate.reference["a"] == f"{tmp_path}/a.npz"
    assert _run_dir(["--config", "demo.yaml", "run.dir=~/runs/x"]) == os.path.expanduser("~/runs/x")


@pytest.mark.parametrize("words", [["--optim.lr=1e-3"], ["--optim.lr", "1e-3"], ["-optim.lr=1e-3"], ["--strategy=ddp"]])
def test_options_that_are_fields_are_told_to_drop_the_dashes(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    monkeypatch.setattr("sys.argv", ["launcher", "--config", "demo.yaml", *words])
    with pytest.raises(InputError, match=r"set without dashes: (optim\.lr|strategy)=VALUE"):
        cli.parse(cli.make_parser(""))


def test_sweeps_give_every_combination() -> None:
    assert combinations([], "--grid") == [[]]
    assert combinations(["optim.lr=1e-4,2e-4", "optim.betas=[0.9,0.95]", "run.seed=0,1"], "--grid") == [
        ["optim.lr=1e-4", "optim.betas=[0.9,0.95]", "run.seed=0"], ["optim.lr=1e-4", "optim.betas=[0.9,0.95]", "run.seed=1"],
        ["optim.lr=2e-4", "optim.betas=[0.9,0.95]", "run.seed=0"], ["optim.lr=2e-4", "optim.betas=[0.9,0.95]", "run.seed=1"],
    ]  # fmt: skip
    for sweep in ("optim.lr", "optim.lr=", "=1"):
        with pytest.raises(InputError, match=f"--grid '?{sweep}'?: the form is section.field=VALUE,VALUE"):
            combinations([sweep], "--grid")


def test_sweeps_of_an_evaluation_keep_lists_together() -> None:
    assert _settings(["sample.labels=[1,2],[3]", "sample.guidance.scale=4.0,6.9"]) == [
        ["sample.labels=[1,2]", "sample.guidance.scale=4.0"], ["sample.labels=[1,2]", "sample.guidance.scale=6.9"],
        ["sample.labels=[3]", "sample.guidance.scale=4.0"], ["sample.labels=[3]", "sample.guidance.scale=6.9"],
    ]  # fmt: skip
    for sweep in ("sample.guidance.scale=4.0,,6.9", "sample.guidance.scale=4.0,"):
        with pytest.raises(InputError, match=r"--sweep sample\.guidance\.scale=.*a value is missing between commas"):
            _settings([sweep])


MAPS = [key for key in config.fields.declarations(ExperimentConfig) if is_map(field_type(key))]


@pytest.mark.parametrize("key", MAPS)
def test_an_entry_of_every_map_and_the_map_itself_can_be_dropped(key: str, tmp_path: Path) -> None:
    section, _, name = key.rpartition(".")
    value = "{weight: 1}" if key == "objective.terms" else "PATH"
    whole = f"{key}={{a: {value}, b: {value}}}"

    def names(config_file: str, *overrides: str) -> list[str]:
        return list(getattr(getattr(config.load(config_file, overrides), section), name))

    for dropped in (f"~{key}.a", f"{key}.a=null"):
        assert names("rear_b.yaml", whole, dropped) == ["b"], dropped
    for emptied in (f"~{key}", f"{key}=null", f"{key}={{}}"):
        assert names("rear_b.yaml", whole, emptied) == [], emptied
        assert names("rear_b.yaml", whole, emptied, f"{key}.c={value}") == ["c"], emptied
    # The same in a file over another one.
    (tmp_path / "one.yaml").write_text(
        f"defaults: [rear_b, _self_]\n{section}: {{{name}: {{a: {value}, b: {value}}}}}\n"
    )
    for said, left in ((f"{{a: null, c: {value}}}", ["b", "c"]), ("null", [])):
        (tmp_path / "two.yaml").write_text(f"defaults: [one, _self_]\n{section}: {{{name}: {said}}}\n")
        assert names(str(tmp_path / "two.yaml")) == left


def test_optional_fields_are_removed_to_null() -> None:
    cfg = config.load("demo.yaml", ["~evaluate.classifier", "~data.val", "~evaluate.reference.training"])
    assert (cfg.evaluate.classifier, cfg.data.val, list(cfg.evaluate.reference)) == (None, None, ["validation"])


def test_paths_of_a_saved_config_are_found_from_the_folder_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, here = tmp_path / "project/runs/own", tmp_path / "elsewhere"
    for file in (run / "x", here / "data/val/x", tmp_path / "project/data/train/x", tmp_path / "project/data/val/x"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
    (tmp_path / "project/w.bin").write_text("")
    monkeypatch.chdir(here)
    cfg = config.load("demo.yaml", [
        "data.train=data/train", "data.val=data/val", "tokenizer.weights=w.bin", "run.dir=data/train",
        "data.cache_dir=data/train", "~evaluate.reference", "evaluate.reference={a: data/train, b: data/none, c: w.bin}",
    ])  # fmt: skip
    lines = config.found_from(cfg, run, given={"evaluate.reference.c"})
    project = tmp_path.resolve() / "project"
    assert (cfg.data.train, cfg.data.val) == (f"{project}/data/train", "data/val")
    assert cfg.tokenizer.weights == f"{project}/w.bin"
    assert cfg.evaluate.reference == {"a": f"{project}/data/train", "b": "data/none", "c": "w.bin"}
    assert (cfg.run.dir, cfg.data.cache_dir) == ("data/train", "data/train")
    assert lines == [
        f"taken from {project}, as they are not here: tokenizer.weights=w.bin, data.train=data/train, "
        "evaluate.reference.a=data/train"
    ]
