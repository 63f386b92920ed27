"""From files and overrides to a typed config: Hydra composes, every wrong key or type becomes one clear line."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from rear_scale.config import arrived
from rear_scale.config.schema import ExperimentConfig, InputError
from rear_scale.config.validate import suggest, validate
from rear_scale.config.values import leaves

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"

# The decode head of reAR sits at three quarters of the depth, whatever the depth (section 4.1).
OmegaConf.register_new_resolver("three_quarters_of", lambda depth: int(depth) * 3 // 4, replace=True)


def load(config: str, overrides: list[str] | tuple[str, ...] = ()) -> ExperimentConfig:
    """The validated config of a file in `configs/` (or any path) with Hydra-style overrides applied in order.

    Raises InputError for an unknown file, key or group, a wrong type, and every rule of `validate`.
    """
    path = find_config(config)
    parsed = [check_override(text) for text in overrides]
    values, composed = _compose(path, {item.key_or_group: item.value() for item in parsed if _group_file(item)})
    cfg = _typed(_overridden(values, parsed, composed), parsed, str(path))
    # Null only in the config of a checkpoint: where the set was remote.
    if cfg.data.train is None:
        raise InputError(f"data.train is null in {path} or on the command line. Set it to a folder: data.train=PATH")
    return cfg


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
    found = arrived.taken(values, source)
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
    # In quotes: the folder may have any name.
    search = [] if ours else ["hydra.searchpath=['file://{}']".format(str(CONFIG_DIR).replace("'", "\\'"))]
    groups = dict(groups)
    while True:
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(str(folder), version_base="1.3"):
                chosen = [f"{group}={choice}" for group, choice in groups.items()]
                values = compose(name.with_suffix("").as_posix(), overrides=search + chosen)
        except ConfigCompositionException as error:
            # Such as the config.yaml of a run folder, which has its sections written out.
            unlisted = re.match(r"Could not override '(\w+)'", str(error))
            if unlisted is None or groups.pop(unlisted[1], None) is None:
                raise InputError(f"{path}: {_one_line(error)}") from error
        except RecursionError:
            here = sorted(
                file.name for file in folder.glob("*.yaml") if not ours and (CONFIG_DIR / file.name).is_file()
            )
            raise InputError(
                f"{path}: its defaults lead back to themselves, since {', '.join(here) or 'a file'} in {folder} takes the place "
                "of the one in configs/. Rename it"
            ) from None
        except yaml.MarkedYAMLError as error:
            place = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
            raise InputError(f"{path} is not valid YAML ({place}{error.problem}). Correct it") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 text ({error.reason}). Save it as UTF-8") from error
        except (HydraException, OmegaConfBaseException, yaml.YAMLError, OSError) as error:
            raise InputError(f"{path}: {_one_line(error)}") from error
        else:
            return OmegaConf.create(OmegaConf.to_container(values, resolve=False)), set(groups)


def _group_file(override: Override) -> Path | None:
    """The file of a choice such as strategy=ddp; None when the override sets a value."""
    path = CONFIG_DIR / override.key_or_group / f"{override.value()}.yaml"
    return path if (CONFIG_DIR / override.key_or_group).is_dir() and path.is_file() else None


def _overridden(values: DictConfig, overrides: list[Override], composed: set[str]) -> dict[str, Any]:
    """Values with overrides in their order. composed: groups that the values have the chosen file of already, so that what
    their own file says of it stays where the choice says nothing."""
    for override in overrides:
        key, value, group = override.key_or_group, override.value(), _group_file(override)
        if group is not None:
            OmegaConf.update(values, key, OmegaConf.load(group), merge=key in composed, force_add=True)
        else:
            OmegaConf.update(values, key, value, merge=isinstance(value, dict), force_add=True)
    return OmegaConf.to_container(values, resolve=False)


def _typed(values: dict[str, Any], overrides: list[Override], source: str) -> ExperimentConfig:
    _keep_one_length(values, {key for item in overrides for key in leaves({item.key_or_group: item.value()})})
    _name_reference(values)
    for key, value in leaves(values).items():
        _check_section(key, value, _check_key(key), source)
    try:
        typed = OmegaConf.merge(OmegaConf.structured(ExperimentConfig), values)
        cfg = OmegaConf.to_object(typed)
    except OmegaConfBaseException as error:
        raise InputError(_wrong_value(error, values, source)) from None
    validate(cfg)
    return cfg


def _check_section(key: str, value: Any, kind: Any, source: str) -> None:
    optional = _strip_optional(kind) is not kind
    if (
        dataclasses.is_dataclass(_strip_optional(kind))
        and not isinstance(value, dict)
        and not (optional and value is None)
    ):
        raise InputError(
            f"{key}={'null' if value is None else value} in {source} is a single value, but {key} is a section. "
            f"Set its fields: {key}.FIELD=VALUE"
        )


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
    return f"{key}={value} is of the wrong type: it takes {_type_name(key)}. {way_out}"


def find_config(config: str) -> Path:
    """The file that --config means: one here, or one in configs/. Raises InputError when there is none."""
    for path in (Path(config), CONFIG_DIR / config, CONFIG_DIR / f"{config}.yaml"):
        if path.is_file() and path.suffix == ".yaml":
            return path.resolve()
    folders = ("*.yaml", "official/*.yaml", "ablation/*.yaml")
    known = sorted(p.relative_to(CONFIG_DIR).as_posix() for pattern in folders for p in CONFIG_DIR.glob(pattern))
    listed = [name for name in known if not name.startswith("ablation/")]
    raise InputError(
        f"--config {config}: no such file here or in {CONFIG_DIR}{suggest(config, known)} "
        f"Known configs: {', '.join(listed)}, and those in ablation/"
    )


def check_override(text: str) -> Override:
    """The parsed override, after its key was looked up in the schema or among the groups. Raises InputError."""
    try:
        (override,) = OverridesParser.create().parse_overrides([text])
    except HydraException as error:
        raise InputError(f"override '{text}': {_one_line(error)}; the form is section.field=value") from None
    if override.is_add() or override.is_delete() or override.package is not None or "=" not in text:
        raise InputError(f"override '{text}': the form is section.field=value")
    key, value = override.key_or_group, override.value()
    if (CONFIG_DIR / key).is_dir():
        choices = sorted(p.stem for p in (CONFIG_DIR / key).glob("*.yaml"))
        if value not in choices:
            raise InputError(
                f"{key}={value} is not one of {', '.join(choices)}{suggest(str(value), choices)}. "
                f"Single fields are set by {key}.FIELD=VALUE"
            )
        return override
    _check_key(key)
    return override


def _check_key(key: str) -> Any:
    """The type of a field. Raises InputError when there is none of that name."""
    kind: Any = ExperimentConfig
    done: list[str] = []
    for part in key.split("."):
        kind = _strip_optional(kind)
        if not dataclasses.is_dataclass(kind):
            if done and getattr(kind, "__origin__", None) is dict:
                return get_args(kind)[1]
            raise InputError(
                f"{key}: {'.'.join(done)} is a single value and has no field {part}. Use {'.'.join(done)}=VALUE"
            )
        hints = get_type_hints(kind)
        if part not in hints:
            known = [".".join([*done, name]) for name in hints]
            wrong = ".".join([*done, part])
            raise InputError(f"{wrong} is not a config key{suggest(wrong, known)}. Known here: {', '.join(known)}")
        kind = hints[part]
        done.append(part)
    return kind


def _strip_optional(kind: Any) -> Any:
    options = [arg for arg in get_args(kind) if arg is not type(None)]
    return options[0] if type(None) in get_args(kind) and len(options) == 1 else kind


def _type_name(key: str) -> str:
    """In words, the type of a field or of one element of a list field."""
    kind = _check_key(re.sub(r"\[.*?\]", "", key))
    if key.endswith("]"):
        (kind,) = get_args(_strip_optional(kind))
    plain = _strip_optional(kind)
    if getattr(plain, "__origin__", None) is list:
        many = {int: "whole numbers", float: "numbers", str: "texts"}
        text = f"a list of {many[get_args(plain)[0]]}"
    else:
        words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        text = words.get(plain, "a section")
    return text if plain is kind else f"{text} or null"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split("\n")[0].split()).rstrip(".")


def _name_reference(values: dict[str, Any]) -> None:
    """A path in place of evaluate.reference is one reference of that name."""
    path = OmegaConf.select(OmegaConf.create(values), "evaluate.reference")
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
