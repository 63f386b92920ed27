"""Fixed random inputs for all that reads configs: a valid config or one line of InputError, in bounded time and memory."""

from __future__ import annotations

import contextlib
import copy
import random
import re
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_trainer_yaml import FORMS

from rear_scale import config
from rear_scale.checkpoint import released_config as published
from rear_scale.config import InputError, check_override, check_yaml
from rear_scale.config.overrides import field_type
from rear_scale.config.values import leaves

SLOWEST_S = 20.0  # of one input, in CPU time
MOST_MEMORY = 1 << 30  # bytes that a whole test may add
DEMO = config.to_dict(config.load("demo.yaml"))
KEYS = list(leaves(DEMO))
ALPHABET = [
    *"ab1.0-+_~=,:;()[]{}'\"\\ $#%@!&|<>*?/\t\n\0é数\udcff\u2028", "${", "${run.name}", "${oc.env:HOME}", "null", "None", "true",
    "1e5", "nan", "inf", "9" * 40, "choice(", "range(", "!!python/object:os.system", "&a", "*a", "<<", "???", "- ", "? ", "---",
    "...", "1_0", "0x1", "~/", "defaults", "hydra", "_self_", "override /",
]  # fmt: skip
SUITABLE = [
    "1",
    "2",
    "0.5",
    "true",
    "null",
    "x",
    "[1,2]",
    "0.9,0.95",
    "{a: b}",
    "1e-4",
    "10000000",
    "-1",
    "${model.depth}",
]
MARKS, EQUALS = [*[""] * 5, "+", "~"], [*["="] * 5, " = ", ""]
VALUES: list[Any] = [
    None, True, -1, 0, 1, 1.5, 10**30, -(10**400), float("nan"), float("inf"), "", "x", "1e-4", "${run.name}", "${nothing}", "${",
    "${oc.env:HOME}", "???", [], [1], ["a", None], {}, {"a": 1}, {1: 2}, {None: 1}, {"a.b": 1}, [[[]]], "é\n", "x" * 5000,
    "null", "1" * 5000,
]  # fmt: skip


def text_of(rng: random.Random, longest: int = 12) -> str:
    return "".join(rng.choice(ALPHABET) for _ in range(rng.randrange(longest)))


def overrides(rng: random.Random) -> Iterator[str]:
    while True:
        key = (
            rng.choice(KEYS)
            if rng.random() < 0.8
            else rng.choice(["strategy", "model", "data", text_of(rng), "evaluate.reference.x"])
        )
        yield (
            rng.choice(["", "", "", "", "", "+", "~"])
            + key
            + rng.choice(["=", "=", "=", "=", "=", " = ", ""])
            + text_of(rng)
        )


def accepted(rng: random.Random) -> Iterator[str]:
    """Overrides that can be read, most of them with a value that suits some field."""
    for text in overrides(rng):
        key, _, _ = text.partition("=")
        for given in (text, f"{key}={rng.choice(SUITABLE)}"):
            with contextlib.suppress(InputError):
                check_override(given)
                yield given


def set_at_random(rng: random.Random, values: dict[str, Any]) -> dict[str, Any]:
    """A copy with a few values, sections or keys of other types."""
    found = copy.deepcopy(values)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        section: Any = found
        while True:
            name = rng.choice([*section, text_of(rng, 4)])
            inner = section.get(name)
            if not isinstance(inner, dict) or not inner or rng.random() < 0.2:
                break
            section = inner
        section[name] = rng.choice(VALUES)
    return found


def edited(rng: random.Random, text: str) -> str:
    """A text with pieces cut out, doubled or put in."""
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        start = rng.randrange(len(text) + 1)
        end = min(len(text), start + rng.randrange(20))
        text = text[:start] + rng.choice(["", text[start:end] * 2, text_of(rng, 4)]) + text[end:]
    return text


def bombs(rng: random.Random) -> str:
    levels, width = rng.randint(2, 40), rng.randint(2, 12)
    kind = rng.randrange(6)
    if kind == 0:
        lines = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels)]
        return "\n".join(lines)
    if kind == 1:
        lines = ["a0: &a0 {x: 1}"] + [
            f"a{i}: &a{i} {{{','.join(f'b{j}: *a{i - 1}' for j in range(width))}}}" for i in range(1, levels)
        ]
        return "\n".join(lines)
    if kind == 2:
        return rng.choice("[{") * rng.choice([10, 1000, 100_000])
    if kind == 3:
        return "\n".join("  " * i + f"k{i}:" for i in range(rng.choice([10, 200, 900])))
    if kind == 4:
        return "a: &a [*a]\nb: {<<: *a}"
    return "run: {name: " + "9" * rng.choice([10, 5000, 100_000]) + "}"


def dumped(values: dict[str, Any]) -> str:
    """As YAML, with 4e-4 as its authors write it: PyYAML takes that for a text, and quotes it."""
    return re.sub(r"'([0-9_]+(?:e-?[0-9]+)?)'", r"\1", yaml.safe_dump(values, allow_unicode=True))


def yaml_texts(rng: random.Random, released: bool) -> Iterator[bytes]:
    forms: list[Any] = (
        list(FORMS.values()) if released else [DEMO, {"defaults": ["demo", "_self_"], "optim": {"lr": 1e-3}}]
    )
    model = "\nmodel: {generator: {hidden_size: 8}}" if released else ""
    while True:
        draw = rng.random()
        if draw < 0.45:
            text = dumped(set_at_random(rng, rng.choice(forms)))
        elif draw < 0.85:
            text = edited(rng, dumped(rng.choice(forms)))
        elif draw < 0.95:
            text = bombs(rng) + model
        else:
            text = text_of(rng, 60) + model
        yield text.encode("utf-8", "surrogatepass")


def outcome(read: Callable[[], Any]) -> bool:
    """Whether a valid config came back; any other exception than InputError, or a slow answer, is a failure."""
    started = time.process_time()
    try:
        found = read()
    except InputError as error:
        found = None
        text = str(error)
    else:
        text = ""
    assert time.process_time() - started < SLOWEST_S
    assert text.isprintable()
    assert len(text) < 10_000
    return found is not None


def run(count: int, draw: Iterator[Any], read: Callable[[Any], Any]) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    taken = 0
    for _ in range(count):
        given = next(draw)
        try:
            taken += outcome(lambda given=given: read(given))
        except Exception as error:
            raise AssertionError(f"{type(error).__name__} for {given!r:.2000}") from error
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_MEMORY
    print(f"{count} inputs, {taken} valid")
    return taken


def read_file(folder: Path) -> Callable[[bytes], Any]:
    def read(content: bytes) -> Any:
        path = folder / "mine.yaml"
        path.write_bytes(content)
        if published.is_released_yaml(path):
            return published.config_of_yaml(path)
        return config.load(str(path))

    return read


def fuzz(folder: Path, seed: int, parsed: int, composed: int, ours: int, released: int) -> None:
    rng = random.Random(seed)
    assert run(parsed, overrides(rng), check_override)
    run(composed, accepted(rng), lambda text: config.from_dict(DEMO, "demo", [text]))
    run(ours, yaml_texts(rng, released=False), read_file(folder))
    run(released, yaml_texts(rng, released=True), read_file(folder))


def test_random_overrides_and_files_end_in_a_config_or_one_line(tmp_path: Path) -> None:
    fuzz(tmp_path, 0, 200, 4, 4, 6)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 3))
def test_many_random_overrides_and_files_end_in_a_config_or_one_line(tmp_path: Path, seed: int) -> None:
    fuzz(tmp_path, seed, 3500, 200, 300, 350)


@pytest.mark.parametrize("seed", range(3))
def test_bombs_are_refused_before_anything_is_built(seed: int) -> None:
    """check_yaml alone bounds them; what passes is small enough to build."""
    rng = random.Random(seed)
    for _ in range(100):
        text = bombs(rng)
        started = time.process_time()
        with contextlib.suppress(InputError):
            check_yaml(text, "file")
            assert len(yaml.safe_dump(yaml.safe_load(text)) if text.startswith("a0") else "") < 5_000_000
        assert time.process_time() - started < SLOWEST_S


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: &a0 [x]\n" + "\n".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)), "once its aliases"),
        ("run: " + "[" * 1000, "nested more than"),
        ("run: &a {name: *a}", "is inside the value that it refers to"),
        ("run: {name: " + "x" * (2 << 20) + "}", "has 2,097,1"),
        ("run: {seed: " + "9" * 5000 + "}", "cannot be read as a config"),
        ("run: {seed: " + "9" * 100 + "}", "more than 30 digits"),
        ("run: {name: '${run.dir}${run.dir}', dir: '" + "${data.train}" * 99 + "'}\ndata: {train: '" + "${data.val}" * 99 + "'}",
         "too many values refer to several others"),
        ("defaults: 3", "cannot be read as a config"),
        ("defaults: [{model: [1]}]", "cannot be read as a config"),
        ("optim.lr: 3", "Sections are nested"),
        ("1: 2", "is not a config key"),
        ("run: {name: \"a\\nb\"}", "has control characters"),
        ("train: !!python/object:os.system {}", "is not valid YAML"),
    ],
)  # fmt: skip
def test_hostile_files_are_one_line(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text if text.startswith("defaults") else f"defaults: [demo, _self_]\n{text}", encoding="utf-8")
    with pytest.raises(InputError) as caught:
        config.load(str(path))
    assert expected in str(caught.value)
    assert str(caught.value).isprintable()


def test_every_field_of_the_schema_has_a_kind_that_overrides_are_read_by() -> None:
    for key in KEYS:
        assert field_type(key) is not None
