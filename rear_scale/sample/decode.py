"""Cached decoding with classifier-free guidance.

What does not depend on the tokens is computed once per batch: AdaLN's modulation is a function of class and position, so
it is a table over the batch's distinct classes and the null class. Keys and values are written into a cache that is
allocated once, and each step reads its live prefix alone.
"""

# B images, R = 2B rows under guidance (with class, then without) or B, U distinct classes, N tokens of an image,
# S = N + 1 positions, D width, H heads, K codes

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rear_scale import rng
from rear_scale.config import SampleConfig
from rear_scale.model.transformer import AdaLNTransformer
from rear_scale.sample.guidance import guidance_scale


class Decoder:
    """Draws token sequences from a model in eval mode. Image i has the same tokens in any batch of one size."""

    def __init__(self, model: AdaLNTransformer, cfg: SampleConfig) -> None:
        self.model, self.cfg = model, cfg
        self.scales = [guidance_scale(step, model.num_tokens, cfg.guidance) for step in range(model.num_tokens)]
        self.guided = any(scale != 1 for scale in self.scales)

    @torch.inference_mode()
    def generate(self, labels: Tensor, ids: Tensor) -> Tensor:
        """Token ids int64 [B, N] for class ids (int64 [B]); image ids (int64 [B]) choose the randomness."""
        state = _Decoding(self.model, labels, self.guided)
        tokens = torch.empty(len(labels), self.model.num_tokens, dtype=torch.int64, device=labels.device)
        for step in range(self.model.num_tokens):
            logits = state.next_logits(tokens[:, :step])
            tokens[:, step] = self.draw(self.guide(logits, step), ids, step)
        return tokens

    def guide(self, logits: Tensor, step: int) -> Tensor:
        """float32 [B, K] of the logits of all rows [R, K]: what the token is drawn from, temperature included."""
        logits = logits.float()
        if self.guided:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + (conditional - unconditional) * self.scales[step]
        return logits / self.cfg.temperature

    def draw(self, logits: Tensor, ids: Tensor, step: int) -> Tensor:
        """int64 [B], distributed as softmax(logits): argmax of logits plus Gumbel noise that belongs to (image, step)."""
        noise = rng.exponential(self.cfg.seed, rng.Purpose.SAMPLE_TOKEN, ids, step, logits.shape[1])
        return (logits - noise.log()).argmax(1)


class _Decoding:
    """One batch on its way: modulation tables, cache, and how many positions are in it."""

    def __init__(self, model: AdaLNTransformer, labels: Tensor, guided: bool) -> None:
        self.model = model
        # Row by row: its class, then the null class for the unguided half.
        row_classes = torch.cat([labels, torch.full_like(labels, model.null_class)]) if guided else labels
        classes, self.rows = row_classes.unique(return_inverse=True)
        embedding = model.class_embedding(classes)
        condition = model.condition(embedding, model.num_tokens + 1)
        self.modulations = [block.modulation(condition) for block in model.blocks]
        self.final_modulation = model.adaln_before_head.modulation(condition)
        self.positions = model.positions()
        self.prefix = torch.stack((model.cls_token[0].expand(len(self.rows), -1), embedding[self.rows]), dim=1)
        self.cache = [_Cache(len(self.rows), model.num_tokens + 1) for _ in model.blocks]
        self.length = 0

    def next_logits(self, tokens: Tensor) -> Tensor:
        """Logits [R, K] of the next token after tokens (int64 [B, t]), which grow by one token per call."""
        model, start = self.model, self.length
        x = self.prefix if start == 0 else model.embeddings(tokens[:, -1:]).repeat(len(self.rows) // len(tokens), 1, 1)
        end = start + x.shape[1]
        x = x + self.positions[:, start:end]
        for block, modulation, cache in zip(model.blocks, self.modulations, self.cache, strict=True):
            x = block.modulated(x, modulation[self.rows, start:end], cache.attend)
        self.length = end
        x = model.adaln_before_head.modulated(x[:, -1:], self.final_modulation[self.rows, end - 1 : end])
        return model.lm_head(x)[:, 0]


class _Cache:
    """Keys and values of one block, float [R, H, S, width of a head], allocated once."""

    def __init__(self, rows: int, positions: int) -> None:
        self.rows, self.positions, self.length = rows, positions, 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Appends the new positions and attends causally to all so far."""
        if self.length == 0:
            shape = (self.rows, key.shape[1], self.positions, key.shape[3])
            self.keys, self.values = key.new_empty(shape), value.new_empty(shape)
        start, end = self.length, self.length + key.shape[2]
        self.keys[:, :, start:end], self.values[:, :, start:end] = key, value
        self.length = end
        # The first call brings several positions, later ones a single one, which sees all: no mask either way.
        return F.scaled_dot_product_attention(
            query, self.keys[:, :, :end], self.values[:, :, :end], is_causal=start == 0 and end > 1
        )
