"""DeepSpeed ZeRO stages 1 to 3."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rear_scale.optim.deepspeed_adam import deepspeed
from rear_scale.optim.groups import prepare_states, set_rates
from rear_scale.optim.posthoc_ema import averages, new_fractions
from rear_scale.parallel.strategy import Compute, StateName, Strategy
from rear_scale.parallel.zero import BUCKET_ELEMENTS, stage_of

# isort: split
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import combine_grad_norm_groups, get_global_norm_of_tensors
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

# Kept to restore it: ZeRO-3 replaces this function for the whole process.
_LINEAR = torch.nn.functional.linear


class DeepSpeedStrategy(Strategy):
    """ZeRO: shards optimizer state (stage 1), gradients too (stage 2), and weights too (stage 3). bf16 weights with float32
    master weights and gradient sums.

    At stage 1 in bf16 DeepSpeed uses another optimizer wrapper (BF16_Optimizer) than in all other cases.
    """

    @property
    def stage(self) -> int:
        return stage_of(self.cfg)

    def build(self, model: nn.Module) -> None:
        # Uses the existing process group.
        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)
        self.model = model.to(self.world.device)
        # DeepSpeed prints some memory reports at every log level.
        with contextlib.redirect_stdout(io.StringIO()):
            self.engine, _, _, _ = deepspeed.initialize(
                model=self.model,
                optimizer=self.make_optimizer(self.model),
                config=self._config(),
                dist_init_required=False,
            )
        if self.stage < 3 or self._keeps_products:
            torch.nn.functional.linear = _LINEAR
        self.zero = self.engine.optimizer
        self._prepare_states(0)
        # Averages of the weights are stored as more optimizer states, so that DeepSpeed shards and offloads them like the others.
        for average in averages(self.cfg.optim):
            for flat in self._master_partitions():
                self.zero.optimizer.state[flat][average] = flat.detach().clone()

    @property
    def _keeps_products(self) -> bool:
        return self.cfg.train.activation_checkpointing == "selective"

    @property
    def _defers(self) -> bool:
        """Whether stage 2 or 3 reduces gradients only after the last micro-step. Stage 1 does so in any case."""
        return self.stage > 1 and self.plan.accumulation > 1 and self.cfg.strategy.defer_reduction

    def _config(self) -> dict[str, Any]:
        train = self.cfg.train
        # To defer the reduction, coalesce_grad_reduction surrounds all backward passes of an update; the engine then must not
        # count micro-steps itself.
        accumulation = 1 if self._defers else self.plan.accumulation
        offload = {"offload_optimizer": {"device": "cpu"}} if self.cfg.strategy.cpu_offload else {}
        return {
            "train_batch_size": train.micro_batch_size * self.world.size * accumulation,
            "train_micro_batch_size_per_gpu": train.micro_batch_size,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": self.cfg.optim.grad_clip,
            "bf16": {"enabled": train.precision == "bf16"},
            # Without these two, bf16 gradients are summed in bf16, over micro-steps and over ranks.
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
            "zero_optimization": {
                "stage": self.stage,
                "reduce_bucket_size": BUCKET_ELEMENTS,
                "allgather_bucket_size": BUCKET_ELEMENTS,
                "overlap_comm": self.world.device.type == "cuda",
                # False: a bucket is reduced to the rank that owns it, instead of all-reduced.
                "use_multi_rank_bucket_allreduce": False,
                # DeepSpeed's own linear layer adds its bias in place. Selective recomputation keeps the product before the
                # bias and would add it a second time.
                "memory_efficient_linear": not self._keeps_products,
                **offload,
            },
            # Offloaded states are updated by torch's fused AdamW for CPUs; DeepSpeed's own needs a compiler.
            "zero_force_ds_cpu_optimizer": False,
            # DeepSpeed accepts Adam and few other optimizers by default; any elementwise rule works on flat partitions.
            "zero_allow_untested_optimizer": True,
            "steps_per_print": None,
        }

    def forward_backward(self, compute: Compute, micro_step: int) -> Tensor:
        last = micro_step == self.plan.accumulation - 1
        if self._defers and micro_step == 0:
            self.deferred = contextlib.ExitStack()
            self.deferred.enter_context(self.engine.coalesce_grad_reduction())
        loss, statistics = compute(self.engine)
        if self._defers:
            self.engine.backward(loss / self.plan.accumulation)
            if last:
                self.deferred.close()
            return statistics
        self.engine.backward(loss)  # divides by the number of micro-steps
        if not last:
            self.engine.step()  # before the last micro-step this only counts micro-steps
        return statistics

    def grad_norm(self) -> Tensor:
        # DeepSpeed computes the gradient norm inside step(); it is needed earlier, to decide whether to step at all. Where its
        # method can be replaced, it is made to return the known norm, so that step() does not compute it again.
        zero = self.zero
        if isinstance(zero, BF16_Optimizer):
            norm = torch.as_tensor(get_global_norm_of_tensors(zero.get_grads_for_norm()[0], mpu=zero.mpu))
            # DeepSpeed returns -1 for a norm that is not finite.
            return norm.where(norm >= 0, torch.inf)
        if self.stage == 3:
            norm = combine_grad_norm_groups(type(zero)._get_norm_groups(zero))
            zero._get_norm_groups = lambda: [norm]
        else:
            norm = type(zero).scaled_global_norm(zero)
            zero.scaled_global_norm = lambda: norm
        norm = torch.as_tensor(norm)
        return norm.where(norm >= 0, torch.inf)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        for name, weight in self.model.named_parameters():
            gradient = safe_get_full_grad(weight)
            if gradient is not None:
                yield name, gradient

    def step(self, lr: float) -> None:
        set_rates(self.zero.optimizer, lr)
        self.engine.step()
        self.updates += 1
        self._average()

    @torch.no_grad()
    def _average(self) -> None:
        masters = self._master_partitions()
        for average, fraction in new_fractions(self.cfg.optim, self.updates).items():
            values = [self.zero.optimizer.state[flat][average] for flat in masters]
            torch._foreach_lerp_(values, masters, fraction)

    @torch.no_grad()
    def evaluate(self, compute: Compute) -> Tensor:
        self.engine.eval()
        _, statistics = compute(self.engine)
        self.engine.train()
        return statistics

    def skip(self) -> None:
        zero = self.zero
        if isinstance(zero, BF16_Optimizer):
            zero.step = lambda closure=None: (zero.clear_hp_grads(), zero.clear_lp_grads())
            self.engine.step()
            del zero.step
            return
        # DeepSpeed itself clears all its gradient buffers when the norm is infinite.
        infinite = torch.tensor(torch.inf, device=self.world.device)
        if self.stage == 3:
            zero._get_norm_groups = lambda: [infinite]
        else:
            zero.scaled_global_norm = lambda: infinite
            zero.check_grad_overflow = True
        self.engine.step()
        if self.stage < 3:
            zero.check_grad_overflow = False

    def tensors(self, state_name: StateName) -> Iterator[tuple[str, Tensor]]:
        self._relink()
        for name, weight in self.parameters_with(state_name):
            full = (
                safe_get_full_fp32_param(weight)
                if state_name == "param"
                else safe_get_full_optimizer_state(weight, state_name)
            )
            assert full is not None, (name, state_name, self.stage)
            yield name, full

    def load_tensors(self, state_name: StateName, read: Callable[[str], Tensor], optimizer_step: int) -> None:
        self.updates = optimizer_step
        if state_name != "param":
            self._prepare_states(optimizer_step)
        self._relink()
        for name, weight in self.parameters_with(state_name):
            value = read(name).to(self.world.device)
            if self.stage == 3:
                self._set_partition(weight, value, state_name)
            elif state_name == "param":
                safe_set_full_fp32_param(weight, value)
            else:
                safe_set_full_optimizer_state(weight, value, state_name)

    def _set_partition(self, weight: nn.Parameter, value: Tensor, state_name: StateName) -> None:
        # DeepSpeed's function that sets a full value fails where the value does not divide evenly among the ranks.
        size = weight.ds_tensor.numel()  # type: ignore[attr-defined]  # the engine adds it at stage 3
        padded = torch.nn.functional.pad(value.flatten(), (0, size * self.world.size - value.numel()))
        partition = padded.narrow(0, size * self.world.rank, size)
        if state_name == "param":
            safe_set_local_fp32_param(weight, partition)
        else:
            safe_set_local_optimizer_state(weight, partition, state_name)

    def _prepare_states(self, optimizer_step: int) -> None:
        base = self.zero.optimizer
        for index, flat in enumerate(self._master_partitions()):
            group = base.param_groups[self.zero.sub_group_to_group_id[index] if self.stage == 3 else index]
            prepare_states(base, group["rule"], flat, optimizer_step)

    def _master_partitions(self) -> list[Tensor]:
        """This rank's flat float32 master weights, one per parameter group (or, at stage 3, sub-group)."""
        if isinstance(self.zero, BF16_Optimizer):
            return self.zero.fp32_groups_flat_partition
        return self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups

    def _relink(self) -> None:
        # With several parameter groups DeepSpeed links the optimizer states of the later groups before they exist, and never
        # again; link them anew.
        if self.stage < 3:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()
