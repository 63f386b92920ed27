"""Images <-> token ids. One file per tokenizer, all with the interface of base.py."""

from __future__ import annotations

from pathlib import Path

import torch

from rear_scale.config import InputError, TokenizerConfig
from rear_scale.files import file_sha256
from rear_scale.tokenizer.alitok import AliTok
from rear_scale.tokenizer.base import Tokenizer
from rear_scale.tokenizer.compact import CompactTokenizer
from rear_scale.tokenizer.maskgit_vqgan import MaskgitVqgan
from rear_scale.tokenizer.titok import TiTok
from rear_scale.weight_file import find_weights

_TOKENIZERS: dict[str, type[Tokenizer]] = {kind.name: kind for kind in (CompactTokenizer, MaskgitVqgan, TiTok, AliTok)}
# Known by their tokens alone: shards of them come from elsewhere, and their images are not decoded here.
TOKENS_ONLY = ("vqplus",)


def weights_sha256(cfg: TokenizerConfig) -> str | None:
    """Of the weight file; None for a tokenizer whose images are not decoded here. Raises InputError as `open_tokenizer`."""
    if cfg.name in TOKENS_ONLY:
        return None
    if cfg.weights is None or not find_weights(cfg.weights).is_file():
        open_tokenizer(cfg, torch.device("cpu"))  # which says what is wrong with it
    return file_sha256(find_weights(cfg.weights))


def decoder_identity(cfg: TokenizerConfig) -> str | None:
    """What the images of given tokens depend on: weights_sha256, and the precision where it is not float32."""
    sha256 = weights_sha256(cfg)
    return sha256 if cfg.precision == "fp32" or sha256 is None else f"{sha256} in {cfg.precision}"


def find_tokenizer(name: str) -> type[Tokenizer]:
    """The class of tokenizer.name. Raises InputError for an unknown one, and for one whose images are not decoded here."""
    if name in TOKENS_ONLY:
        raise InputError(
            f"tokenizer.name={name} is known by its token ids alone: its images are not decoded here. Sample token ids with "
            "launchers/sample.py, decode them where its decoder is, and score the images with launchers/evaluate.py --samples"
        )
    if name not in _TOKENIZERS:
        raise InputError(f"tokenizer.name={name} is not one of {', '.join(_TOKENIZERS)}. Use one of them")
    return _TOKENIZERS[name]


def check_weights(cfg: TokenizerConfig) -> None:
    """Raises InputError when tokenizer.weights, which images need, is not set or not there. The file is not read."""
    kind = find_tokenizer(cfg.name)
    published = f" ({kind.published})" if kind.published else ""
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

    Raises InputError when it has no weight file or one that does not fit the config.
    """
    check_weights(cfg)
    assert cfg.weights is not None
    tokenizer = find_tokenizer(cfg.name).from_file(cfg.weights)
    for field in ("image_size", "num_tokens", "codebook_size"):
        _check_is(cfg, field, getattr(cfg, field), getattr(tokenizer, field))
    if cfg.grid is not None:  # null asks for nothing of a grid: then no order scans one
        _check_is(cfg, "grid", cfg.grid, None if tokenizer.grid is None else list(tokenizer.grid))
        _check_is(cfg, "prefix_tokens", cfg.prefix_tokens, tokenizer.prefix_tokens)
    if tokenizer.codebook.shape[1] != cfg.codebook_dim:
        found = tokenizer.codebook.shape[1]
        raise InputError(
            f"tokenizer.codebook_dim={cfg.codebook_dim}, but {cfg.weights} has {found}. Set tokenizer.codebook_dim={found}"
        )
    tokenizer = tokenizer.to(device).eval().requires_grad_(False)
    if device.type == "cuda":
        # The layout in which tensor cores convolve; cuDNN would copy weights and images into it in every call.
        tokenizer = tokenizer.to(memory_format=torch.channels_last)
    if cfg.precision == "bf16":
        tokenizer.decode_in_bfloat16()
    return tokenizer


def _check_is(cfg: TokenizerConfig, field: str, wanted: object, found: object) -> None:
    if found != wanted:
        found, wanted = ("null" if value is None else str(value).replace(" ", "") for value in (found, wanted))
        raise InputError(
            f"tokenizer.{field}={wanted}, but {cfg.weights} has {found}. Set tokenizer.{field}={found}, or name another file"
        )
