"""The first value of a step that is not finite: its module, its position, and the sample behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rear_scale.objective import MicroBatch
from rear_scale.replay.recorder import Recorder, Row
from rear_scale.shards.reader import TokenSet
from rear_scale.train.guard import shard_positions
from rear_scale.world import World


@dataclass(frozen=True)
class Sample:
    """A sample of the training set. label: its class before label dropout; position: the token concerned, if that is known."""

    id: int
    label: int
    class_name: str
    shard: str  # file and position in it
    position: int | None = None

    def in_words(self) -> str:
        where = "" if self.position is None else f", token {self.position}"
        name = f" ({self.class_name})" if self.class_name else ""
        return f"sample {self.id} ({self.shard}), class {self.label}{name}{where}"


@dataclass(frozen=True)
class Fault:
    """A value with entries that are not finite, and the sample at the first of them, where it belongs to one."""

    row: Row
    sample: Sample | None

    def in_words(self) -> str:
        key, first = self.row.key, self.row.first
        kind = {"input": "", "loss": "", "output": "the output of "}.get(key.what, f"the {key.what} of ")
        at = f" at {list(first)} of {list(self.row.shape)}" if first else ""
        where = "" if key.micro_step < 0 else f" in micro-step {key.micro_step} on rank {key.rank}"
        share = "" if self.row.nonfinite == 1 else f" ({self.row.nonfinite:.2g} of its values)"
        sample = f": {self.sample.in_words()}" if self.sample else ""
        return f"step {self.row.step}: {kind}{key.name} is not finite{at}{share}{where}{sample}"


def faults(recorder: Recorder, tokens: TokenSet, folder: str, world: World) -> list[Fault]:
    """The first fault of the recorded step over all ranks and, where that is a weight or the codebook, the first one that it
    causes in the passes; empty without any. All ranks must call this, and all get the same.

    recorder: of one step, with `only_faults`. folder: data.train, for the names of shards.
    """
    candidates = []
    for wanted in (None, ("output", "loss", "gradient")):
        rows = [row for row in recorder.rows if row.nonfinite and (wanted is None or row.key.what in wanted)]
        own = min(rows, key=lambda row: row.key.order, default=None)
        found = None if own is None else Fault(own, _sample(own, recorder, tokens, folder))
        everywhere = [one for one in world.gather(found) if one is not None]
        candidates += sorted(everywhere, key=lambda fault: (fault.row.key.order, fault.row.key.rank))[:1]
    return candidates[:1] if candidates[1:] == candidates[:1] else candidates


def _sample(row: Row, recorder: Recorder, tokens: TokenSet, folder: str) -> Sample | None:
    key = row.key
    if not 0 <= key.micro_step < len(recorder.batches):
        return None
    batch, position = recorder.batches[key.micro_step], None
    if key.what == "loss":
        if recorder.lost is None:
            return None
        index = recorder.lost[0]
        codebook = [one for one in recorder.rows if one.key.name == "codebook" and one.first]
        if codebook and codebook[0].first:
            uses = (batch.tokens[index] == codebook[0].first[0]).nonzero()
            position = int(uses[0, 0]) if len(uses) else None
    else:
        found = _index(row, batch)
        if found is None:
            return None
        index = found
    number = int(batch.ids[index])
    label = int(tokens.labels_of(batch.ids[index : index + 1])[0])
    names: list[Any] = tokens.manifest.class_names
    name = str(names[label]) if label < len(names) else ""
    shard = shard_positions([number], tokens.manifest.shards, folder)
    return Sample(number, label, name, shard, position)


def _index(row: Row, batch: MicroBatch) -> int | None:
    """The index in the micro-batch of the image that an entry belongs to; None where it belongs to none."""
    if row.first is None or not row.shape or row.key.name.startswith("codebook"):
        return None
    first = row.first[0]
    of_classes = "adaLN_modulation" in row.key.name or (row.key.name == "embeddings" and len(row.shape) == 2)
    if of_classes and batch.class_index is not None and row.shape[0] == len(batch.classes):
        # Rows are distinct classes: the first image of this one.
        return int((batch.class_index == first).nonzero()[0, 0])
    return first if row.shape[0] == len(batch.ids) else None
