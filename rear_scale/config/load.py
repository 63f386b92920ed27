"""Loading of a typed config from files and overrides: Hydra composes them, and a wrong key or type is an InputError."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from rear_scale.config import arrived, geometry
from rear_scale.config.bounds import MOST_DIGITS, check_references, check_yaml
from rear_scale.config.defaults import own_keys, texts_composed
from rear_scale.config.errors import InputError
from rear_scale.config.fields import suggest
from rear_scale.config.overrides import (
    CONFIG_DIR,
    LONGEST_TEXT,
    Override,
    check_override,
    entry_type,
    field_type,
    hints,
    is_entry,
    is_map,
    shown,
    strip_optional,
    type_name,
)
from rear_scale.config.renamed import upgraded
from rear_scale.config.schema import ExperimentConfig
from rear_scale.config.validate import validate
from rear_scale.config.values import leaves, to_dict

# YAML files in configs/ that are no experiments.
NO_EXPERIMENTS = ("claims.yaml", "published.yaml")

# The decode head of reAR sits at three quarters of the depth, whatever the depth (section 4.1).
OmegaConf.register_new_resolver(
    "three_quarters_of", lambda depth, more=0: int(depth) * 3 // 4 + int(more), replace=True
)


def load(config: str, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """The validated config of a file in `configs/` (or any path) with Hydra-style overrides applied in order.

    Raises InputError for an unknown file, key or group, a wrong type, and every rule of `validate`.
    """
    path = find_config(config)
    parsed = [check_override(text) for text in overrides]
    values, composed = _compose(path, {item.key: item.value for item in parsed if item.is_group})
    cfg = _typed(_overridden(values, parsed, composed), parsed, str(path), own_keys(_text_of(path)))
    # None is for the config of a checkpoint whose shards were remote.
    if cfg.data.train is None:
        raise InputError(f"data.train is null in {path} or on the command line. Set it to a folder: data.train=PATH")
    return cfg


def given_keys(config: str, overrides: Sequence[str] = ()) -> frozenset[str]:
    """The dotted keys that the user sets: on the command line, and in files outside configs/ or the named one of configs/.

    Not those of the files of configs/ that it is composed of. Raises InputError for an unknown file and a wrong override.
    """
    path, keys = find_config(config), override_keys(overrides)
    if path.is_relative_to(CONFIG_DIR):
        return own_keys(_text_of(path)) | keys
    groups = [(item.key, item.value) for item in map(check_override, overrides) if item.is_group]
    for name, (text, *_) in texts_composed([path.parent], path.stem, groups) or (
        (path.stem, (_text_of(path).encode(),)),
    ):
        section = name.rpartition("/")[0].replace("/", ".")  # of a file such as model/mine.yaml
        keys |= {f"{section}.{key}" if section else key for key in own_keys((text or b"").decode(errors="replace"))}
    return keys


def override_keys(overrides: Sequence[str]) -> frozenset[str]:
    """The dotted keys that overrides set; not those of the file of a group. Raises InputError for a wrong override."""
    parsed = [check_override(text) for text in overrides]
    return frozenset(key for item in parsed if not item.is_group for key in leaves({item.key: item.value}))


def figure_overrides(name: str) -> list[str]:
    """The sampling settings of configs/figure/NAME.yaml, as overrides for the config of any checkpoint.

    Raises InputError for an unknown name.
    """
    known = sorted(path.stem for path in (CONFIG_DIR / "figure").glob("*.yaml"))
    if name not in known:
        raise InputError(f"--figure {name} is not one of {', '.join(known)}. Use one of them{suggest(name, known)}")
    own = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / "figure" / f"{name}.yaml"))
    assert isinstance(own, dict)
    return [f"{key}={value}" for key, value in leaves({"sample": own["sample"]}).items()]


def from_dict(values: dict[str, Any], source: str, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """The validated config of nested plain values, as `to_dict` returns them, with overrides applied in order.

    `source` is named in errors. Raises InputError as `load` does.
    """
    parsed = [check_override(text) for text in overrides]
    return _typed(_overridden(OmegaConf.create(values), parsed, set()), parsed, source)


def from_file(values: Any, source: str, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """The validated config of values that come from a weight file or checkpoint (see arrived.py), with the user's overrides.

    `source` is the file. Raises InputError as `load` does, and for values that no such config may hold.
    """
    allowed = upgraded(arrived.taken(values, source))
    try:
        return from_dict(allowed, source, overrides)
    except InputError as error:
        if source in str(error):
            raise
        # The same error without the overrides: the file is wrong, not the command line. Name the file then.
        try:
            from_dict(allowed, source)
        except InputError as own:
            if str(own) == str(error):
                raise InputError(f"{source}: {error}") from None
        raise


def _compose(path: Path, groups: dict[str, str]) -> tuple[DictConfig, set[str]]:
    """The values of a file with its defaults list composed, and the names of those of `groups` that the list has."""
    is_ours = path.is_relative_to(CONFIG_DIR)
    folder, name = (CONFIG_DIR, path.relative_to(CONFIG_DIR)) if is_ours else (path.parent, Path(path.name))
    text = _text_of(path)
    check_yaml(text, str(path))
    if (form := _not_a_mapping(text)) is not None:
        raise InputError(
            f"{path} is not a config: its YAML is {form}, not sections with fields. Write them as in {CONFIG_DIR}"
        )
    chosen = tuple(groups.items())
    texts = texts_composed(dict.fromkeys((folder, CONFIG_DIR)), name.with_suffix("").as_posix(), chosen)
    compose_once = _composed if texts is not None else _composed.__wrapped__
    values, listed = compose_once(path, folder, name, chosen, texts)
    return OmegaConf.create(upgraded(values) if _is_of_a_run(path) else values), set(listed)


def _is_of_a_run(path: Path) -> bool:
    """Whether a file is the config.yaml that a run has written into its folder, beside its list of starts."""
    return path.name == "config.yaml" and (path.parent / "starts.jsonl").is_file()


@lru_cache(maxsize=256)  # a study of many runs loads one file again and again, with other overrides
def _composed(
    path: Path, folder: Path, name: Path, groups: tuple[tuple[str, str], ...], texts: object
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The plain values of a file, which the caller must not change, and the names of those of `groups` in its defaults list.

    texts: the texts of all files that it may be composed of; part of the cache key, so that an edited file is read again.
    """
    # Quoted, because a folder may have any name.
    search = (
        [] if folder == CONFIG_DIR else ["hydra.searchpath=['file://{}']".format(str(CONFIG_DIR).replace("'", "\\'"))]
    )
    listed = dict(groups)
    while True:
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(str(folder), version_base="1.3"):
                chosen = [f"{group}={choice}" for group, choice in listed.items()]
                values = compose(name.with_suffix("").as_posix(), overrides=search + chosen)
        except ConfigCompositionException as error:
            # The file has the section itself and not in its defaults list, as the config.yaml of a run folder.
            unlisted = re.match(r"Could not override '(\w+)'", str(error))
            if unlisted is None or listed.pop(unlisted[1], None) is None:
                raise InputError(f"{path}: {_one_line(error)}") from error
        except RecursionError:
            here = sorted(
                file.name
                for file in folder.glob("*.yaml")
                if folder != CONFIG_DIR and (CONFIG_DIR / file.name).is_file()
            )
            raise InputError(
                f"{path}: its defaults list includes itself, because {', '.join(here) or 'a file'} in {folder} hides the file of "
                "that name in configs/. Rename it"
            ) from None
        except yaml.MarkedYAMLError as error:
            place = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
            raise InputError(
                f"{path} is not valid YAML ({place}{_one_line(error.problem or error)}). Correct it"
            ) from error
        except Exception as error:
            # Hydra does not check the types in a defaults list, so a wrong one raises any kind of error.
            raise InputError(f"{path} cannot be read as a config: {_one_line(error)}") from error
        else:
            return _plain(values), tuple(listed)


def _plain(values: DictConfig) -> dict[str, Any]:
    """The values as dicts and lists, with references (${KEY}) as they are written."""
    plain: Any = OmegaConf.to_container(values, resolve=False)
    assert isinstance(plain, dict), type(plain)
    return plain


def _not_a_mapping(text: str) -> str | None:
    """The type of a YAML text's content in words; None for keys and values, for an empty text and for invalid YAML."""
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    return (
        None
        if content is None or isinstance(content, dict)
        else "a list"
        if isinstance(content, list)
        else "a single value"
    )


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason}). Save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _overridden(values: DictConfig, overrides: list[Override], composed: set[str]) -> dict[str, Any]:
    """The values with overrides applied in order.

    composed: groups whose chosen file is part of the values already. Such a choice is merged, so that fields that the config
    file sets itself and the chosen file does not are kept.
    """
    for override in overrides:
        key, value = override.key, override.value
        try:
            if override.is_group:
                group = OmegaConf.load(CONFIG_DIR / key / f"{value}.yaml")
                OmegaConf.update(values, key, group, merge=key in composed, force_add=True)
            elif override.removes:
                _remove(values, key)
            elif value == {} or (value is None and is_map(field_type(key)) and not is_entry(key)):
                OmegaConf.update(values, key, {}, merge=False, force_add=True)
            else:
                OmegaConf.update(values, key, value, merge=isinstance(value, dict), force_add=True)
        except OmegaConfBaseException as error:
            raise InputError(
                f"{key}={shown(str(value))} cannot be set: {_one_line(error)}. References to other keys are written as "
                "${run.name}"
            ) from None
    return _plain(values)


def _remove(values: DictConfig, key: str) -> None:
    """Removes an entry of a field with named entries. Raises InputError for an unknown name."""
    section, _, name = key.rpartition(".")
    entries = OmegaConf.select(values, section)
    if not isinstance(entries, DictConfig) or name not in entries:
        known = [str(one) for one in entries] if isinstance(entries, DictConfig) else []
        listed = f"It has {', '.join(known)}" if known else f"{section} has no entries"
        raise InputError(f"~{key}: there is no such entry{suggest(name, known) or '.'} {listed}")
    del entries[name]


def _without_nulls(values: Any, annotation: Any) -> Any:
    """The values without null entries of fields with named entries: null removes an entry that an earlier file sets."""
    plain = strip_optional(annotation)
    if is_map(annotation) and values is None and plain is annotation:
        return {}
    if not isinstance(values, dict):
        return values
    if is_map(annotation):
        entry = get_args(plain)[1]
        kept = values if entry is Any else {name: one for name, one in values.items() if one is not None}
        return {name: _without_nulls(one, entry) for name, one in kept.items()}
    if not (isinstance(plain, type) and dataclasses.is_dataclass(plain)):
        return values
    return {name: _without_nulls(one, hints(plain).get(name, Any)) for name, one in values.items()}


def _typed(
    values: dict[str, Any], overrides: list[Override], source: str, own: frozenset[str] = frozenset()
) -> ExperimentConfig:
    """The validated config of plain values. own: dotted keys that the user's file itself sets; `overrides` come on top."""
    overridden = {key for item in overrides for key in leaves({item.key: item.value})}
    values = _without_nulls(values, ExperimentConfig)
    _keep_one_length(values, overridden)
    _name_reference(values)
    _check_values(values, ExperimentConfig, "", source)
    check_references((value for value in leaves(values).values() if isinstance(value, str)), source)
    try:
        typed = OmegaConf.merge(_schema(), values)
        cfg = OmegaConf.to_object(typed)
    except OmegaConfBaseException as error:
        raise InputError(_wrong_value(error, values, source)) from None
    assert isinstance(cfg, ExperimentConfig), type(cfg)
    geometry.complete(cfg.tokenizer, values.get("tokenizer", {}), own | overridden)
    for key, value in leaves(to_dict(cfg)).items():
        # Saved and read again, it would be a reference to another key.
        if isinstance(value, str) and "${" in value:
            raise InputError(
                f"{key}={value} in {source} contains ${{, which a name or path of a run cannot contain. Rename it, or link to it"
            )
    validate(cfg)
    return cfg


@cache
def _schema() -> DictConfig:
    """The schema as an OmegaConf object. Cached: it takes longer to build than the rest of a config, and `merge` copies it."""
    return OmegaConf.structured(ExperimentConfig)


def _check_values(values: dict[Any, Any], annotation: Any, section: str, source: str) -> None:
    """Raises InputError for the first unknown key, and for a value that OmegaConf would silently convert."""
    for name, value in values.items():
        if not isinstance(name, str) or ("." in name and dataclasses.is_dataclass(annotation)):
            raise InputError(
                f"{shown(str(name))}{f' in {section}' if section else ''} of {source} is not a config key. Sections are nested, "
                "one level of indentation each"
            )
        _check_value(f"{section}.{name}" if section else name, value, entry_type(annotation, name, section), source)


def _check_value(key: str, value: Any, annotation: Any, source: str) -> None:
    plain = strip_optional(annotation)
    if isinstance(value, dict) and (dataclasses.is_dataclass(plain) or get_origin(plain) is dict):
        _check_values(value, plain, key, source)
    elif dataclasses.is_dataclass(plain) and not (value is None and plain is not annotation):
        raise InputError(
            f"{key}={'null' if value is None else shown(str(value))} in {source} is a single value, but {key} is a section. "
            f"Set its fields: {key}.FIELD=VALUE"
        )
    elif isinstance(value, list) and get_origin(plain) is list:
        for i, item in enumerate(value):
            _check_value(f"{key}[{i}]", item, get_args(plain)[0], source)
    elif key.endswith("]") and (value is None or isinstance(value, (dict, list))):
        # OmegaConf does not check these.
        raise InputError(
            f"{key}={'null' if value is None else shown(str(value))} in {source} is of the wrong type: it takes "
            f"{type_name(annotation)}. Write one value"
        )
    elif isinstance(value, str):
        if len(value) > LONGEST_TEXT or not value.isprintable():
            raise InputError(
                f"{key}={shown(value)} in {source} is too long, or has control characters. Write another value"
            )
    elif plain is str and isinstance(value, (bool, int, float)):
        raise InputError(
            f"{key}={value} in {source} is read as {'true or false' if isinstance(value, bool) else 'a number'}, but it is a "
            f"text. Put it in quotes there, as it is meant: {key.split('.')[-1]}: 'TEXT'"
        )
    elif plain in (int, float) and isinstance(value, bool):
        raise InputError(
            f"{key}={value} in {source} is of the wrong type: it takes {type_name(annotation)}. Write a number"
        )
    elif plain in (int, float) and isinstance(value, int) and abs(value) >= 10**MOST_DIGITS:
        raise InputError(f"{key} in {source} is a number of more than {MOST_DIGITS} digits. Write a smaller one")


def _wrong_value(error: OmegaConfBaseException, values: dict[str, Any], source: str) -> str:
    key = error.full_key or "?"
    way_out = f"Set {key} in {source} or on the command line"
    if "mandatory" in str(error):
        return f"{key} is not set in {source}. Set it there or on the command line: {key}=VALUE"
    value: Any = values
    for part in re.findall(r"[^.\[\]]+", key):
        value = value[int(part)] if isinstance(value, list) else value.get(part) if isinstance(value, dict) else None
    if isinstance(error, InterpolationResolutionError):
        return f"{key}={value} refers to a key that does not exist ({_one_line(error)}). {way_out}"
    annotation = field_type(re.sub(r"\[.*?\]", "", key))
    if key.endswith("]"):
        (annotation,) = get_args(strip_optional(annotation))
    return f"{key}={value} is of the wrong type: it takes {type_name(annotation)}. {way_out}"


def find_config(config: str) -> Path:
    """The file that --config names: in the current folder, else in configs/. Raises InputError when there is none."""
    candidates = (Path(config), CONFIG_DIR / config, CONFIG_DIR / f"{config}.yaml")
    for path in candidates:
        if path.is_file() and path.suffix == ".yaml":
            return path.resolve()
    for path in candidates:
        if path.exists():
            what, way_out = (
                f"no YAML file by its name ({path.suffix or 'without an ending'})",
                f"Rename it to {path.with_suffix('.yaml').name}",
            )
            if path.is_dir():
                what, way_out = "a folder", f"Name a file in it, such as {path / 'config.yaml'} of a run"
            raise InputError(
                f"--config {config} is there, but it is {what}: a config is named NAME.yaml. {way_out}; a run or "
                "a weight file is named with --checkpoint"
            )
    folders = ("*.yaml", "official/*.yaml", "ablation/*.yaml")
    found = (path for pattern in folders for path in CONFIG_DIR.glob(pattern) if path.name not in NO_EXPERIMENTS)
    known = sorted(path.relative_to(CONFIG_DIR).as_posix() for path in found)
    listed = [name for name in known if not name.startswith("ablation/")]
    raise InputError(
        f"--config {config}: no such file here or in {CONFIG_DIR}{suggest(config, known)} "
        f"Known configs: {', '.join(listed)}, and those in ablation/"
    )


def _one_line(error: Exception | str) -> str:
    return shown(" ".join(str(error).split("\n")[0].split()).rstrip("."))


def _name_reference(values: dict[str, Any]) -> None:
    """Replaces a single path in evaluate.reference by one reference, named after the file."""
    evaluate = values.get("evaluate")
    path = evaluate.get("reference") if isinstance(evaluate, dict) else None
    if isinstance(path, str):
        values["evaluate"]["reference"] = {Path(path).stem: path}


def _keep_one_length(values: dict[str, Any], overridden: set[str]) -> None:
    """Clears train.epochs where an override sets train.total_steps, and the reverse; both set in one place are an error."""
    train = values.get("train")
    if not isinstance(train, dict):
        return
    given = {key for key in ("epochs", "total_steps") if f"train.{key}" in overridden}
    if len(given) == 1:
        other = ({"epochs", "total_steps"} - given).pop()
        train[other] = None
    if train.get("epochs") is not None and train.get("total_steps") is not None:
        raise InputError(
            f"train.epochs={train['epochs']} and train.total_steps={train['total_steps']} are both set, "
            "but one of them alone sets the length of a run. Remove one"
        )
