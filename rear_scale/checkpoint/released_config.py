"""The config of a released weight file or YAML: settings of the published system, with the shape of the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from rear_scale import config
from rear_scale.checkpoint.released import infer, is_head
from rear_scale.checkpoint.released_yaml import RELEASED_REAR, SIZES, config_of_yaml, is_released_yaml
from rear_scale.config import ExperimentConfig
from rear_scale.model.generator import Shape

__all__ = ["config_of_weights", "config_of_yaml", "is_released_yaml"]

_TITOK_TOKENS = 64


def config_of_weights(weights: Mapping[str, Tensor], source: str, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """The published config that fits a weight file best, with the shape of the file, and overrides applied last.

    Raises InputError for a file of any other model.
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
    size = SIZES.get((shape.depth, shape.width), "b")
    if method and _is_released_form(weights) and size in RELEASED_REAR:
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
    """Overrides for the heads of the file. Without heads the taps of the config stay, so that training can start new ones."""
    names = [name for name in weights if is_head(name)]
    if not names:
        return []
    biases = (value for name, value in weights.items() if is_head(name) and name.endswith(".0.bias"))
    hidden = next((bias.numel() for bias in biases), 1)  # without a bias it fits no model, which is an error later
    return [
        f"objective.heads.form={'released' if _is_released_form(weights) else 'paper'}",
        f"objective.heads.hidden={hidden}",
        f"objective.heads.shared={any(name.startswith('align_mlp') for name in names)}".lower(),
    ]
