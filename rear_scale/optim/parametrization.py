"""Width scaling: what each parameter's initialization, learning rate and weight decay have to do with the model's width.

optim.parametrization=standard: nothing; every width has the same settings, as in the papers.

optim.parametrization=mup: the maximal update parametrization (muP; Yang et al. 2022, arXiv:2203.03466), under which the size of
activations and of their changes does not depend on the width, and the best learning rate hardly does. With n = model.width /
optim.base_width, a model of the base width is that of `standard`, with the same bits; others differ from it as follows.

    parameter                                      kind     initial values   learning rate   source
    embeddings of codes, mask token and classes    input    1                1               Table 3, input weights
    cls_token, position and timestep tables        input    1                1               Table 3, input weights
    biases, gains of norms                         input    1                1               Table 3, biases
    attn.qkv, attn.proj                            hidden   1 / sqrt(n)      1 / n           Table 3, hidden weights
    mlp.fc1, mlp.fc2; SwiGLU's w1, w2, w3          hidden   1 / sqrt(n)      1 / n           Table 3, hidden weights
    adaLN_modulation (D -> 6 D, final: D -> 2 D)   hidden   0 (AdaLN-zero)   1 / n           arXiv:2505.15270, Theorem 3.1
    attn.q_norm (gain, bias)                       queries  a                a               Definition 4.1: 1 / d attention
    lm_head, output; codebook_proj that is these   output   1 / n            1 / n           Table 3, output weights
    codebook_proj of the input                     input    1                1               Table 3, input weights
    first matrix of a head of the loss             output   1 / n            1 / n           Table 3, output weights
    other matrices of a head (sides are fixed)     input    1                1               no side grows

Tables and definitions without a number of their own are those of arXiv:2203.03466; factors multiply the values of `standard`.
Remarks on the choices:

- The output scale is in the weights. Table 8 of that paper multiplies the logits by 1 / n and leaves the output matrix alone;
  Table 3, used here, gives the same trajectory under Adam with neither (its Lemma J.1: a multiplier c in the forward pass is
  the same as initial values and learning rate times c). So is attention's: 1 / d instead of 1 / sqrt(d), with the factor
  a = sqrt(base head width / head width), is a factor of the normalized queries, which q_norm has learnable gain and bias for.
  A model of `mup` therefore has the forward pass of any other: sampling, cached decoding, kernels, checkpoints and files for
  the released loaders need to know nothing of it. The price: the gradient norm that optim.grad_clip compares counts the
  gradient of the output matrix n times as large as with Table 8's multiplier, which is as large as it is under `standard`.
- The input of AdaLN is SiLU(class embedding + timestep row): D wide, so its matrix is a hidden one. That muP's rules hold for
  DiT's AdaLN blocks, with normalized queries and keys too, is Theorem 3.1 of arXiv:2505.15270.
- Normalized queries and keys aligned by training have a product of up to d = head width, and at the start of about sqrt(d).
  Where heads grow in width (the papers have 16 at every size), 1 / sqrt(d) lets logits grow; where they grow in number
  (optim.base_num_heads), a is 1 and nothing changes. At the start, before they are aligned, wider heads have smaller logits.
- The reAR heads map D to a hidden width that stays, so their first matrix is an output matrix: with 1 / sqrt(n) its random part
  would send a gradient into the blocks that shrinks more slowly with the width than the gradient of the logits.
- Weight decay of AdamW is decoupled: an update shrinks a weight by lr x decay. With a factor f of the learning rate, decay is
  divided by f, so that lr x decay, the time over which weights are averaged, does not depend on the width (Wang and Aitchison
  2024, arXiv:2405.13698).
- A rule other than Adam's says how its update grows: Rule.width_exponent (rear_scale/optim/groups.py) replaces the 1 of the
  hidden matrices' 1 / n. An orthogonalized update has the spectral norm that arXiv:2310.17813 (condition 1) wants at any width,
  so 0; scaled to the entries' size of AdamW's update, it is sqrt(n) times too large, so 1/2.
- The feed-forward's hidden width counts as proportional to the width; RAR-XXL's (4.36 times its width) is 4% off in sqrt(n).
- Adam's epsilon stays 1e-8, and the depth has no rule: muP is about widths. Compare models of other depths with care.
- A projection of the codebook that is input and output at once (model.tie_codebook=both) would need two scales, and is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rear_scale.config import ExperimentConfig
from rear_scale.model.generator import is_head

# The output matrices by the start of their names.
_OUTPUTS = ("lm_head.", "output.")


@dataclass(frozen=True)
class Scale:
    """The factors of one parameter against optim.parametrization=standard."""

    kind: str  # input | hidden | output | queries
    init: float = 1.0  # of its initial values
    rate: float = 1.0  # of its learning rate


def kind_of(name: str, weight: Tensor, cfg: ExperimentConfig) -> str:
    """input, hidden, output or queries: how the sides of a parameter grow with the model's width. weight: not sharded."""
    if ".q_norm." in name:
        return "queries"
    if weight.ndim < 2:
        return "input"
    if is_head(name):
        reads_features = name.endswith("align_mlp.0.weight") or (
            "align_mlp" not in name and weight.shape[-1] == cfg.model.width
        )
        return "output" if reads_features else "input"
    if name.startswith("codebook_proj."):
        return "output" if cfg.model.tie_codebook == "output" else "input"
    if name.startswith(_OUTPUTS):
        return "output"
    return "hidden" if name.startswith("blocks.") or "adaLN_modulation" in name else "input"


def scale_of(name: str, weight: Tensor, cfg: ExperimentConfig, width_exponent: float = 1.0) -> Scale:
    """The factors of a parameter. width_exponent: Rule.width_exponent of its update."""
    kind = kind_of(name, weight, cfg)
    if cfg.optim.parametrization == "standard":
        return Scale(kind)
    growth = cfg.model.width / cfg.optim.base_width
    if kind == "hidden":
        return Scale(kind, growth**-0.5, growth**-width_exponent)
    if kind == "output":
        return Scale(kind, 1 / growth, 1 / growth)
    if kind == "queries":
        heads = cfg.optim.base_num_heads or cfg.model.num_heads
        shrunk = math.sqrt(cfg.optim.base_width / heads * cfg.model.num_heads / cfg.model.width)
        return Scale(kind, shrunk, shrunk)
    return Scale(kind)


@torch.no_grad()
def scale_initial_weights(model: nn.Module, cfg: ExperimentConfig) -> None:
    """Multiplies freshly initialized weights by their factors, in place; changes nothing under `standard`. The model must not
    be sharded yet."""
    for name, weight in model.named_parameters():
        factor = scale_of(name, weight, cfg).init
        if factor != 1:
            weight.mul_(factor)
