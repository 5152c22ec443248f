"""Files that anybody may have put there: regular ones, of a sensible size."""

import os
import stat
from io import BufferedReader
from pathlib import Path

from detune.errors import InputError

__all__ = ["MAX_JSON_BYTES", "open_regular", "read_regular"]

MAX_JSON_BYTES = 32 * 2**20
"""The largest configuration, or index: that of some 300,000 tensors."""


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading that anybody may have put there.

    Raises:
        InputError: It is a pipe, a device or a socket, which can keep a reader waiting or never end.
        OSError: It cannot be opened.
    """
    # Without waiting for the other end of a pipe; and what was opened is asked, not what is there now.
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
