"""Files that anybody may have put there, or an accident changed: regular ones, of a sensible size; sealed lines."""

import json
import os
import stat
import zlib
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

from detune.errors import InputError

__all__ = ["MAX_JSON_BYTES", "open_regular", "read_regular", "seal", "unseal"]

MAX_JSON_BYTES = 32 * 2**20
"""The largest configuration, or index: that of some 300,000 tensors."""


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading that anybody may have put there.

    Raises:
        InputError: It is a pipe, a device or a socket, which can keep a reader waiting or never end.
        OSError: It cannot be opened.
    """
    # O_NONBLOCK: no wait for the other end of a pipe. The open file is asked what it is: the path may have changed.
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise InputError(f"{path} is no regular file", "expected bytes on a disk", "remove it from the model")


def read_regular(path: Path, most_bytes: int) -> bytes:
    """Read a small file that anybody may have written.

    Args:
        path: The file.
        most_bytes: Its largest sensible size.

    Raises:
        InputError: It is no regular file, or larger.
        OSError: It cannot be read.
    """
    with open_regular(path) as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise InputError(f"{path} is too large", f"expected at most {most_bytes} bytes", "do not trust its source")
    return content


def seal(content: Any) -> bytes:
    r"""Write a line of JSON behind its CRC-32, by which accidents are found.

    Example:
        >>> seal({"a": 1}), unseal(seal({"a": 1})), unseal(b'fba18e97 {"a": 2}\n')
        (b'fba18e97 {"a": 1}\n', {'a': 1}, None)
    """
    text = json.dumps(content).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def unseal(line: bytes) -> Any:
    """Return what a line of `seal` holds; None where it has changed since."""
    checksum, _, text = line.strip().partition(b" ")
    with suppress(ValueError, RecursionError):
        return json.loads(text) if checksum == b"%08x" % zlib.crc32(text) else None
    return None
