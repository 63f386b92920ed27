"""Which config belongs to a weight file or to a released YAML: settings of the published system, shape of the file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from rear_scale import config
from rear_scale.config import ExperimentConfig, InputError
from rear_scale.interop.official import infer, is_head
from rear_scale.model.generator import Shape

_SIZES = {
    (12, 768): "s",
    (20, 768): "s",
    (24, 768): "b",
    (24, 1024): "l",
    (32, 1280): "xl",
    (40, 1408): "xxl",
}
_RELEASED_REAR = ("s", "b", "l")
_TITOK_TOKENS = 64


def config_of_weights(
    weights: Mapping[str, Tensor], source: str, overrides: list[str] | tuple[str, ...] = ()
) -> ExperimentConfig:
    """The published config that a weight file fits best, with the file's own shape in it, overrides applied last.

    Raises InputError when the file holds no generator that we know.
    """
    architecture, shape = infer(weights, source)
    name = _config_name(architecture, shape, weights)
    return config.load(name, [*_shape_overrides(architecture, shape), *_head_overrides(weights), *overrides])


def _config_name(architecture: str, shape: Shape, weights: Mapping[str, Tensor]) -> str:
    method = "rear" if any(is_head(name) for name in weights) else None
    if architecture == "alitok":
        return f"{method or ('rar' if shape.target_aware else 'ar')}_alitok_b.yaml"
    if shape.num_tokens == _TITOK_TOKENS:
        return f"{method or 'rar'}_titok_b64.yaml"
    size = _SIZES.get((shape.depth, shape.width), "b")
    if method and _is_released_form(weights) and size in _RELEASED_REAR:
        return f"official/rear_{size}.yaml"
    return f"{method or 'rar'}_{size}.yaml"


def _is_released_form(weights: Mapping[str, Tensor]) -> bool:
    return any(is_head(name) and name.endswith(".4.weight") for name in weights)


def _shape_overrides(architecture: str, shape: Shape) -> list[str]:
    return [
        f"model.architecture={architecture}",
        f"model.depth={shape.depth}",
        f"model.width={shape.width}",
        f"model.num_heads={shape.num_heads}",
        f"model.mlp_width={shape.mlp_width}",
        f"model.num_classes={shape.num_classes}",
        f"model.conditioning={shape.conditioning}",
        f"tokenizer.num_tokens={shape.num_tokens}",
        f"tokenizer.codebook_size={shape.codebook_size}",
        f"tokenizer.codebook_dim={shape.codebook_dim}",
    ]


def _head_overrides(weights: Mapping[str, Tensor]) -> list[str]:
    """Which heads the file has; a file without any keeps the taps of its config, so that training can go on with fresh
    ones."""
    names = [name for name in weights if is_head(name)]
    if not names:
        return []
    hidden = next(len(value) for name, value in weights.items() if is_head(name) and name.endswith(".0.bias"))
    return [
        f"objective.heads.form={'released' if _is_released_form(weights) else 'paper'}",
        f"objective.heads.hidden={hidden}",
        f"objective.heads.shared={any(name.startswith('align_mlp') for name in names)}".lower(),
    ]


# Where a value of a released YAML stands with us: (section, key) -> config key.
_YAML_KEYS = {
    ("generator", "hidden_size"): "model.width",
    ("generator", "num_hidden_layers"): "model.depth",
    ("generator", "num_attention_heads"): "model.num_heads",
    ("generator", "intermediate_size"): "model.mlp_width",
    ("generator", "dropout"): "model.dropout",
    ("generator", "attn_drop"): "model.attn_dropout",
    ("generator", "tok_dropout"): "model.embed_dropout",
    ("generator", "condition_num_classes"): "model.num_classes",
    ("generator", "class_label_dropout"): "objective.class_dropout",
    ("generator", "image_seq_len"): "tokenizer.num_tokens",
    ("generator", "randomize_temperature"): "sample.temperature",
    ("generator", "guidance_scale"): "sample.guidance.scale",
    ("generator", "guidance_scale_pow"): "sample.guidance.power",
    ("generator", "transition_alignment_weight"): "objective.heads.weight",
    ("generator", "projection_dim"): "objective.heads.hidden",
    ("vq_model", "codebook_size"): "tokenizer.codebook_size",
    ("optimizer", "learning_rate"): "optim.lr",
    ("optimizer", "weight_decay"): "optim.weight_decay",
    ("lr_scheduler", "warmup_steps"): "optim.warmup_steps",
    ("lr_scheduler", "end_lr"): "optim.end_lr",
    ("training", "max_train_steps"): "train.total_steps",
    ("training", "max_grad_norm"): "optim.grad_clip",
    ("training", "per_gpu_batch_size"): "train.micro_batch_size",
}


def is_released_yaml(path: Path) -> bool:
    """Whether a file is a config of the released trainers, which nest model.generator and model.vq_model."""
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    return isinstance(values, dict) and isinstance(values.get("model"), dict) and "generator" in values["model"]


def config_of_yaml(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> ExperimentConfig:
    """Our config of a released YAML (reAR, RAR, AliTok): its shapes, noise, heads, optimizer and guidance.

    What it does not say comes from the published config of its method and size. Raises InputError when it gives no shape.
    """
    values = yaml.safe_load(path.read_text())
    sections = {
        "generator": values["model"]["generator"],
        "vq_model": values["model"].get("vq_model") or {},
        **{name: (values.get(name) or {}).get("params") or {} for name in ("optimizer", "lr_scheduler")},
        "training": values.get("training") or {},
    }
    generator: dict[str, Any] = sections["generator"]
    lacking = [name for name in ("hidden_size", "num_hidden_layers", "num_attention_heads") if name not in generator]
    if lacking:
        raise InputError(f"{path}: model.generator has no {', '.join(lacking)}. Use a config of the released trainers")
    found = []
    for (section, key), ours in _YAML_KEYS.items():
        value = sections[section].get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append(f"{ours}={value}")
    size = _SIZES.get((generator["num_hidden_layers"], generator["hidden_size"]), "b")
    aligned = bool(generator.get("transition_alignment"))
    if "tok_dropout" in generator:
        name = f"{'rear' if aligned else 'ar'}_alitok_b.yaml"
        found.append("model.mlp_width=null")
    elif aligned:
        name = f"official/rear_{size if size in _RELEASED_REAR else 'b'}.yaml"
        taps = [generator.get(f"{end}_align_layer_idx") for end in ("encode", "decode")]
        # A released index i reads the output of block i, which is tap i + 1.
        found += [
            f"objective.heads.{end}_tap={tap + 1}"
            for end, tap in zip(("encode", "decode"), taps, strict=True)
            if tap is not None
        ]
        found += _anneal("objective.noise", generator)
    else:
        name = f"rar_{size}.yaml"
        found += _anneal("objective.permutation", generator)
    return config.load(name, [*found, *overrides])


def _anneal(section: str, generator: dict[str, Any]) -> list[str]:
    marks = {mark: generator.get(f"randomness_anneal_{mark}") for mark in ("start", "end")}
    return [f"{section}.{mark}={value}" for mark, value in marks.items() if value is not None]
