"""A checkpoint's files, byte by byte: where the tensors lie in the weight files, and all the rest."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from detune.checkpoints import Checkpoint, MergedCheckpoint
from detune.checkpoints.entries import Entry
from detune.checkpoints.formats import read_header
from detune.checkpoints.paths import is_plain_path
from detune.checkpoints.side_files import require_own
from detune.errors import InputError, cannot_read
from detune.packing.manifest import Span

BLOCK_BYTES = 4 * 2**20


class Compressor(Protocol):
    """A compressor that takes data in blocks, as zstd's and zlib's do."""

    def compress(self, data: bytes, /) -> bytes:
        """Some of the output."""

    def flush(self) -> bytes:
        """The rest of it."""


@dataclass(frozen=True)
class Measured:
    """A file read once.

    Attributes:
        sha256: Its hash.
        compressed_bytes: What a compressor alone makes of it.
    """

    sha256: str
    compressed_bytes: int


@dataclass(frozen=True)
class WeightLayout:
    """The layout of a weight file.

    Attributes:
        spans: Tensors that are stored in one piece, none over another, in the order of their offsets.
        gaps: `(start, stop)` of the bytes between them: the header, and in a pickle all that is no weight.
    """

    spans: tuple[Span, ...]
    gaps: tuple[tuple[int, int], ...]


def all_files(model: Checkpoint) -> tuple[str, ...]:
    """Every file of a model, weights or not, relative to its root.

    Raises:
        InputError: It is merged on the fly, has a link to a directory or out of the model, a pipe or device, or a
            file whose name is not printable.
    """
    if isinstance(model, MergedCheckpoint):
        raise InputError(f"{model.spec} is no merged checkpoint", "it is merged on the fly", "pack base and adapter")
    if model.paths != (model.root,):
        return tuple(file.file for file in model.weight_files)
    found: list[str] = []
    for directory, folders, files in os.walk(model.root):
        links = [folder for folder in folders if (Path(directory) / folder).is_symlink()]
        if links:
            raise InputError(
                f"{Path(directory) / links[0]} is a link to a directory",
                "expected files, which a pack can hold",
                "replace the link by what it points to, or leave it out",
            )
        found += [(Path(directory) / file).relative_to(model.root).as_posix() for file in files]
    strange = next((file for file in found if not is_plain_path(file)), None)
    if strange is not None:
        raise InputError(
            f"{model.spec} has a file that no pack can hold",
            f"its name is {strange!r}, expected characters that are printed, and no backslash",
            "rename it, or leave it out",
        )
    # Weights may lie elsewhere: on a larger disk.
    for file in set(found) - {weights.file for weights in model.weight_files}:
        require_own(model.root, file)
    return tuple(sorted(found))


def weight_layout(model: Checkpoint, file: str) -> WeightLayout:
    """Find the tensors of a weight file.

    Args:
        model: The checkpoint.
        file: One of its weight files.

    Raises:
        InputError: The file can no longer be read.
    """
    path = model.root / file
    prefix = file[: file.rfind("/") + 1]
    spans: list[Span] = []
    gaps: list[tuple[int, int]] = []
    end = 0
    for entry in _in_one_piece(read_header(path).entries):
        # Names that share their bytes, as tied weights do in a pickle: the first of them tells.
        if entry.offset < end:
            continue
        gaps.append((end, entry.offset))
        spans.append(Span(prefix + entry.name, entry.offset))
        end = entry.offset + entry.nbytes
    gaps.append((end, path.stat().st_size))
    return WeightLayout(tuple(spans), tuple(gap for gap in gaps if gap[0] < gap[1]))


def between(path: Path, layout: WeightLayout) -> bytes:
    """The bytes of a weight file that belong to no tensor."""
    with _opened(path) as stream:
        return b"".join(_read(stream, start, stop) for start, stop in layout.gaps)


def measure(path: Path, compressor: Compressor) -> Measured:
    """Read a file once: its hash, and its size under a compressor."""
    digest, size = hashlib.sha256(), 0
    with _opened(path) as stream:
        for block in blocks(stream):
            digest.update(block)
            size += len(compressor.compress(block))
    return Measured(digest.hexdigest(), size + len(compressor.flush()))


def blocks(stream: IO[bytes]) -> Iterator[bytes]:
    """The content of a stream, a few megabytes at a time."""
    while block := stream.read(BLOCK_BYTES):
        yield block


def _in_one_piece(entries: Sequence[Entry]) -> Iterator[Entry]:
    return (entry for entry in entries if entry.stride is None and entry.nbytes)


def _read(stream: IO[bytes], start: int, stop: int) -> bytes:
    stream.seek(start)
    return stream.read(stop - start)


def _opened(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise cannot_read(path, error) from error
