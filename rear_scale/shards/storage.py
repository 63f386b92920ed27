"""Access to shard folders that may be remote: a local path, a URL, or a `pipe:` command."""

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
    """The line that a dry run prints for a remote folder, because it runs no command and opens no connection."""
    return f"not checked in a dry run: {name}={folder}"


def address(folder: str, file: str) -> str:
    """The address of a file in a remote folder, as webdataset's openers take it."""
    if folder.startswith("pipe:"):
        if "{file}" not in folder:
            raise InputError(f"the folder {folder} has no place for the name of the file. Write {{file}} there")
        # The name comes from a manifest, which is untrusted, and goes into a shell command, perhaps inside of quotes: so no
        # character that a shell interprets is allowed.
        if not re.fullmatch(r"[\w.=+-]+", file, re.ASCII) or file.startswith("-"):
            raise InputError(
                f"{folder}: the shard name {ascii(file)} is not safe in a command. Name shards with letters, digits, '.', '_' "
                "and '-', as data/README.md says"
            )
        return folder.replace("{file}", shlex.quote(file))
    url = f"{folder.rstrip('/')}/{file}"
    # webdataset has no opener for s3://.
    return f"pipe:aws s3 cp --only-show-errors {shlex.quote(url)} -" if url.startswith("s3://") else url


def open_remote(folder: str, file: str) -> BinaryIO:
    """A stream of the bytes of a file. Raises InputError when its address cannot be opened."""
    url = address(folder, file)
    try:
        return gopen(url, "rb")
    except (ValueError, OSError) as error:
        raise InputError(
            f"{url} cannot be opened: {error}. Check the address, and that the tool for it is installed"
        ) from error


def read_remote(folder: str, file: str, most: int = MOST_JSON) -> bytes:
    """The bytes of a file. Raises InputError when it cannot be read, is empty, or is larger than `most` bytes."""
    try:
        with open_remote(folder, file) as stream:
            data = stream.read(most + 1)
            if len(data) > most:
                raise InputError(f"{address(folder, file)} returned more than {most:,} bytes. Is it the right folder?")
    except OSError as error:
        raise InputError(f"not found: {address(folder, file)} ({error}). Make or copy the shards first") from error
    if not data:
        raise InputError(f"not found: {address(folder, file)} returned nothing. Make or copy the shards first")
    return data
