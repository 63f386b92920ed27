"""Checks of a config that comes from a checkpoint's meta.json or the header of a weight file, which is untrusted input.

It may describe the model and name local files. It may not interpolate, and values that name a command, a URL or an output
folder outside of the current one are dropped; a command that needs such a value asks for the field by name.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from rear_scale.config.errors import InputError
from rear_scale.config.fields import declarations
from rear_scale.config.schema import ExperimentConfig, RunConfig

_DEEPEST = 8  # levels of nested sections; ours have four
_LONGEST_TEXT = 4096  # characters, as a path has at most
_LARGEST = 2**63  # whole numbers have 64 bits
_MOST_VALUES = 60_000  # in all; ours have some two hundred, and sample.labels may list one for each of 50,000 images
_REMOTE_FIELDS = ("train", "val")  # of data: the only fields that may be a command or a URL


def is_remote(folder: object) -> bool:
    """Whether a folder of shards is a URL or a `pipe:` command."""
    return str(folder).startswith("pipe:") or "://" in str(folder)


def taken(values: Any, source: str) -> dict[str, Any]:
    """The values of a config from a file, without those that name commands, URLs or output folders elsewhere.

    Raises InputError, naming the file and the field, for values that are no config, for an interpolation, and for values
    beyond the limits of a config of ours.
    """
    _check_values(values, "config", source, count=iter(range(_MOST_VALUES)))
    allowed = {name: dict(section) if isinstance(section, dict) else section for name, section in values.items()}
    data, run, train = (allowed.get(name) for name in ("data", "run", "train"))
    if isinstance(data, dict):
        remote = [name for name in _REMOTE_FIELDS if is_remote(data.get(name, ""))]
        data.update(dict.fromkeys(remote))
        if "val" in remote and isinstance(train, dict):
            train["val_every"] = None  # it needs data.val
    if isinstance(run, dict) and not _is_inside(run.get("dir")):
        # The default of a run that does not set it, below the current folder.
        name = run.get("name")
        run["dir"] = f"runs/{name if _is_name(name) else RunConfig.name}"
    evaluate = allowed.get("evaluate")
    if isinstance(evaluate, dict) and isinstance(classifier := evaluate.get("classifier"), dict):
        weights = classifier.get("weights")
        if not _is_inside(weights) and not _is_file(weights):
            evaluate["classifier"] = None  # a missing classifier would be trained and written to that path
    for sink in (allowed.get(name) for name in ("wandb", "tensorboard")):
        if isinstance(sink, dict) and "mode" in sink:
            sink["mode"] = "disabled"
    return allowed


def found_from(cfg: ExperimentConfig, folder: Path, given: Collection[str]) -> list[str]:
    """Resolves relative paths of input files that exist not from the current folder, but from the run folder or a parent of it.

    They occur when the config was saved by a command in another folder. Returns one line for the user per folder. folder: the
    run folder. given: the dotted keys that the user has set, whose paths are not changed.
    """
    bases = [base for base in (folder.resolve(), *folder.resolve().parents) if base != base.parent]
    by_base: dict[Path, list[str]] = {}
    for key, own in declarations(ExperimentConfig).items():
        if not own.reads or key in given:
            continue
        *sections, name = key.split(".")
        section: Any = cfg
        for one in sections:
            section = getattr(section, one, None)
        value = getattr(section, name, None)
        paths, labels = (value, f"{key}.") if isinstance(value, dict) else ({name: value}, "")
        for entry, text in paths.items():
            label = f"{labels}{entry}" if labels else key
            if label in given or not isinstance(text, str) or (base := _base_of(text, bases)) is None:
                continue
            by_base.setdefault(base, []).append(f"{label}={text}")
            if isinstance(value, dict):
                value[entry] = str(base / text)
            else:
                setattr(section, name, str(base / text))
    return [f"taken from {base}, as they are not here: {', '.join(settings)}" for base, settings in by_base.items()]


def _base_of(text: str, bases: Iterable[Path]) -> Path | None:
    """The first of some folders in which a relative path exists; None where it exists in the current folder, or in none."""
    if text.startswith(("/", "~")) or is_remote(text) or os.path.exists(text):
        return None
    return next((base for base in bases if os.path.exists(base / text)), None)


def _is_inside(folder: Any) -> bool:
    """Whether a folder lies below the current one, by its name."""
    return (
        isinstance(folder, str)
        and folder != ""
        and not folder.startswith(("/", "~"))  # a leading ~/ is the home folder
        and ".." not in PurePosixPath(folder).parts
    )


def _is_file(path: Any) -> bool:
    return isinstance(path, str) and "\0" not in path and os.path.isfile(path)


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name


def _check_values(values: Any, key: str, source: str, count: Iterator[int], depth: int = 0) -> None:
    if next(count, None) is None:
        raise _refusal(f"its config has more than {_MOST_VALUES:,} values", source)
    if isinstance(values, dict) and depth < _DEEPEST:
        for name, value in values.items():
            if not isinstance(name, str) or not name.isprintable():
                raise _refusal(f"{key} has the key {name!a:.60}, which is not a name", source)
            _check_values(value, name if depth == 0 else f"{key}.{name}", source, count, depth + 1)
        return
    if depth == 0:
        raise _refusal(f"the config is {values!a:.60}, not sections by name", source)
    if isinstance(values, list) and depth < _DEEPEST:
        for value in values:
            _check_values(value, key, source, count, depth + 1)
    elif isinstance(values, str):
        _check_text(values, key, source)
    elif isinstance(values, float) and not math.isfinite(values):
        raise _refusal(f"{key}={values} is not finite", source)
    elif isinstance(values, int) and not -_LARGEST <= values < _LARGEST:
        raise _refusal(f"{key} is a number beyond 64 bits", source)
    elif not isinstance(values, (int, float, type(None))):
        raise _refusal(f"{key} is nested too deeply", source)


def _check_text(text: str, key: str, source: str) -> None:
    if "${" in text:
        raise _refusal(
            f"{key}={text!a:.80} is a reference (${{...}}), which a config that comes with weights must not contain",
            source,
        )
    if len(text) > _LONGEST_TEXT or not text.isprintable():
        raise _refusal(f"{key}={text!a:.60} is not a text of one line with at most {_LONGEST_TEXT} characters", source)


def _refusal(what: str, source: str) -> InputError:
    return InputError(f"{source}: {what}. Use another file, or mend its config")
