"""Bytes of activations that a model keeps for its backward pass, from the numbers of elements per position and their itemsize.

The numbers were counted in the graphs that torch builds, for each type of device ("cpu" or "cuda"), because kernels differ. On a
GPU, attention writes its output into the buffer that the projection reads, and RMSNorm keeps its input alone; under autocast,
queries and keys are normalized, and kept, in float32.
"""

# B images of a micro-batch, N tokens of an image, S positions, D width, K codes, Z width of a code

from __future__ import annotations

from rear_scale.config import ExperimentConfig
from rear_scale.model import head_matrices, mlp_width
from rear_scale.objective.terms import Feature, terms_of
from rear_scale.parallel import facts

_FP32 = 4


def activation_bytes(cfg: ExperimentConfig, device: str = "cpu") -> int:
    """The bytes kept for one micro-batch at the peak of its backward pass, including heads and logits.

    Assumes a modulation row per image, the worst case. With activation checkpointing, the peak may be later: when logits and
    loss are freed and the activations of a recomputed block are added.
    """
    at_the_end = max(_end_bytes(cfg), _recomputed_bytes(cfg, device))
    return block_activation_bytes(cfg, device) + at_the_end + head_activation_bytes(cfg)


def compute_itemsize(cfg: ExperimentConfig) -> int:
    """The bytes of one number in matrix products."""
    return 2 if cfg.train.precision == "bf16" else _FP32


def autocasts(cfg: ExperimentConfig) -> bool:
    """Whether bf16 is done by autocast, which keeps the residual stream and the norms in float32."""
    return cfg.train.precision == "bf16" and facts.of(cfg.strategy).autocasts


def one_block_bytes(cfg: ExperimentConfig, device: str = "cpu") -> int:
    """The bytes kept by one block without recomputation."""
    return _positions(cfg) * _one_block(cfg, device)


def block_activation_bytes(cfg: ExperimentConfig, device: str = "cpu") -> int:
    """The bytes kept by all blocks from the forward pass."""
    one, depth, policy = one_block_bytes(cfg, device), cfg.model.depth, cfg.train.activation_checkpointing
    boundary = _positions(cfg) * cfg.model.width * _residual_itemsize(cfg)
    if policy == "none":
        return depth * one
    if policy == "full":
        return depth * boundary
    if policy == "every_n":
        recomputed = -(-depth // cfg.train.recompute_every_n)
        return (depth - recomputed) * one + recomputed * boundary
    return depth * (boundary + _positions(cfg) * _products(cfg))


def _recomputed_bytes(cfg: ExperimentConfig, device: str) -> int:
    """The additional bytes of the first block that the backward pass recomputes, beyond those kept by all blocks."""
    one, depth, policy = one_block_bytes(cfg, device), cfg.model.depth, cfg.train.activation_checkpointing
    if policy == "none":
        return 0
    if policy == "selective":
        return max(0, one - _positions(cfg) * _products(cfg))
    # The blocks after it, which are not recomputed, have been freed by then.
    done = (depth - 1) % cfg.train.recompute_every_n if policy == "every_n" else 0
    return max(0, (1 - done) * one)


def head_activation_bytes(cfg: ExperimentConfig) -> int:
    """The bytes kept by the reAR heads and their loss terms, and an estimate for other terms that read features."""
    heads, low = cfg.objective.heads, compute_itemsize(cfg)
    taps = sum(tap is not None for tap in (heads.encode_tap, heads.decode_tap))
    hidden = (4 if heads.form == "released" else 2) * heads.hidden  # input and output of each activation function
    tokens = cfg.tokenizer.num_tokens - (heads.positions == "eq6")
    # Their input, a slice of the sequence; features and directions of the cosine are float32.
    per_token = low * (cfg.model.width + hidden) + _FP32 * 2 * cfg.tokenizer.codebook_dim
    others = sum(_feature_bytes(cfg, one) for term in terms_of(cfg) if not term.built_in for one in term.features())
    return taps * cfg.train.micro_batch_size * tokens * per_token + others


def _feature_bytes(cfg: ExperimentConfig, feature: Feature) -> int:
    """The bytes of a feature: a slice of the sequence, and each layer's output of its head (or the slice), also in float32."""
    low, outputs = compute_itemsize(cfg), sum(shape[0] for shape in head_matrices(feature))
    per_token = low * cfg.model.width + (low + _FP32) * outputs + (0 if outputs else _FP32 * cfg.model.width)
    return cfg.train.micro_batch_size * cfg.tokenizer.num_tokens * per_token


def _one_block(cfg: ExperimentConfig, device: str) -> int:
    """The bytes per position of a block without recomputation."""
    D, F, low, residual = cfg.model.width, mlp_width(cfg), compute_itemsize(cfg), _residual_itemsize(cfg)
    on_gpu = device == "cuda"
    in_fp32 = _FP32 * 2 * D if on_gpu and autocasts(cfg) else 0  # queries and keys, the inputs of their norms
    if cfg.model.architecture == "alitok" and on_gpu:
        # The residual stream twice; the outputs of both norms, qkv, rotated queries and keys, attention.
        return 2 * residual * D + low * ((8 + autocasts(cfg)) * D + 4 * F) + in_fp32 + _mask_bytes(cfg)
    if cfg.model.architecture == "alitok":
        # Each RMSNorm keeps its input and its result in float32; the inputs of the norms of queries and keys are copies only
        # where they are not float32. Then the outputs of both norms, qkv, rotated queries and keys, attention and its copy.
        norms = _FP32 * D * (4 + (2 if low == _FP32 else 4))
        return norms + low * ((9 + autocasts(cfg)) * D + 4 * F) + _mask_bytes(cfg)
    attention = 3 + 2 + 1 + (not on_gpu)  # qkv, normalized queries and keys, attention, its copy
    if cfg.model.conditioning == "adaln":
        # The residual stream twice, both norms; both 1 + scale, both modulated inputs, both gated outputs, six chunks.
        modulated = 2 + 2 + 2 + 6 + autocasts(cfg)  # and, under autocast, a cast of the condition
        return D * (4 * residual + low * (modulated + attention)) + low * 2 * F + in_fp32 + _mask_bytes(cfg)
    return D * (2 * residual + low * (2 + attention)) + low * 2 * F + in_fp32 + _mask_bytes(cfg)


def _products(cfg: ExperimentConfig) -> int:
    """The bytes per position of the outputs of matrix products and attention, which selective recomputation keeps."""
    D, F = cfg.model.width, mlp_width(cfg)
    modulation = 6 * D if _modulated(cfg) else 0
    hidden = 2 * F if cfg.model.architecture == "alitok" else F
    return compute_itemsize(cfg) * (3 * D + D + D + D + hidden + modulation)


def _end_bytes(cfg: ExperimentConfig) -> int:
    """The bytes of final norm, float32 logits, their gradient and its cast, and the condition with its SiLU."""
    D, low, residual = cfg.model.width, compute_itemsize(cfg), _residual_itemsize(cfg)
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
    """The bytes per position of dropout masks, one per element: of projection, activation (not AliTok's) and feed-forward."""
    if not cfg.model.dropout:
        return 0
    return 2 * cfg.model.width + (0 if cfg.model.architecture == "alitok" else mlp_width(cfg))


def _residual_itemsize(cfg: ExperimentConfig) -> int:
    return _FP32 if autocasts(cfg) else compute_itemsize(cfg)


def _positions(cfg: ExperimentConfig) -> int:
    return cfg.train.micro_batch_size * (cfg.tokenizer.num_tokens + (cfg.model.architecture != "alitok"))
