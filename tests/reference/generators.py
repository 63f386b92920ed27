"""The released generators as they compute: every position run, a dense mask, modulation for every image, no cache but one
that grows by concatenation. Weights are a dictionary by official name."""

# B images, N tokens of an image, S positions, D width, H heads, K codes

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = Mapping[str, Tensor]


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def layer_norm(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)


def rms_norm(w: Weights, name: str, x: Tensor) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5) * w[f"{name}.weight"]


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention under a dense float mask [queries, keys]; None: a single query that sees all keys."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def causal_mask(positions: int, like: Tensor) -> Tensor:
    """[positions, positions], minus infinity above the diagonal."""
    return torch.full((positions, positions), -math.inf, dtype=like.dtype, device=like.device).triu(1)


def split_heads(x: Tensor, heads: int) -> Tensor:
    B, S, D = x.shape
    return x.view(B, S, heads, D // heads).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    B, H, S, d = x.shape
    return x.transpose(1, 2).reshape(B, S, H * d)


def rear_head(w: Weights, name: str, x: Tensor, activation=F.silu) -> Tensor:
    """A head of two or three layers, by the layers that the weights have."""
    layers = sorted(int(key.split(".")[1]) for key in w if key.startswith(f"{name}.") and key.endswith("weight"))
    for number in layers[:-1]:
        x = activation(linear(w, f"{name}.{number}", x))
    return linear(w, f"{name}.{layers[-1]}", x)


def rar_forward(
    w: Weights,
    tokens: Tensor,
    condition: Tensor,
    heads: int,
    order: Tensor | None = None,
    cache: list[tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """RAR and reAR: logits [B, n + 1, K] of tokens [B, n] (in order of prediction), and the residual stream, embeddings first.

    condition: int64 [B], a row of the embedding table. order: int64 [B, N], raster if None; with fewer tokens than N they
    are the first. cache: keys and values per block, filled here; after the first call the last position alone is run.
    """
    B, n = tokens.shape
    embeddings = w["embeddings.weight"]
    if order is None:
        order = torch.arange(w["pos_embed"].shape[1] - 2, device=tokens.device).expand(B, -1)[:, : n + 1]
    rows = torch.arange(B, device=tokens.device)[:, None]
    x = torch.cat((w["cls_token"].expand(B, -1, -1), embeddings[condition][:, None], embeddings[tokens]), dim=1)
    own = w["pos_embed"].repeat(B, 1, 1)
    x = x + torch.cat((own[:, :2], own[:, 2:][rows, order[:, :n]]), dim=1)
    target = w["target_aware_pos_embed"].repeat(B, 1, 1)[:, 2:][rows, order[:, : n + 1]]
    if cache is None or target.shape[1] == order.shape[1] == n:
        target = target[:, :n]  # a whole sequence: its last token predicts nothing
    x = x + F.pad(target, (0, 0, 1, x.shape[1] - 1 - target.shape[1]))
    c = embeddings[condition][:, None] + w["timesteps_embeddings"][:, : n + 2]
    mask: Tensor | None = causal_mask(n + 2, x)
    step = cache is not None and len(cache) > 0
    if step:
        x, c, mask = x[:, -1:], c[:, -1:], None
    stream = [x]
    for number in range(len({name.split(".")[1] for name in w if name.startswith("blocks.")})):
        at = f"blocks.{number}"
        modulation = linear(w, f"{at}.adaLN_modulation.1", F.silu(c))
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        h = layer_norm(w, f"{at}.norm1", x) * (1 + scale1) + shift1
        query, key, value = (split_heads(part, heads) for part in linear(w, f"{at}.attn.qkv", h).chunk(3, dim=-1))
        query, key = layer_norm(w, f"{at}.attn.q_norm", query), layer_norm(w, f"{at}.attn.k_norm", key)
        if cache is not None:
            if step:
                key, value = (torch.cat(pair, dim=2) for pair in zip(cache[number], (key, value), strict=True))
                cache[number] = (key, value)
            else:
                cache.append((key, value))
        x = x + gate1 * linear(w, f"{at}.attn.proj", join_heads(masked_attention(query, key, value, mask)))
        h = layer_norm(w, f"{at}.norm2", x) * (1 + scale2) + shift2
        x = x + gate2 * linear(w, f"{at}.mlp.fc2", F.gelu(linear(w, f"{at}.mlp.fc1", h)))
        stream.append(x)
    scale, shift = linear(w, "adaln_before_head.adaLN_modulation.1", F.silu(c)).chunk(2, dim=-1)
    logits = linear(w, "lm_head", F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)
    return logits if step else logits[:, 1:], stream


def alitok_angles(num_tokens: int, head_width: int) -> Tensor:
    """[N + 1, head_width / 2], angles of each token's rotary pairs; row 0 (the class) is nan: no angle, but zero."""
    side = math.isqrt(num_tokens)
    prefix = num_tokens - side * side
    rows = [[math.nan] * (head_width // 2)]
    for place in range(num_tokens):
        if place < prefix:
            rows.append([place / 10_000 ** (2 * i / head_width) for i in range(head_width // 2)])
        else:
            row, column = divmod(place - prefix, side)
            half = head_width // 2
            rows.append(
                [
                    (prefix + coordinate) / 10_000 ** (2 * i / half)
                    for coordinate in (row, column)
                    for i in range(half // 2)
                ]
            )
    return torch.tensor(rows, dtype=torch.float64)


def turn(x: Tensor, angles: Tensor) -> Tensor:
    """x [B, H, S, d] as complex pairs times e^(i angle); zero where there is no angle."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    factors = torch.polar(torch.ones_like(angles), angles).to(pairs.dtype)
    factors = torch.where(angles.isnan(), torch.zeros_like(factors), factors)
    return torch.view_as_real(pairs * factors).flatten(-2)


def alitok_forward(w: Weights, tokens: Tensor, condition: Tensor, heads: int) -> tuple[Tensor, list[Tensor]]:
    """AliTok's generator: logits [B, N + 1, K] of tokens [B, N], and the residual stream, embeddings first."""
    embeddings = w["embeddings.weight"]
    x = torch.cat((embeddings[condition][:, None], embeddings[tokens]), dim=1)
    angles = alitok_angles(tokens.shape[1], x.shape[2] // heads).to(x.device)
    mask = causal_mask(x.shape[1], x)
    stream = [x]
    for number in range(len({name.split(".")[1] for name in w if name.startswith("blocks.")})):
        at = f"blocks.{number}"
        h = rms_norm(w, f"{at}.norm1", x)
        query, key, value = (split_heads(part, heads) for part in linear(w, f"{at}.attn.qkv", h).chunk(3, dim=-1))
        query = turn(rms_norm(w, f"{at}.attn.q_norm", query), angles)
        key = turn(rms_norm(w, f"{at}.attn.k_norm", key), angles)
        x = x + linear(w, f"{at}.attn.proj", join_heads(masked_attention(query, key, value, mask)))
        h = rms_norm(w, f"{at}.norm2", x)
        gated = F.silu(linear(w, f"{at}.mlp.w1", h)) * linear(w, f"{at}.mlp.w3", h)
        x = x + linear(w, f"{at}.mlp.w2", gated)
        stream.append(x)
    return linear(w, "output", rms_norm(w, "norm", x)), stream
