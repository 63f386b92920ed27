"""Shard folders that may lie elsewhere: a local path, a URL, or a `pipe:` command."""

# A folder is "s3://bucket/tokens", "https://host/tokens", ..., or "pipe:ssh host cat tokens/{file}".

from __future__ import annotations

import re
import shlex
from typing import BinaryIO

from webdataset import gopen

from rear_scale.config import InputError, is_remote
from rear_scale.untrusted import MOST_JSON

__all__ = ["address", "is_remote", "not_checked", "open_remote", "read_remote"]


def not_checked(name: str, folder: str) -> str:
    """What a dry run says of a remote folder: it runs no command and opens no connection."""
    return f"not checked in a dry run: {name}={folder}"


def address(folder: str, file: str) -> str:
    """What webdataset's openers take for a file of a remote folder."""
    if folder.startswith("pipe:"):
        if "{file}" not in folder:
            raise InputError(f"the folder {folder} does not say where the file's name goes. Write it as {{file}}")
        # The name stands in a manifest, and the command may have it in quotes already: no character of a shell is let through.
        if not re.fullmatch(r"[\w.=+-]+", file, re.ASCII) or file.startswith("-"):
            raise InputError(
                f"{folder}: the shard {ascii(file)} does not go into a command. Name shards with letters, digits, '.', '_' "
                "and '-', as data/README.md says"
            )
        return folder.replace("{file}", shlex.quote(file))
    url = f"{folder.rstrip('/')}/{file}"
    # webdataset has no opener of its own for s3.
    return f"pipe:aws s3 cp --only-show-errors {shlex.quote(url)} -" if url.startswith("s3://") else url


def open_remote(folder: str, file: str) -> BinaryIO:
    """A stream of a file's bytes. Raises InputError when there is no opener for such an address."""
    url = address(folder, file)
    try:
        return gopen(url, "rb")
    except (ValueError, OSError) as error:
        raise InputError(
            f"{url} cannot be opened: {error}. Check the address and that its tool is installed"
        ) from error


def read_remote(folder: str, file: str, most: int = MOST_JSON) -> bytes:
    """A whole file of at most `most` bytes. Raises InputError when it cannot be read, is empty or larger."""
    try:
        with open_remote(folder, file) as stream:
            data = stream.read(most + 1)
            if len(data) > most:
                raise InputError(f"{address(folder, file)} gives more than {most:,} bytes. Is it the right folder?")
    except OSError as error:
        raise InputError(f"not found: {address(folder, file)} ({error}). Make or copy the shards first") from error
    if not data:
        raise InputError(f"not found: {address(folder, file)} gave nothing. Make or copy the shards first")
    return data
