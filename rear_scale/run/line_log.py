"""Log files that survive a full disk: errors do not end the run, lines are buffered in memory, and no line is incomplete."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from rear_scale.progress import say

_MOST_KEPT = 10_000  # buffered lines


class LineLog:
    """A log file. Lines that a full or failing disk does not take are buffered and written with a later line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: list[str] = []
        self.dropped = 0
        self.failing = False

    def append(self, line: str) -> None:
        """Writes a line after the buffered ones. Reports the first failure, and the first success after it."""
        self.waiting.append(line)
        if len(self.waiting) > _MOST_KEPT:
            self.waiting.pop(0)
            self.dropped += 1
        try:
            self._write("".join(f"{text}\n" for text in self.waiting).encode())
        except OSError as error:
            if not self.failing:
                say(f"{self.path}: {error.strerror}. Its lines are kept in memory until there is space")
            self.failing = True
            return
        if self.failing:
            say(f"{self.path}: written again, with {len(self.waiting) - 1} lines from memory{self._lost()}")
        self.failing, self.waiting = False, []

    def close(self) -> None:
        """Tries once more to write buffered lines, and reports how many are lost."""
        if self.waiting:
            self.append(self.waiting.pop())
        if self.waiting:
            say(f"{self.path}: {len(self.waiting)} lines could not be written{self._lost()}")

    def _lost(self) -> str:
        return f"; {self.dropped} older ones were dropped" if self.dropped else ""

    def _write(self, data: bytes) -> None:
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            end = _cut_torn_line(handle)
            try:
                while data:
                    data = data[os.write(handle, data) :]
            except OSError:
                with suppress(OSError):
                    os.ftruncate(handle, end)
                raise
        finally:
            os.close(handle)


def _cut_torn_line(handle: int) -> int:
    """The size of the file, after removing an incomplete last line, which a killed process or a full disk has left."""
    end = size = os.lseek(handle, 0, os.SEEK_END)
    while end:
        start = max(0, end - 4096)
        last = os.pread(handle, end - start, start).rfind(b"\n")
        if last >= 0:
            end = start + last + 1
            break
        end = start
    if end < size:
        os.ftruncate(handle, end)
    return end
