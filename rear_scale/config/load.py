"""From files and overrides to a typed config: Hydra composes, every wrong key or type becomes one clear line."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

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
    path = _find_config(config)
    overrides = [check_override(text) for text in overrides]
    ours = path.is_relative_to(CONFIG_DIR)
    folder, name = (CONFIG_DIR, path.relative_to(CONFIG_DIR)) if ours else (path.parent, Path(path.name))
    search = [] if ours else [f"hydra.searchpath=[file://{CONFIG_DIR}]"]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            composed = compose(name.with_suffix("").as_posix(), overrides=search + overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(f"{path}: {_one_line(error)}") from error
    values = OmegaConf.to_container(composed, resolve=False)
    _keep_one_length(values, overrides)
    return from_dict(values, source=str(path))


def from_dict(values: dict[str, Any], source: str, overrides: list[str] | tuple[str, ...] = ()) -> ExperimentConfig:
    """The validated config of plain values, as `to_dict` gives them, with overrides applied in order.

    `source` is named in errors. Raises InputError as `load` does.
    """
    values = OmegaConf.create(values)
    for text in overrides:
        check_override(text)
        (override,) = OverridesParser.create().parse_overrides([text])
        key, value = override.key_or_group, override.value()
        group = CONFIG_DIR / key / f"{value}.yaml"
        OmegaConf.update(values, key, OmegaConf.load(group) if group.is_file() else value, merge=False, force_add=True)
    values = OmegaConf.to_container(values, resolve=False)
    _keep_one_length(values, overrides)
    _name_reference(values)
    for key in leaves(values):
        _check_key(key)
    try:
        typed = OmegaConf.merge(OmegaConf.structured(ExperimentConfig), values)
        cfg = OmegaConf.to_object(typed)
    except OmegaConfBaseException as error:
        key = error.full_key or "?"
        if "mandatory" in str(error):
            raise InputError(
                f"{key} is not set in {source}. Set it there or on the command line: {key}=VALUE"
            ) from None
        value = OmegaConf.select(OmegaConf.create(values), key)
        raise InputError(
            f"{key}={value} is of the wrong type: it takes {_type_name(key)}. Set {key} in {source} or on the command line"
        ) from None
    validate(cfg)
    return cfg


def _find_config(config: str) -> Path:
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


def check_override(text: str) -> str:
    """The override in the form that Hydra takes, after its key was looked up in the schema or among the groups."""
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
        return text
    _check_key(key)
    return f"++{text}"


def _check_key(key: str) -> None:
    kind: Any = ExperimentConfig
    done: list[str] = []
    for part in key.split("."):
        kind = _strip_optional(kind)
        if not dataclasses.is_dataclass(kind):
            if done and getattr(kind, "__origin__", None) is dict:
                return
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


def _strip_optional(kind: Any) -> Any:
    options = [arg for arg in get_args(kind) if arg is not type(None)]
    return options[0] if type(None) in get_args(kind) and len(options) == 1 else kind


def _type_name(key: str) -> str:
    """In words, the type of a field or of the elements of a list field."""
    kind: Any = ExperimentConfig
    for part in re.sub(r"\[.*?\]", "", key).split("."):
        kind = get_type_hints(_strip_optional(kind)).get(part, str)
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    text = (
        words.get(_strip_optional(kind)) or "a section"
        if not get_args(kind) or _strip_optional(kind) is not kind
        else str(kind)
    )
    return f"{text} or null" if type(None) in get_args(kind) else text


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split("\n")[0].split()).rstrip(".")


def _name_reference(values: dict[str, Any]) -> None:
    """A path in place of evaluate.reference is one reference of that name."""
    path = OmegaConf.select(OmegaConf.create(values), "evaluate.reference")
    if isinstance(path, str):
        values["evaluate"]["reference"] = {Path(path).stem: path}


def _keep_one_length(values: dict[str, Any], overrides: list[str]) -> None:
    """An override of train.epochs or train.total_steps replaces the other one; both in one place are an error."""
    train = values.get("train", {})
    given = {
        key
        for key in ("epochs", "total_steps")
        if any(text.lstrip("+").startswith(f"train.{key}=") for text in overrides)
    }
    if len(given) == 1:
        other = ({"epochs", "total_steps"} - given).pop()
        train[other] = None
    if train.get("epochs") is not None and train.get("total_steps") is not None:
        raise InputError(
            f"train.epochs={train['epochs']} and train.total_steps={train['total_steps']} are both set: "
            "the length of a run is one of them. Remove one"
        )
