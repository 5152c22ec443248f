"""The one way from a name that stands in a file to a path that is written.

Names in files are anybody's: of tensors, components, shards, packed files. None of them may lead a write elsewhere.
"""

import unicodedata
from pathlib import Path, PurePath, PurePosixPath

from detune.errors import InputError

__all__ = ["folded", "inside", "is_plain_path", "plain_name"]

# File systems take 255, and what is made of a name adds to it.
_MOST_BYTES = 200


def is_plain_path(path: str) -> bool:
    r"""Whether a relative path is nothing but names, one inside the other.

    Example:
        >>> [is_plain_path(path) for path in ("unet", "docs/a.txt", "../a", "/a", "a//b", "./a", "a\n", "a\\b", "")]
        [True, True, False, False, False, False, False, False, False]
    """
    names = path.split("/")
    return path.isprintable() and "\\" not in path and not {"", ".", ".."}.intersection(names)


def plain_name(text: str) -> str:
    r"""A text as the name of a file or directory: hyphens for what no name should hold, and not too long.

    Example:
        >>> plain_name("my model"), plain_name("a/b\\c\x1b[1m"), plain_name(".."), len(plain_name("x" * 300))
        ('my model', 'a-b-c-[1m', '--', 200)
    """
    shown = "".join(each if each.isprintable() and each not in "/\\" else "-" for each in text)
    shown = shown.encode()[:_MOST_BYTES].decode(errors="ignore") or "-"
    return shown.replace(".", "-") if shown in (".", "..") else shown


def folded(name: str) -> str:
    r"""A name as file systems compare it that take large and small letters, or two spellings of an accent, for one.

    Example:
        >>> folded("Caf\u00e9") == folded("cafe\u0301")
        True
    """
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def inside(directory: Path, relative: str | PurePath) -> Path:
    """The path of what is to be written in a directory, and nowhere else.

    Args:
        directory: The directory that is being filled.
        relative: Where in it, as a file says it.

    Returns:
        `directory / relative`.

    Raises:
        InputError: It would lead outside: by its name, or by a link that is in the way.

    Example:
        >>> inside(Path("out"), "unet/model.safetensors").as_posix()
        'out/unet/model.safetensors'
    """
    text = PurePosixPath(relative).as_posix() if isinstance(relative, PurePath) else relative
    path = directory / text
    root = directory.resolve()
    if not is_plain_path(text) or path.is_symlink() or not path.parent.resolve().is_relative_to(root):
        raise InputError(
            f"{text!r} would be written outside {directory}",
            "expected names of files and directories in it",
            "do not trust where it comes from",
        )
    return path
