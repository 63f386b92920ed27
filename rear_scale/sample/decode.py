"""Decoding with a KV cache and classifier-free guidance.

Tensors that do not depend on the tokens are computed once per batch (`Generator.decoding`). Keys and values are written into a
cache that is allocated once, of which each step reads only the filled part (rear_scale/sample/cached.py). On GPUs, the blocks of
a step are compiled (rear_scale/sample/compiled.py).
"""

# B images, R = 2B rows under guidance (with class, then without) or B, N tokens of an image, K codes

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rear_scale import rng
from rear_scale.config import PermutationConfig, SampleConfig
from rear_scale.model import Generator
from rear_scale.objective import permutation
from rear_scale.sample.batch import Batch
from rear_scale.sample.cached import Cache, CachedDecoding, new_caches
from rear_scale.sample.compiled import CompiledBlocks, compiles_steps
from rear_scale.sample.graphs import CudaGraph, GraphedSteps
from rear_scale.sample.guidance import guidance_scale
from rear_scale.sample.packed import packed_for_decoding

NEAR_TIE = 1e-4  # smaller differences between the two largest logits with noise count as near ties
_NOISE_STEPS = 16
_NOISE_NUMBERS = 2**23  # upper bound of random numbers computed at once, as 64-bit words take memory
# Upper bound on the error of a logit difference, in units of eps * max|logit|. Measured on the top-2 codes of models with 6 to
# 24 blocks against a run in higher precision: 2.7 in bfloat16, where outputs are rounded; 10.2 in float32, where accumulation
# dominates.
_ROUNDINGS = {torch.bfloat16: 4.0, torch.float32: 16.0}


class Decoder:
    """Samples token sequences from a model in eval mode. Image i has the same tokens in any batch of the same size.

    permuted: the orders of prediction of the training; sample.order, if set, replaces their final order. compiled: whether
    steps are compiled; None = as sample.compile says, see `compiles_steps`.
    """

    def __init__(
        self,
        model: Generator,
        cfg: SampleConfig,
        permuted: PermutationConfig | None = None,
        *,
        compiled: bool | None = None,
    ) -> None:
        self.cfg, self.permuted = cfg, permuted or PermutationConfig()
        self.scales = [guidance_scale(step, model.num_tokens, cfg.guidance) for step in range(model.num_tokens)]
        self.guided = any(scale != 1 for scale in self.scales)
        self.caches: list[Cache] | None = None
        self.near_ties: Tensor | None = None
        self.within_rounding: Tensor | None = None
        dtype = next(model.parameters()).dtype
        self.error = _ROUNDINGS.get(dtype, _ROUNDINGS[torch.float32]) * torch.finfo(dtype).eps
        if compiled is None:
            weight = next(model.parameters())
            compiled = compiles_steps(cfg.compile, type(model), weight.device, weight.dtype)
        self.compiled = CompiledBlocks(model) if compiled else None
        if self.compiled is None:
            model = packed_for_decoding(model, cfg.batch_size * (2 if self.guided else 1))
        self.model = model.with_fixed_codes()
        self.graphed: GraphedSteps | None = None
        if cfg.cuda_graphs and next(model.parameters()).device.type == "cuda":
            self.graphed = GraphedSteps(self._draw_steps, CudaGraph)

    @torch.inference_mode()
    def generate(self, labels: Tensor, ids: Tensor) -> Tensor:
        """Token ids int64 [B, N], as the tokenizer stores them, for class ids (int64 [B]).

        Image ids (int64 [B]) select the random numbers. Sets near_ties (int64 [B]) to the number of tokens of each image whose
        two best logits differ by less than NEAR_TIE, and within_rounding (int64 [B]) to the number for which they differ by
        less than `rounding`. In all measurements, another precision changed only tokens of the latter.
        """
        order = self.orders(ids)
        batch = Batch(self.model, labels, ids, order, self.guided)
        if self.graphed is not None:
            batch = self.graphed(batch)
        else:
            self._draw_steps(batch, range(batch.num_tokens))
        # Copies, because the next batch may be computed in the same memory.
        self.near_ties, self.within_rounding = batch.near_ties.clone(), batch.within_rounding.clone()
        return permutation.in_place(batch.tokens.clone(), order)

    def _draw_steps(self, batch: Batch, steps: range) -> None:
        """Samples the tokens of these steps of a batch. Must not synchronize with the GPU (CUDA graphs record it)."""
        if steps.start == 0:
            caches = self._caches_for(len(batch.class_index))
            batch.state = CachedDecoding(self.model, batch, caches, self.compiled)
            batch.near_ties.zero_()
            batch.within_rounding.zero_()
        assert batch.state is not None, "the first step comes first"
        for step, noise in self.with_noise(batch.ids, steps):
            logits = batch.state.next_logits(batch.tokens[:, :step])
            best, codes = (self.guide(logits, step) - noise).topk(2)
            batch.tokens[:, step] = codes[:, 0]
            gap = best[:, 0] - best[:, 1]
            batch.near_ties += gap < NEAR_TIE
            batch.within_rounding += gap < self.rounding(logits, step)

    def with_noise(self, ids: Tensor, steps: range) -> Iterator[tuple[int, Tensor]]:
        """Yields (step, noise). The noise of several steps is computed at once, because it takes a hundred small operations."""
        K = self.model.shape.codebook_size
        at_once = max(1, min(_NOISE_STEPS, _NOISE_NUMBERS // (len(ids) * K)))
        for start in range(steps.start, steps.stop, at_once):
            some = range(start, min(start + at_once, steps.stop))
            numbers = torch.arange(some.start, some.stop, device=ids.device)[:, None].expand(-1, len(ids))
            noise = self._noise(ids.expand_as(numbers).flatten(), numbers.flatten(), K)
            yield from zip(some, noise.view(len(some), len(ids), K), strict=True)

    def _caches_for(self, rows: int) -> list[Cache]:
        if self.caches is None or len(self.caches[0].keys) != rows:
            self.caches = None  # free the old caches before allocating new ones
            self.caches = new_caches(self.model, rows, compiled=self.compiled is not None)
        return self.caches

    def orders(self, ids: Tensor) -> Tensor | None:
        """The order of prediction of each image, int64 [B or 1, N]; None = as tokens are stored."""
        name, layout = self.cfg.order or self.permuted.order, self.model.shape
        if name == "random":
            first = permutation.fixed_prefix(self.permuted.prefix, layout)
            return permutation.sampling_orders(ids, self.cfg.seed, layout.num_tokens, first)
        return permutation.fixed_order(name, layout, ids.device)

    def guide(self, logits: Tensor, step: int) -> Tensor:
        """The logits to sample from, float32 [B, K], after guidance, temperature, top_k and top_p. logits: [R, K], all rows."""
        logits = logits.float()
        if self.guided:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + (conditional - unconditional) * self.scales[step]
        return top_k_top_p(logits / self.cfg.temperature, self.cfg.top_k, self.cfg.top_p)

    def rounding(self, logits: Tensor, step: int) -> Tensor:
        """Upper bound of the rounding error of a difference of two logits of `guide`, in the model's precision: float32 [B].

        logits: [R, K], all rows. Guidance multiplies the errors of the two halves by their weights in the guided sum.
        """
        largest = logits.abs().amax(1).float()
        if self.guided:
            (conditional, unconditional), scale = largest.chunk(2), self.scales[step]
            largest = abs(scale) * conditional + abs(1 - scale) * unconditional
        return largest * (self.error / self.cfg.temperature)

    def draw(self, logits: Tensor, ids: Tensor, step: int) -> Tensor:
        """Sampled codes int64 [B], distributed as softmax(logits)."""
        return self.add_gumbel(logits, ids, step).argmax(1)

    def add_gumbel(self, logits: Tensor, ids: Tensor, step: int) -> Tensor:
        """Logits plus Gumbel noise of (image, step), float32 [B, K]. The index of the largest is the sampled code."""
        return logits - self._noise(ids, step, logits.shape[1])

    def _noise(self, ids: Tensor, steps: Tensor | int, count: int) -> Tensor:
        """Negative Gumbel noise, float32 [I, count], to be subtracted from logits."""
        return rng.exponential(self.cfg.seed, rng.Purpose.SAMPLE_TOKEN, ids, steps, count).log()


def top_k_top_p(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Logits float32 [B, K] with -inf for codes outside of the top_k, and for codes not needed to reach the probability top_p."""
    if top_k is not None and top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, codes = logits.sort(dim=1, descending=True, stable=True)
        before = ordered.softmax(1).cumsum(1) - ordered.softmax(1)
        logits = logits.masked_fill(
            torch.zeros_like(logits, dtype=torch.bool).scatter(1, codes, before >= top_p), -torch.inf
        )
    return logits
