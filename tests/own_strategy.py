"""A strategy in one file: DistributedDataParallel whose gradients travel as 16-bit floats, its formulas and its row."""

from __future__ import annotations

from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

from rear_scale.parallel import ddp, facts
from rear_scale.parallel.communication import Traffic
from rear_scale.parallel.memory import Memory, Update


class HalfGradients(ddp.DDPStrategy):
    def build(self, model: nn.Module) -> None:
        super().build(model)
        self.engine.register_comm_hook(None, fp16_compress_hook)


def memory(update: Update) -> Memory:
    return ddp.memory(update)


def traffic(update: Update) -> Traffic:
    found = ddp.traffic(update)
    return Traffic(found.calls, type(found.payload)({kind: size // 2 for kind, size in found.payload.items()}))


facts.register(
    facts.Facts(
        name="ddp_fp16",
        engine=f"{__name__}:HalfGradients",
        formulas=__name__,
        title="torch DistributedDataParallel, gradients in 16 bits",
        fewest_ranks=2,
        autocasts=True,
    )
)
