"""The file of a pack: a zip archive whose members are zstd frames, and one of JSON that tells what they are."""

import io
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from detune._runtime import needs_extra
from detune.errors import InputError, parsing
from detune.files import open_regular
from detune.packing.layout import Compressor

LEVEL = 1
"""zstd's fastest level. The bytes of weights repeat nothing that a longer search would find."""

USUAL_LEVEL = 3
"""zstd's own level by default: a pack is compared with that."""

MANIFEST = "manifest.json"

# Some 400,000 tensors in all models together.
MAX_MANIFEST_BYTES = 64 * 2**20

_DAMAGED = "copy the pack again, or pack the models anew"


class ArchiveWriter:
    """Writes the members one after the other. A context manager.

    Args:
        path: The file to write.

    Raises:
        DetuneError: The extra `pack` is not installed.
    """

    def __init__(self, path: Path) -> None:
        with needs_extra("pack"):
            import zstandard
        self._compressor = zstandard.ZstdCompressor(level=LEVEL)
        self._usual = zstandard.ZstdCompressor(level=USUAL_LEVEL)
        self._zip = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED)
        self.sizes: dict[str, int] = defaultdict(int)

    def add(self, member: str, data: bytes) -> int:
        """Compress one member.

        Args:
            member: Its name; what stands before its first slash is a kind, over which `sizes` are summed up.
            data: Its content.

        Returns:
            Its compressed size in bytes.
        """
        frame = self.compressed(data)
        self.add_frame(member, frame)
        return len(frame)

    def compressed(self, data: bytes) -> bytes:
        """A frame that `add_frame` takes."""
        frame: bytes = self._compressor.compress(data)
        return frame

    def add_frame(self, member: str, frame: bytes) -> None:
        """Add a member that is compressed already."""
        self._zip.writestr(zipfile.ZipInfo(member), frame)
        self.sizes[member.partition("/")[0]] += len(frame)

    def compressor(self) -> Compressor:
        """Compress a file by zstd alone, block by block."""
        return self._usual.compressobj()

    def add_stream(self, member: str, stream: IO[bytes]) -> None:
        """Compress one member block by block."""
        with self._zip.open(zipfile.ZipInfo(member), "w", force_zip64=True) as target:
            _, written = self._compressor.copy_stream(stream, target)
        self.sizes[member.partition("/")[0]] += written

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._zip.close()


class ArchiveReader:
    """Reads the members of a pack. A context manager.

    Args:
        path: The file.

    Attributes:
        path: As given.
        size_bytes: Its size.

    Raises:
        InputError: It is no pack, or is damaged.
        DetuneError: The extra `pack` is not installed.
    """

    def __init__(self, path: Path) -> None:
        with needs_extra("pack"):
            import zstandard
        self.path = path
        self._decompressor = zstandard.ZstdDecompressor()
        with parsing(path, _DAMAGED):
            open_regular(path).close()
            self.size_bytes = path.stat().st_size
            try:
                self._zip = zipfile.ZipFile(path)
            except zipfile.BadZipFile as error:
                raise InputError(f"{path} is no pack, or is truncated", str(error), _DAMAGED) from error

    def read(self, member: str, what: str, size_bytes: int) -> bytes:
        """One member.

        Args:
            member: Its name.
            what: What it is to the user, for messages: a tensor, a file.
            size_bytes: Its size, as the manifest has it; no more is read.

        Raises:
            InputError: It is missing or damaged, or has another size.
        """
        with self.open(member, what) as stream:
            data = stream.read(size_bytes + 1)
            if len(data) != size_bytes:
                raise ValueError(
                    f"{member} has {'more' if len(data) > size_bytes else len(data)} of {size_bytes} bytes"
                )
        return data

    def read_manifest(self) -> bytes:
        """The member that tells what the others are.

        Raises:
            InputError: It is missing or damaged, or larger than `MAX_MANIFEST_BYTES`.
        """
        with self.open(MANIFEST, "the manifest") as stream:
            data = stream.read(MAX_MANIFEST_BYTES + 1)
            if len(data) > MAX_MANIFEST_BYTES:
                raise ValueError(f"it has more than {MAX_MANIFEST_BYTES} bytes")
        return data

    @contextmanager
    def open(self, member: str, what: str) -> Iterator[IO[bytes]]:
        """One member, to be read in blocks; see `read`."""
        with self.checked(what), self._zip.open(member) as frame, self._decompressor.stream_reader(frame) as stream:
            yield io.BufferedReader(stream)

    def checked(self, what: str) -> AbstractContextManager[None]:
        """Name the pack and `what` where its content cannot be made sense of."""
        return parsing(f"{what} in {self.path}", _DAMAGED)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._zip.close()
