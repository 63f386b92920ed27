"""Progress bars and messages on stderr: a bar redrawn in place in a terminal, a line every ten seconds in a log file."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

from tqdm import tqdm

_LOG_INTERVAL_S = 10.0
# Of the environment: lines in a terminal too, because other processes write to it as well.
LINES_VARIABLE = "REAR_PROGRESS_LINES"


def progress(description: str, total: int, unit: str, *, done: int = 0, show: bool = True) -> tqdm[Any]:
    """A tqdm bar on stderr, with rate and time left; show: false on ranks other than 0.

    Set postfixes with refresh=False: in a log file every refresh becomes a line.
    """
    live = sys.stderr.isatty() and LINES_VARIABLE not in os.environ
    return tqdm(
        desc=description,
        total=total,
        initial=done,
        unit=unit,
        disable=not show,
        mininterval=0.2 if live else _LOG_INTERVAL_S,
        maxinterval=_LOG_INTERVAL_S,
        ascii=not live,
        dynamic_ncols=live,
        file=sys.stderr if live else _Lines(),
    )


class _Lines:
    """A file for tqdm without a terminal: each refresh becomes a line, because a log file cannot be redrawn."""

    def write(self, text: str) -> None:
        text = text.strip("\r\n")
        if text:
            print(text, file=sys.stderr, flush=True)

    def flush(self) -> None:
        sys.stderr.flush()


def say(line: str) -> None:
    """Prints a line for the user to stderr, unbuffered."""
    print(line, file=sys.stderr, flush=True)


@cache
def say_once(line: str) -> None:
    """Prints a line as `say` does, but only the first time in this process."""
    say(line)


Say = Callable[[str], None]
