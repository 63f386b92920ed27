"""Bytes that a model keeps for its backward pass: elements of each kind per position, times their width.

Counted from the graphs that torch builds, for each kind of device ("cpu" or "cuda"), because kernels differ. A GPU's attention
writes its output where the projection reads it, and its RMSNorm keeps its input alone; under autocast it normalises queries
and keys in float32, and keeps them so.
"""

# B images of a micro-batch, N tokens of an image, S positions, D width, K codes, Z width of a code

from __future__ import annotations

from rear_scale.config import ExperimentConfig
from rear_scale.model import head_matrices, mlp_width
from rear_scale.objective.terms import Feature, terms_of
from rear_scale.parallel import facts

_FP32 = 4


def activation_bytes(cfg: ExperimentConfig, device: str = "cpu") -> int:
    """What one micro-batch has kept when its backward pass begins, heads and logits included.

    Every image counts a row of modulation of its own, the most there can be. Under activation checkpointing, a block that
    is computed again comes beside what is kept of the others, when logits and loss are gone.
    """
    at_the_end = max(_end_bytes(cfg), _again_bytes(cfg, device))
    return block_activation_bytes(cfg, device) + at_the_end + head_activation_bytes(cfg)


def compute_itemsize(cfg: ExperimentConfig) -> int:
    """Bytes of a number in matrix products."""
    return 2 if cfg.train.precision == "bf16" else _FP32


def autocasts(cfg: ExperimentConfig) -> bool:
    """Whether bf16 comes by autocast, which leaves the residual stream and the norms in float32."""
    return cfg.train.precision == "bf16" and facts.of(cfg.strategy).autocasts


def one_block_bytes(cfg: ExperimentConfig, device: str = "cpu") -> int:
    """What one block keeps that computes nothing again."""
    return _positions(cfg) * _one_block(cfg, device)


def block_activation_bytes(cfg: ExperimentConfig, device: str = "cpu") -> int:
    """What all blocks keep together from their forward pass."""
    one, depth, policy = one_block_bytes(cfg, device), cfg.model.depth, cfg.train.activation_checkpointing
    boundary = _positions(cfg) * cfg.model.width * _residual_width(cfg)
    if policy == "none":
        return depth * one
    if policy == "full":
        return depth * boundary
    if policy == "every_n":
        recomputed = -(-depth // cfg.train.recompute_every_n)
        return (depth - recomputed) * one + recomputed * boundary
    return depth * (boundary + _positions(cfg) * _products(cfg))


def _again_bytes(cfg: ExperimentConfig, device: str) -> int:
    """What the first block of the backward pass that is computed again holds beyond what is kept of all."""
    one, depth, policy = one_block_bytes(cfg, device), cfg.model.depth, cfg.train.activation_checkpointing
    if policy == "none":
        return 0
    if policy == "selective":
        return max(0, one - _positions(cfg) * _products(cfg))
    # Of the blocks behind it, which keep everything, nothing is left by then.
    done = (depth - 1) % cfg.train.recompute_every_n if policy == "every_n" else 0
    return max(0, (1 - done) * one)


def head_activation_bytes(cfg: ExperimentConfig) -> int:
    """What the reAR heads and their terms of the loss keep, and an estimate for other terms that read features."""
    heads, low = cfg.objective.heads, compute_itemsize(cfg)
    taps = sum(tap is not None for tap in (heads.encode_tap, heads.decode_tap))
    hidden = (4 if heads.form == "released" else 2) * heads.hidden  # in and out of each activation function
    tokens = cfg.tokenizer.num_tokens - (heads.positions == "eq6")
    # Their input, cut out of the sequence; features and directions of the cosine are float32.
    per_token = low * (cfg.model.width + hidden) + _FP32 * 2 * cfg.tokenizer.codebook_dim
    others = sum(_feature_bytes(cfg, one) for term in terms_of(cfg) if not term.built_in for one in term.features())
    return taps * cfg.train.micro_batch_size * tokens * per_token + others


def _feature_bytes(cfg: ExperimentConfig, feature: Feature) -> int:
    """Features as they are cut out of the sequence, and each layer's output, or without a head the features, in float32 too."""
    low, outputs = compute_itemsize(cfg), sum(shape[0] for shape in head_matrices(feature))
    per_token = low * cfg.model.width + (low + _FP32) * outputs + (0 if outputs else _FP32 * cfg.model.width)
    return cfg.train.micro_batch_size * cfg.tokenizer.num_tokens * per_token


def _one_block(cfg: ExperimentConfig, device: str) -> int:
    """Bytes per position of a block that keeps everything."""
    D, F, low, residual = cfg.model.width, mlp_width(cfg), compute_itemsize(cfg), _residual_width(cfg)
    on_gpu = device == "cuda"
    in_fp32 = _FP32 * 2 * D if on_gpu and autocasts(cfg) else 0  # queries and keys as their norms take them
    if cfg.model.architecture == "alitok" and on_gpu:
        # The stream twice; both norms' outputs, qkv, rotated queries and keys, attention.
        return 2 * residual * D + low * ((8 + autocasts(cfg)) * D + 4 * F) + in_fp32 + _mask_bytes(cfg)
    if cfg.model.architecture == "alitok":
        # Each RMSNorm keeps its input and what it made of it in float32; of queries and keys the inputs are new only where
        # they are not float32 already. Then both norms' outputs, qkv, rotated queries and keys, attention and its copy.
        norms = _FP32 * D * (4 + (2 if low == _FP32 else 4))
        return norms + low * ((9 + autocasts(cfg)) * D + 4 * F) + _mask_bytes(cfg)
    attention = 3 + 2 + 1 + (not on_gpu)  # qkv, normalised queries and keys, attention, its copy
    if cfg.model.conditioning == "adaln":
        # The stream twice, both norms; both scales plus 1, both modulated inputs, both gated outputs, six chunks.
        modulated = 2 + 2 + 2 + 6 + autocasts(cfg)  # and, under autocast, a cast of the condition
        return D * (4 * residual + low * (modulated + attention)) + low * 2 * F + in_fp32 + _mask_bytes(cfg)
    return D * (2 * residual + low * (2 + attention)) + low * 2 * F + in_fp32 + _mask_bytes(cfg)


def _products(cfg: ExperimentConfig) -> int:
    """Bytes per position of matrix products and attention alone: what selective recomputation keeps."""
    D, F = cfg.model.width, mlp_width(cfg)
    modulation = 6 * D if _modulated(cfg) else 0
    hidden = 2 * F if cfg.model.architecture == "alitok" else F
    return compute_itemsize(cfg) * (3 * D + D + D + D + hidden + modulation)


def _end_bytes(cfg: ExperimentConfig) -> int:
    """Final norm, logits in float32, their gradient and its cast, and the condition with its SiLU for blocks and end."""
    D, low, residual = cfg.model.width, compute_itemsize(cfg), _residual_width(cfg)
    final = residual * D + low * D
    if _modulated(cfg):
        final += residual * D * (1 + 4) + low * D
    if cfg.model.architecture == "alitok":
        final += _FP32 * D
    logits = (2 * _FP32 + (low if low < _FP32 else 0)) * cfg.tokenizer.codebook_size
    return cfg.train.micro_batch_size * cfg.tokenizer.num_tokens * (final + logits)


def _modulated(cfg: ExperimentConfig) -> bool:
    return cfg.model.architecture != "alitok" and cfg.model.conditioning == "adaln"


def _mask_bytes(cfg: ExperimentConfig) -> int:
    """Of dropout after projection, feed-forward's activation (AliTok's has none) and its output: one byte per element."""
    if not cfg.model.dropout:
        return 0
    return 2 * cfg.model.width + (0 if cfg.model.architecture == "alitok" else mlp_width(cfg))


def _residual_width(cfg: ExperimentConfig) -> int:
    return _FP32 if autocasts(cfg) else compute_itemsize(cfg)


def _positions(cfg: ExperimentConfig) -> int:
    return cfg.train.micro_batch_size * (cfg.tokenizer.num_tokens + (cfg.model.architecture != "alitok"))
