"""Errors that a user can do something about."""

from __future__ import annotations

from collections.abc import Callable


class InputError(ValueError):
    """Something that a user can get wrong. The launchers print it as one line and exit with code 2."""


class UnknownLength(InputError):
    """A run in epochs of a set that is not there."""


def all_checks(*checks: Callable[[], object]) -> None:
    """Runs every check. Raises one InputError that says what all of them found, so that a user meets it at once."""
    found: dict[str, None] = {}
    for check in checks:
        try:
            check()
        except InputError as error:
            found[str(error)] = None
    if found:
        raise InputError(". ".join(text.rstrip(".") for text in found))


def first_line(error: BaseException) -> str:
    """The first line of what an error says, at most 300 characters without its full stop; its type's name if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".")
