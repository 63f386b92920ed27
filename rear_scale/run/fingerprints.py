"""Fingerprints of a run's start: data, tokenizer, codebook, first weights and the order of the first batches.

launchers/compare.py reads them, to say where two runs began to differ. They cost one pass over the weights on rank 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rear_scale.config import ExperimentConfig
from rear_scale.model import Generator
from rear_scale.shards.reader import TokenSet

NAME = "fingerprints.json"
BATCHES = 8  # global batches whose samples are recorded
_PART = 2**22  # values at once, because a part takes eight bytes for each
_FACTOR = 0x2545F4914F6CDD1D  # odd, so that every product with an odd number can be undone
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(tensor: Tensor) -> str:
    """16 hexadecimal digits that depend on every bit of a tensor and on the order of its values, computed on its device.

    A change of one value always changes them, and other changes do unless by a chance of about 2**-64.
    """
    values = tensor.detach().contiguous().reshape(-1)
    bits = values.view(_INTEGERS[values.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, len(bits), _PART):
        part = bits[start : start + _PART].to(torch.int64)
        factors = torch.arange(start, start + len(part), device=bits.device).mul_(2).add_(1).mul_(_FACTOR)
        total += factors.mul_(part).sum()  # modulo 2**64
    return f"{total.item() % 2**64:016x}"


def of_start(
    cfg: ExperimentConfig, tokens: TokenSet, codebook: Tensor, model: Generator, step: int
) -> dict[str, object]:
    """The fingerprints of a run that begins after `step` updates: 0, or those of the training that it continues.

    model: with its first weights, before an engine wraps it. The order is that of the samples of whole batches before
    data.group_by_class sorts them, which needs no labels.
    """
    order = tokens.order(cfg.train.global_batch_size, cfg.run.seed)
    batches = [order.global_batch(number) for number in range(step + 1, step + 1 + BATCHES)]
    return {
        "step": step,
        "data": tokens.manifest.fingerprint,
        "samples": len(tokens),
        "tokenizer": tokens.manifest.tokenizer_sha256,
        "codebook": digest(codebook),
        "weights": {name: digest(weight) for name, weight in model.named_parameters()},
        "order": [digest(torch.stack(batch)) for batch in batches],
    }
