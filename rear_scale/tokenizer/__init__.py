"""Tokenizers, which encode images to token ids and decode them. One file each, all with the interface of base.py."""

from __future__ import annotations

from pathlib import Path

import torch

from rear_scale.config import InputError, TokenizerConfig, required_path
from rear_scale.files import file_sha256
from rear_scale.tokenizer.alitok import AliTok
from rear_scale.tokenizer.base import Tokenizer
from rear_scale.tokenizer.compact import CompactTokenizer
from rear_scale.tokenizer.maskgit_vqgan import MaskgitVqgan
from rear_scale.tokenizer.titok import TiTok
from rear_scale.weight_file import find_weights

_TOKENIZERS: dict[str, type[Tokenizer]] = {
    tokenizer.name: tokenizer for tokenizer in (CompactTokenizer, MaskgitVqgan, TiTok, AliTok)
}
# Tokenizers of which only the token ids are supported: their shards are made elsewhere, and images are not decoded.
TOKENS_ONLY = ("vqplus",)


def weights_sha256(cfg: TokenizerConfig) -> str | None:
    """The sha256 of the weight file; None for a tokenizer of TOKENS_ONLY. Raises InputError as `open_tokenizer`."""
    if cfg.name in TOKENS_ONLY:
        return None
    check_weights(cfg)
    file = find_weights(required_path(cfg.weights, "tokenizer.weights"))
    if not file.is_file():
        open_tokenizer(cfg, torch.device("cpu"))  # raises the error that explains it
    return file_sha256(file)


def decoder_identity(cfg: TokenizerConfig) -> str | None:
    """An identifier of all that the images of given tokens depend on: weights_sha256, and the precision if not float32."""
    sha256 = weights_sha256(cfg)
    return sha256 if cfg.precision == "fp32" or sha256 is None else f"{sha256} in {cfg.precision}"


def find_tokenizer(name: str) -> type[Tokenizer]:
    """The class of tokenizer.name. Raises InputError for an unknown name, and for one of TOKENS_ONLY."""
    if name in TOKENS_ONLY:
        raise InputError(
            f"tokenizer.name={name} is supported as token ids alone: this project has no decoder for it. Sample token ids with "
            "launchers/sample.py, decode them with its own code, and score the images with launchers/evaluate.py --samples"
        )
    if name not in _TOKENIZERS:
        raise InputError(f"tokenizer.name={name} is not one of {', '.join(_TOKENIZERS)}. Use one of them")
    return _TOKENIZERS[name]


def check_weights(cfg: TokenizerConfig) -> None:
    """Raises InputError when tokenizer.weights is not set or does not exist. The file is not read."""
    official = find_tokenizer(cfg.name).published
    published = f" ({official})" if official else ""
    if cfg.weights is None:
        raise InputError(
            f"tokenizer.weights is not set, but images need the weights of {cfg.name}{published}. "
            "Set it to the file's path"
        )
    if not Path(cfg.weights).exists():
        made = ", or train it with launchers/train_tokenizer.py" if cfg.training is not None else ""
        raise InputError(f"not found: tokenizer.weights={cfg.weights}{published}. Set the path of a weight file{made}")


def open_tokenizer(cfg: TokenizerConfig, device: torch.device) -> Tokenizer:
    """The frozen tokenizer of a config, with its weights.

    Raises InputError without a weight file, and for one that does not fit the config.
    """
    check_weights(cfg)
    assert cfg.weights is not None
    tokenizer = find_tokenizer(cfg.name).from_file(cfg.weights)
    for field in ("image_size", "num_tokens", "codebook_size"):
        _check_is(cfg, field, getattr(cfg, field), getattr(tokenizer, field))
    if cfg.grid is not None:  # without a grid in the config nothing depends on it
        _check_is(cfg, "grid", cfg.grid, None if tokenizer.grid is None else list(tokenizer.grid))
        _check_is(cfg, "prefix_tokens", cfg.prefix_tokens, tokenizer.prefix_tokens)
    if tokenizer.codebook.shape[1] != cfg.codebook_dim:
        dim = tokenizer.codebook.shape[1]
        raise InputError(
            f"tokenizer.codebook_dim={cfg.codebook_dim}, but {cfg.weights} has {dim}. Set tokenizer.codebook_dim={dim}"
        )
    tokenizer = tokenizer.to(device).eval().requires_grad_(False)
    if device.type == "cuda":
        # Tensor cores convolve in this layout; otherwise cuDNN copies weights and images into it in every call.
        tokenizer.use_channels_last()
    if cfg.precision == "bf16":
        tokenizer.decode_in_bfloat16()
    return tokenizer


def _check_is(cfg: TokenizerConfig, field: str, wanted: object, actual: object) -> None:
    if actual != wanted:
        actual, wanted = ("null" if value is None else str(value).replace(" ", "") for value in (actual, wanted))
        raise InputError(
            f"tokenizer.{field}={wanted}, but {cfg.weights} has {actual}. Set tokenizer.{field}={actual}, or name another file"
        )
