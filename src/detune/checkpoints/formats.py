"""The formats of weight files: their names, their suffixes, and what reads a header of each.

A header is the place of every tensor, found without reading a single weight. Every format ends in the same table of
`Entry`, so that everything after this module reads with plain `pread`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import IO

from detune.checkpoints.entries import Header
from detune.checkpoints.gguf_header import read_gguf
from detune.checkpoints.safetensors_file import read_safetensors
from detune.checkpoints.torch_archive import read_torch_archive
from detune.errors import parsing
from detune.files import open_regular

__all__ = [
    "FORMATS",
    "GGUF",
    "SAFETENSORS",
    "WEIGHT_SUFFIXES",
    "Format",
    "format_of",
    "read_header",
    "safetensors_name",
]


@dataclass(frozen=True)
class Format:
    """A format of weight files.

    Attributes:
        name: What people call it.
        suffixes: Of its files.
        read: Reads the header of a file: from its path, for messages, and the opened file.
        in_directories: The suffix, without the point, of the files that libraries look for in a model's directory;
            empty where they look for none.
    """

    name: str
    suffixes: tuple[str, ...]
    read: Callable[[Path, IO[bytes]], Header]
    in_directories: str = ""


SAFETENSORS = Format("safetensors", (".safetensors",), read_safetensors, "safetensors")
TORCH = Format("torch.save", (".bin", ".pt", ".pth", ".ckpt"), read_torch_archive, "bin")
GGUF = Format("GGUF", (".gguf",), read_gguf)

FORMATS = (SAFETENSORS, TORCH, GGUF)
"""All that are read; of a directory that holds several, the first counts."""

WEIGHT_SUFFIXES = tuple(suffix for form in FORMATS for suffix in form.suffixes)


def format_of(file: str | PurePath) -> Format | None:
    """The format of a file by its suffix; None where no format has it."""
    return next((form for form in FORMATS if PurePath(file).suffix in form.suffixes), None)


def read_header(path: Path) -> Header:
    """Read the header of a weight file.

    Args:
        path: A file of one of `FORMATS`; with any other suffix it is read as safetensors.

    Returns:
        The table of tensors.

    Raises:
        InputError: The file cannot be read, is damaged, or holds something other than plain tensors.
    """
    with parsing(path), open_regular(path) as file:
        return (format_of(path) or SAFETENSORS).read(path, file)


def safetensors_name(file: str) -> str:
    """Name a weight file or index as safetensors would.

    Args:
        file: A path such as `unet/pytorch_model-00001-of-00002.bin` or `pytorch_model.bin.index.json`.

    Returns:
        The path with the name Hugging Face libraries look for, here `unet/model-00001-of-00002.safetensors`.
    """
    path = PurePosixPath(file)
    name = path.name
    if name.endswith(".json"):
        name = name.replace(".bin.index.", ".safetensors.index.")
    elif format_of(path) not in (None, SAFETENSORS):
        name = path.stem + ".safetensors"
    if name != path.name and name.startswith("pytorch_model"):
        name = name.removeprefix("pytorch_")
    return str(path.with_name(name))
