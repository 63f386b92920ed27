"""Progress bars: live in a terminal, a line now and then in a log file, nothing on ranks other than 0."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

from tqdm import tqdm

_LOG_INTERVAL_S = 10.0


def progress(description: str, total: int, unit: str, *, done: int = 0, show: bool = True) -> tqdm[Any]:
    """A tqdm bar on stderr, with rate and time left. Update postfixes with refresh=False: a log file gets every refresh."""
    live = sys.stderr.isatty()
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
    """Where there is no terminal to redraw on, each refresh becomes a line of its own."""

    def write(self, text: str) -> None:
        text = text.strip("\r\n")
        if text:
            print(text, file=sys.stderr, flush=True)

    def flush(self) -> None:
        sys.stderr.flush()


def say(line: str) -> None:
    """A line for the user, on stderr and at once."""
    print(line, file=sys.stderr, flush=True)


@cache
def say_once(line: str) -> None:
    """As `say`, but only the first time in this process."""
    say(line)


Say = Callable[[str], None]
