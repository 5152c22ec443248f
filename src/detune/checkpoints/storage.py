"""Storage of a checkpoint's files: a directory here, or a repository of the Hub (`remote`)."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from detune.checkpoints.blocks import file_hash, read_into
from detune.checkpoints.entries import Header
from detune.checkpoints.formats import read_header

__all__ = ["ByteRange", "LocalFiles", "Storage"]


@dataclass(frozen=True)
class ByteRange:
    """Bytes of a file to read.

    Attributes:
        offset: The first, counted from the start of the file.
        memory: Where they go, and how many there are.
    """

    offset: int
    memory: memoryview


class Storage(Protocol):
    """The protocol of a place where a checkpoint's files are. Safe to use from several threads."""

    @property
    def root(self) -> Path:
        """A directory with at least the small files: configuration, indices, tokenizer."""
        ...

    def names(self, directory: str) -> list[str] | None:
        """The names of the files in a directory below the root, "" being the root; None where there is none."""
        ...

    def where(self, file: str) -> str:
        """A file's place, for messages."""
        ...

    def header(self, file: str) -> Header:
        """The header of a weight file.

        Raises:
            InputError: It cannot be read, or is damaged.
        """
        ...

    def read(self, file: str, parts: Iterable[ByteRange], name: str) -> None:
        """Read parts of a file; `name` is the tensor's, for messages.

        Raises:
            InputError: The file can no longer be read.
        """
        ...

    def sha256(self, file: str) -> str:
        """A file's SHA-256, in hexadecimal.

        Raises:
            InputError: The file can no longer be read.
        """
        ...

    def known_sha256(self, file: str) -> str | None:
        """The hash where it is known without reading the file; None where it is not."""
        ...


class LocalFiles:
    """Files in a directory of this machine.

    Args:
        root: The directory.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self, directory: str) -> list[str] | None:
        """See `Storage.names`."""
        path = self.root / directory
        return [child.name for child in path.iterdir() if child.is_file()] if path.is_dir() else None

    def where(self, file: str) -> str:
        """See `Storage.where`."""
        return str(self.root / file)

    def header(self, file: str) -> Header:
        """See `Storage.header`."""
        return read_header(self.root / file)

    def read(self, file: str, parts: Iterable[ByteRange], name: str) -> None:
        """See `Storage.read`."""
        for part in parts:
            read_into(self.root / file, part.offset, part.memory, name)

    def sha256(self, file: str) -> str:
        """See `Storage.sha256`."""
        return file_hash(self.root / file)

    def known_sha256(self, file: str) -> None:
        """Nothing is known of a file here before it is read; see `Storage.known_sha256`."""
