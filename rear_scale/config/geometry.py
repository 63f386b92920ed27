"""The token grid of known tokenizers, for configs that do not set it: those written before the field existed, and those that
change the image size of a known tokenizer."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from rear_scale.config.schema import TokenizerConfig

# Side of a token in pixels, and tokens before the grid, by tokenizer.name. TiTok's tokens have no position in the image.
_GRIDS = {"compact": (4, 0), "maskgit_vqgan": (16, 0), "vqplus": (16, 0), "alitok": (16, 17)}
_SIZES = ("tokenizer.name", "tokenizer.image_size", "tokenizer.num_tokens")
_GEOMETRY = ("tokenizer.grid", "tokenizer.prefix_tokens")


def known_grid(tokenizer: TokenizerConfig, prefix_tokens: int | None = None) -> tuple[list[int] | None, int]:
    """The grid [rows, columns] and the number of prefix tokens of a tokenizer, by its name, image size and number of tokens.

    (None, 0) for a name without a grid, or whose grid does not give that number. prefix_tokens: replaces the number that
    belongs to the name.
    """
    pixels, prefix = _GRIDS.get(tokenizer.name, (0, 0))
    if prefix_tokens is not None:
        prefix = prefix_tokens
    side = tokenizer.image_size // pixels if pixels else 0
    return (
        ([side, side], prefix) if side and prefix + side * side == tokenizer.num_tokens else (None, prefix_tokens or 0)
    )


def fits(tokenizer: TokenizerConfig) -> bool:
    """Whether prefix and grid have tokenizer.num_tokens positions together, or there is no grid."""
    return tokenizer.grid is None or tokenizer.prefix_tokens + math.prod(tokenizer.grid) == tokenizer.num_tokens


def complete(tokenizer: TokenizerConfig, said: Collection[str], given: Collection[str]) -> None:
    """Sets the grid and prefix of a tokenizer where its config does not set them, or sets them for other sizes.

    said: the names of the fields that the config has; given: the dotted keys that the user has set, on the command line or
    in a file of their own. For a user who sets sizes but no grid, the grid is that of the tokenizer for these sizes.
    """
    resized = any(key in given for key in _SIZES) and not any(key in given for key in _GEOMETRY)
    if "grid" not in said:
        own = tokenizer.prefix_tokens if "prefix_tokens" in said else None
        tokenizer.grid, tokenizer.prefix_tokens = known_grid(tokenizer, own)
    elif resized and (tokenizer.grid is None or not fits(tokenizer)):
        tokenizer.grid, tokenizer.prefix_tokens = known_grid(tokenizer)


def completed(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a checkpoint's config, completed by the grid of its tokenizer, which older configs do not have."""
    tokenizer = values["tokenizer"]
    if "grid" in tokenizer:
        return values
    sizes = {name: tokenizer[name] for name in ("name", "image_size", "num_tokens")}
    grid, prefix = known_grid(TokenizerConfig(**sizes))
    return {**values, "tokenizer": {**tokenizer, "grid": grid, "prefix_tokens": prefix}}
