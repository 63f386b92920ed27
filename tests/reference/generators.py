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


def masked_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v with a dense mask; the last query sees all keys."""
    queries, keys = query.shape[2], key.shape[2]
    mask = torch.full((queries, keys), -math.inf, dtype=query.dtype, device=query.device).triu(1 + keys - queries)
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[3]) + mask
    return scores.softmax(-1) @ value


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
    are the first. cache: keys and values per block of the positions before the last; only that one is run.
    """
    B, n = tokens.shape
    embeddings = w["embeddings.weight"]
    N = n if order is None else order.shape[1]
    places = torch.arange(max(N, n + 1), device=tokens.device).expand(B, -1) if order is None else order
    x = torch.cat((w["cls_token"].expand(B, -1, -1), embeddings[condition][:, None], embeddings[tokens]), dim=1)
    rows = w["pos_embed"].repeat(B, 1, 1)
    own = torch.stack([torch.cat((rows[b, :2], rows[b, 2 + places[b, :n]])) for b in range(B)])
    known = min(n + 1, places.shape[1])  # how many next tokens have a place
    target = torch.stack([w["target_aware_pos_embed"][0, 2 + places[b, :known]] for b in range(B)])
    if order is None and cache is None:
        target = target[:, :n]
    x = x + own
    x[:, 1 : 1 + target.shape[1]] = x[:, 1 : 1 + target.shape[1]] + target
    c = embeddings[condition][:, None] + w["timesteps_embeddings"][:, : n + 2]
    first = 0
    if cache is not None and cache[0]:
        first = n + 1
    x, c = x[:, first:], c[:, first:]
    stream = [x]
    depth = len({name.split(".")[1] for name in w if name.startswith("blocks.")})
    for number in range(depth):
        at = f"blocks.{number}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(w, f"{at}.adaLN_modulation.1", F.silu(c)).chunk(6, dim=-1)
        h = layer_norm(w, f"{at}.norm1", x) * (1 + scale1) + shift1
        query, key, value = (split_heads(part, heads) for part in linear(w, f"{at}.attn.qkv", h).chunk(3, dim=-1))
        query, key = layer_norm(w, f"{at}.attn.q_norm", query), layer_norm(w, f"{at}.attn.k_norm", key)
        if cache is not None:
            if cache[number]:
                key, value = (torch.cat(pair, dim=2) for pair in zip(cache[number], (key, value), strict=True))
            cache[number] = (key, value)
        x = x + gate1 * linear(w, f"{at}.attn.proj", join_heads(masked_attention(query, key, value)))
        h = layer_norm(w, f"{at}.norm2", x) * (1 + scale2) + shift2
        x = x + gate2 * linear(w, f"{at}.mlp.fc2", F.gelu(linear(w, f"{at}.mlp.fc1", h)))
        stream.append(x)
    scale, shift = linear(w, "adaln_before_head.adaLN_modulation.1", F.silu(c)).chunk(2, dim=-1)
    logits = linear(w, "lm_head", F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)
    return logits if first else logits[:, 1:], stream


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
    stream = [x]
    for number in range(len({name.split(".")[1] for name in w if name.startswith("blocks.")})):
        at = f"blocks.{number}"
        h = rms_norm(w, f"{at}.norm1", x)
        query, key, value = (split_heads(part, heads) for part in linear(w, f"{at}.attn.qkv", h).chunk(3, dim=-1))
        query = turn(rms_norm(w, f"{at}.attn.q_norm", query), angles)
        key = turn(rms_norm(w, f"{at}.attn.k_norm", key), angles)
        x = x + linear(w, f"{at}.attn.proj", join_heads(masked_attention(query, key, value)))
        h = rms_norm(w, f"{at}.norm2", x)
        gated = F.silu(linear(w, f"{at}.mlp.w1", h)) * linear(w, f"{at}.mlp.w3", h)
        x = x + linear(w, f"{at}.mlp.w2", gated)
        stream.append(x)
    return linear(w, "output", rms_norm(w, "norm", x)), stream
