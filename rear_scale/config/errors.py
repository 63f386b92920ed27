"""Errors caused by a user's input."""

from __future__ import annotations

from collections.abc import Callable


class InputError(ValueError):
    """Wrong input of a user. The launchers print the message as one line and exit with code 2."""


class UnknownLength(InputError):
    """The length of a run is given in epochs, but the number of images is unknown."""


def all_checks(*checks: Callable[[], object]) -> None:
    """Runs every check, and then raises one InputError with the messages of all that failed."""
    messages: dict[str, None] = {}
    for check in checks:
        try:
            check()
        except InputError as error:
            messages[str(error)] = None
    if messages:
        raise InputError(". ".join(text.rstrip(".") for text in messages))


def required_path(path: str | None, name: str) -> str:
    """A path of the config that the work at hand needs. Raises InputError, with the name of its field, where it is None."""
    if path is None:
        raise InputError(f"{name} is not set. Set it to a path: {name}=PATH")
    return path


def first_line(error: BaseException) -> str:
    """The first line of an error's message without its full stop, at most 300 characters; the name of its type if it is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".")
