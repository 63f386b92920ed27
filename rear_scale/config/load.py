"""From files and overrides to a typed config: Hydra composes, every wrong key or type becomes one clear line."""

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

# The decode head of reAR sits at three quarters of the depth, whatever the depth (section 4.1).
OmegaConf.register_new_resolver(
    "three_quarters_of", lambda depth, more=0: int(depth) * 3 // 4 + int(more), replace=True
)


def load(config: str, overrides: list[str] | tuple[str, ...] = ()) -> ExperimentConfig:
    """The validated config of a file in `configs/` (or any path) with Hydra-style overrides applied in order.

    Raises InputError for an unknown file, key or group, a wrong type, and every rule of `validate`.
    """
    path = find_config(config)
    parsed = [check_override(text) for text in overrides]
    values, composed = _compose(path, {item.key: item.value for item in parsed if item.is_group})
    cfg = _typed(_overridden(values, parsed, composed), parsed, str(path), own_keys(_text_of(path)))
    # Null only in the config of a checkpoint: where the set was remote.
    if cfg.data.train is None:
        raise InputError(f"data.train is null in {path} or on the command line. Set it to a folder: data.train=PATH")
    return cfg


def given_keys(config: str, overrides: list[str] | tuple[str, ...] = ()) -> frozenset[str]:
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
    """What configs/figure/NAME.yaml itself says about sampling, as overrides for the config of any checkpoint.

    Raises InputError for an unknown name.
    """
    known = sorted(path.stem for path in (CONFIG_DIR / "figure").glob("*.yaml"))
    if name not in known:
        raise InputError(f"--figure {name} is not one of {', '.join(known)}. Use one of them{suggest(name, known)}")
    own = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / "figure" / f"{name}.yaml"))
    assert isinstance(own, dict)
    return [f"{key}={value}" for key, value in leaves({"sample": own["sample"]}).items()]


def from_dict(values: dict[str, Any], source: str, overrides: list[str] | tuple[str, ...] = ()) -> ExperimentConfig:
    """The validated config of plain values, as `to_dict` gives them, with overrides applied in order.

    `source` is named in errors. Raises InputError as `load` does.
    """
    parsed = [check_override(text) for text in overrides]
    return _typed(_overridden(OmegaConf.create(values), parsed, set()), parsed, source)


def from_file(values: Any, source: str, overrides: list[str] | tuple[str, ...] = ()) -> ExperimentConfig:
    """The validated config of values that came with a file (see arrived.py), with the user's overrides applied in order.

    `source` is the file. Raises InputError as `load` does, and for values that no such config may hold.
    """
    found = upgraded(arrived.taken(values, source))
    try:
        return from_dict(found, source, overrides)
    except InputError as error:
        if source in str(error):
            raise
        # The file is named where it is the file that is wrong, not the command line.
        try:
            from_dict(found, source)
        except InputError as own:
            if str(own) == str(error):
                raise InputError(f"{source}: {error}") from None
        raise


def _compose(path: Path, groups: dict[str, str]) -> tuple[DictConfig, set[str]]:
    """The values of a file with the groups of its defaults list, and which of `groups` that list has."""
    ours = path.is_relative_to(CONFIG_DIR)
    folder, name = (CONFIG_DIR, path.relative_to(CONFIG_DIR)) if ours else (path.parent, Path(path.name))
    text = _text_of(path)
    check_yaml(text, str(path))
    if (kind := _not_a_mapping(text)) is not None:
        raise InputError(
            f"{path} is no config: its YAML is {kind}, not sections with fields. Write them as in {CONFIG_DIR}"
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
    """The plain values of a file, not to be changed, and which of `groups` its defaults list has.

    texts: of all files that it may be composed of, which thereby are part of what is looked up.
    """
    # In quotes: the folder may have any name.
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
            # Such as the config.yaml of a run folder, which has its sections written out.
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
                f"{path}: its defaults lead back to themselves, since {', '.join(here) or 'a file'} in {folder} takes the place "
                "of the one in configs/. Rename it"
            ) from None
        except yaml.MarkedYAMLError as error:
            place = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
            raise InputError(f"{path} is not valid YAML ({place}{_one_line(error.problem)}). Correct it") from error
        except Exception as error:
            # Hydra reads a defaults list of wrong types without checks, so its errors are of all kinds.
            raise InputError(f"{path} cannot be read as a config: {_one_line(error)}") from error
        else:
            return OmegaConf.to_container(values, resolve=False), tuple(listed)


def _not_a_mapping(text: str) -> str | None:
    """What a YAML text holds in place of keys and values; None where it holds them, or nothing, or is no YAML."""
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    return (
        None if found is None or isinstance(found, dict) else "a list" if isinstance(found, list) else "a single value"
    )


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason}). Save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _overridden(values: DictConfig, overrides: list[Override], composed: set[str]) -> dict[str, Any]:
    """Values with overrides in their order. composed: groups that the values have the chosen file of already, so that what
    their own file says of it stays where the choice says nothing."""
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
                f"{key}={shown(str(value))} cannot be set: {_one_line(error)}. Keys of the config stand in braces whole, as in "
                "${run.name}"
            ) from None
    return OmegaConf.to_container(values, resolve=False)


def _remove(values: DictConfig, key: str) -> None:
    """Removes an entry of a field with named entries. Raises InputError where there is none of that name."""
    section, _, name = key.rpartition(".")
    entries = OmegaConf.select(values, section)
    if not isinstance(entries, DictConfig) or name not in entries:
        known = [str(one) for one in entries] if isinstance(entries, DictConfig) else []
        listed = f"It has {', '.join(known)}" if known else f"{section} has no entries"
        raise InputError(f"~{key}: there is no such entry{suggest(name, known) or '.'} {listed}")
    del entries[name]


def _without_nulls(values: Any, kind: Any) -> Any:
    """Values without the entries of fields with named entries that are null: nulls drop what an earlier file has set."""
    plain = strip_optional(kind)
    if is_map(kind) and values is None and plain is kind:
        return {}
    if not isinstance(values, dict):
        return values
    if is_map(kind):
        entry = get_args(plain)[1]
        kept = values if entry is Any else {name: one for name, one in values.items() if one is not None}
        return {name: _without_nulls(one, entry) for name, one in kept.items()}
    if not dataclasses.is_dataclass(plain):
        return values
    return {name: _without_nulls(one, hints(plain).get(name, Any)) for name, one in values.items()}


def _typed(
    values: dict[str, Any], overrides: list[Override], source: str, own: frozenset[str] = frozenset()
) -> ExperimentConfig:
    """own: dotted keys that the user's file sets itself, beside those of the overrides."""
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
    geometry.complete(cfg.tokenizer, values.get("tokenizer", {}), own | overridden)
    for key, value in leaves(to_dict(cfg)).items():
        # It would be taken for a key of the config when this one is saved and read again.
        if isinstance(value, str) and "${" in value:
            raise InputError(
                f"{key}={value} in {source} has a ${{, which no name or path of a run may have. Rename it, or link to it"
            )
    validate(cfg)
    return cfg


@cache
def _schema() -> DictConfig:
    """The schema as OmegaConf has it, which takes longer to make than all else of a config; `merge` copies it."""
    return OmegaConf.structured(ExperimentConfig)


def _check_values(values: dict[Any, Any], kind: Any, section: str, source: str) -> None:
    """Raises InputError for the first unknown key, and for values that the schema would take for something else."""
    for name, value in values.items():
        if not isinstance(name, str) or ("." in name and dataclasses.is_dataclass(kind)):
            raise InputError(
                f"{shown(str(name))}{f' in {section}' if section else ''} of {source} is not a config key. Sections are nested, "
                "one level of indentation each"
            )
        _check_value(f"{section}.{name}" if section else name, value, entry_type(kind, name, section), source)


def _check_value(key: str, value: Any, kind: Any, source: str) -> None:
    plain = strip_optional(kind)
    if isinstance(value, dict) and (dataclasses.is_dataclass(plain) or get_origin(plain) is dict):
        _check_values(value, plain, key, source)
    elif dataclasses.is_dataclass(plain) and not (value is None and plain is not kind):
        raise InputError(
            f"{key}={'null' if value is None else shown(str(value))} in {source} is a single value, but {key} is a section. "
            f"Set its fields: {key}.FIELD=VALUE"
        )
    elif isinstance(value, list) and get_origin(plain) is list:
        for i, item in enumerate(value):
            _check_value(f"{key}[{i}]", item, get_args(plain)[0], source)
    elif key.endswith("]") and (value is None or isinstance(value, (dict, list))):
        # OmegaConf lets them pass.
        raise InputError(
            f"{key}={'null' if value is None else shown(str(value))} in {source} is of the wrong type: it takes "
            f"{type_name(kind)}. Write one value"
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
        raise InputError(f"{key}={value} in {source} is of the wrong type: it takes {type_name(kind)}. Write a number")
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
        return f"{key}={value} refers to what is not there ({_one_line(error)}). {way_out}"
    kind = field_type(re.sub(r"\[.*?\]", "", key))
    if key.endswith("]"):
        (kind,) = get_args(strip_optional(kind))
    return f"{key}={value} is of the wrong type: it takes {type_name(kind)}. {way_out}"


def find_config(config: str) -> Path:
    """The file that --config means: one here, or one in configs/. Raises InputError when there is none."""
    places = (Path(config), CONFIG_DIR / config, CONFIG_DIR / f"{config}.yaml")
    for path in places:
        if path.is_file() and path.suffix == ".yaml":
            return path.resolve()
    for path in places:
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
    known = sorted(p.relative_to(CONFIG_DIR).as_posix() for pattern in folders for p in CONFIG_DIR.glob(pattern))
    listed = [name for name in known if not name.startswith("ablation/")]
    raise InputError(
        f"--config {config}: no such file here or in {CONFIG_DIR}{suggest(config, known)} "
        f"Known configs: {', '.join(listed)}, and those in ablation/"
    )


def _one_line(error: Exception | str) -> str:
    return shown(" ".join(str(error).split("\n")[0].split()).rstrip("."))


def _name_reference(values: dict[str, Any]) -> None:
    """A path in place of evaluate.reference is one reference of that name."""
    evaluate = values.get("evaluate")
    path = evaluate.get("reference") if isinstance(evaluate, dict) else None
    if isinstance(path, str):
        values["evaluate"]["reference"] = {Path(path).stem: path}


def _keep_one_length(values: dict[str, Any], overridden: set[str]) -> None:
    """An override of train.epochs or train.total_steps replaces the other one; both in one place are an error."""
    train = values.get("train")
    if not isinstance(train, dict):
        return
    given = {key for key in ("epochs", "total_steps") if f"train.{key}" in overridden}
    if len(given) == 1:
        other = ({"epochs", "total_steps"} - given).pop()
        train[other] = None
    if train.get("epochs") is not None and train.get("total_steps") is not None:
        raise InputError(
            f"train.epochs={train['epochs']} and train.total_steps={train['total_steps']} are both set: "
            "the length of a run is one of them. Remove one"
        )
