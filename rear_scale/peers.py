"""Error messages that name the rank that has ended and why, raised by the ranks that notice a broken connection."""

from __future__ import annotations

import re
import threading
import time
from contextlib import suppress

import torch.distributed as dist

_BEAT_S = 2.0
_SILENT_BEATS = 3  # a rank that misses this many heartbeats is assumed to have ended
# Collectives report a connection closed by another rank in many different words.
_BROKEN = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|broken pipe|socket|recvvalue|unhandled system error", re.I
)


class LostRanks(RuntimeError):
    """A collective failed because other ranks have ended. The message names them.

    first: whether this rank is the first of its machine to notice. Only its message is printed, once for the whole machine.
    """

    def __init__(self, message: str, first: bool) -> None:
        super().__init__(message)
        self.first = first


class Peers:
    """The other ranks of a world, as recorded in the key-value store: machine, heartbeat, and the reason a rank ended."""

    def __init__(self, store: dist.Store, rank: int, size: int, machine: str) -> None:
        self.rank, self.size, self.machine = rank, size, machine
        # A separate connection: the process group's connection may be blocked waiting for a key.
        self.store = dist.PrefixStore("rear_scale/peers", store.clone())  # type: ignore[attr-defined]  # absent from torch's stub
        self.store.set(f"machine/{rank}", machine)
        self.first_machine = self.store.get("machine/0").decode()
        self.told = False
        self.stopped = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def close(self) -> None:
        """Ends the heartbeat."""
        self.stopped.set()

    def tell(self, reason: str) -> None:
        """Records in the store why this rank ends, the first time it is called. Never raises."""
        if not self.told:
            self.told = True
            with suppress(RuntimeError):
                self.store.set(f"end/{self.rank}", " ".join(reason.split())[:500])

    def explained(self, error: BaseException) -> BaseException:
        """LostRanks, where the error was caused by other ranks that have ended; else the error itself, after recording it in
        the store for the other ranks."""
        if isinstance(error, LostRanks):
            return error
        if isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or _BROKEN.search(str(error))):
            lost = self.lost()
            if lost is not None:
                return LostRanks(lost, self._is_first())
        if not isinstance(error, SystemExit):
            self.tell(f"{type(error).__name__}: {error}")
        return error

    def lost(self) -> str | None:
        """A sentence on which ranks have ended and why; None when all are alive. Takes some seconds (missed heartbeats)."""
        try:
            self.store.set(f"lost/{self.rank}", "")
            before, end = self._beats(), time.monotonic() + _SILENT_BEATS * _BEAT_S
            while time.monotonic() < end:
                if said := self._said():
                    return said
                time.sleep(_BEAT_S / 10)
            now = self._beats()
            gone = [rank for rank in range(self.size) if now.get(rank) == before.get(rank) and rank != self.rank]
            gone = [rank for rank in gone if not self.store.check([f"lost/{rank}"])]
            if not gone:
                return None
            named = ", ".join(f"rank {rank} on {self._machine_of(rank)}" for rank in gone[:4])
            more = f" and {len(gone) - 4} more" if len(gone) > 4 else ""
            return (
                f"{named}{more} ended without giving a reason (no heartbeat): killed, out of memory, or its machine failed. "
                "The other ranks end, too"
            )
        except RuntimeError:
            # The store runs in the process of rank 0, or in its launcher.
            return (
                f"rank 0 on {self.first_machine} or its launcher has ended, and with it the key-value store of the ranks. "
                "The other ranks end, too"
            )

    def _said(self) -> str | None:
        for rank in range(self.size):
            if rank != self.rank and self.store.check([f"end/{rank}"]):
                reason = self.store.get(f"end/{rank}").decode()
                return f"rank {rank} on {self._machine_of(rank)} has ended: {reason}. The other ranks end, too"
        return None

    def _is_first(self) -> bool:
        with suppress(RuntimeError):
            return self.store.add(f"said/{self.machine}", 1) == 1
        return True

    def _machine_of(self, rank: int) -> str:
        return (
            self.store.get(f"machine/{rank}").decode()
            if self.store.check([f"machine/{rank}"])
            else "an unknown machine"
        )

    def _beats(self) -> dict[int, bytes]:
        keys = {rank: f"beat/{rank}" for rank in range(self.size)}
        return {rank: self.store.get(key) for rank, key in keys.items() if self.store.check([key])}

    def _beat(self) -> None:
        count = 0
        with suppress(RuntimeError):  # the store is closed; a collective of the main thread fails for the same reason
            while not self.stopped.wait(_BEAT_S if count else 0):
                count += 1
                self.store.set(f"beat/{self.rank}", str(count))
