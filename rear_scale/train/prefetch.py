"""The micro-batches of a training step, prepared in a thread while the steps before it run."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

from torch import Tensor

from rear_scale.config import ExperimentConfig, Plan
from rear_scale.objective import MicroBatch, Objective
from rear_scale.shards.reader import TokenSet
from rear_scale.train.setup import data_order
from rear_scale.world import World


class Prefetcher:
    """An iterator over steps' micro-batches, prepared ahead in one thread: reads tokens, drops labels, pins memory."""

    def __init__(
        self,
        cfg: ExperimentConfig,
        plan: Plan,
        world: World,
        tokens: TokenSet,
        objective: Objective,
        first: int,
        data_offset: int,
    ) -> None:
        self.order = data_order(cfg, tokens, objective)
        self.plan, self.world, self.tokens, self.objective = plan, world, tokens, objective
        self.steps = range(first + data_offset, plan.last_step + data_offset + 1)
        self.ready: queue.Queue[list[MicroBatch] | BaseException] = queue.Queue(maxsize=2)
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Iterator[list[MicroBatch]]:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopped.set()
        while self.thread.is_alive():
            try:
                self.ready.get(timeout=0.1)
            except queue.Empty:
                continue

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return self

    def __next__(self) -> list[MicroBatch]:
        item = self.ready.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def _run(self) -> None:
        try:
            for step in self.steps:
                batches = [self._prepare(ids, epochs) for ids, epochs in self._rank_batches(step)]
                if self.stopped.is_set():
                    return
                self.ready.put(batches)
        except BaseException as error:
            self.ready.put(error)

    def _rank_batches(self, step: int) -> list[tuple[Tensor, Tensor]]:
        return self.order.rank_batches(step, self.world.rank, self.world.size, self.plan.accumulation)

    def _prepare(self, ids: Tensor, epochs: Tensor) -> MicroBatch:
        tokens, labels = self.tokens.rows(ids)
        batch = self.objective.micro_batch(tokens, labels, ids, epochs)
        return batch.pinned() if self.world.device.type == "cuda" else batch
