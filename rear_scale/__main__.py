"""The commands of the project: `python -m rear_scale COMMAND ...` runs the script of that name.

Under a launcher of ranks: `torchrun --nproc-per-node 8 -m rear_scale train ...`, `deepspeed --module rear_scale train ...`.
"""

from __future__ import annotations

import ast
import runpy
import sys

from rear_scale import places
from rear_scale.config.errors import InputError
from rear_scale.config.fields import suggest
from rear_scale.text_table import aligned

_USAGE = "usage: python -m rear_scale COMMAND ...    (COMMAND --help says what each takes)"


def main() -> None:
    """Runs the command that sys.argv names, which ends the process; lists all commands for --help."""
    words = sys.argv[1:]
    if words[:1] in (["-h"], ["--help"]):
        print(overview())
        return
    try:
        sys.argv = script_line(words)
    except InputError as error:
        _refuse(error)
    runpy.run_path(sys.argv[0], run_name="__main__")


def script_line(words: list[str]) -> list[str]:
    """The path of the command's script, then its arguments. Raises InputError for an unknown command."""
    # The deepspeed launcher puts its own option before the command.
    before = [word for word in words[:1] if word.startswith("--local_rank=")]
    words = words[len(before) :]
    known = places.commands()
    if not words:
        raise InputError(f"no command is given. Use one of {', '.join(known)}; --help says what each does")
    name, *arguments = words
    if name not in known:
        raise InputError(
            f"{name} is not a command{suggest(name, list(known)) or '.'} Use one of {', '.join(known)}; --help says what each "
            "does"
        )
    return [str(known[name]), *arguments, *before]


def overview() -> str:
    """One line for each command: its name and the first line of its script's docstring."""
    rows = []
    for name, path in places.commands().items():
        # Read, not imported: torch alone would take seconds.
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        rows.append([f"  {name}", text.partition("\n")[0]])
    return f"{_USAGE}\n\n{aligned(rows, left=(0, 1))}"


def _refuse(error: InputError) -> None:
    """Ends the process with the error as one line, of one rank alone."""
    from rear_scale import cli

    def refused() -> None:
        raise error

    cli.run(refused)


if __name__ == "__main__":
    main()
