"""The identity of a model's content, without reading it: what a run that was cut off is known again by."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from detune.checkpoints.formats import WEIGHT_SUFFIXES
from detune.checkpoints.source import Checkpoint
from detune.errors import cannot_read

__all__ = ["identity"]

_SUFFIXES = (".json", *WEIGHT_SUFFIXES)
# A fine-tune of the same size and age as another is told from it by some of its bytes: those of a model that was
# unpacked from an archive, for instance, which may set all files to one date.
_SAMPLES = 16
_SAMPLE_BYTES = 4096


def identity(model: Checkpoint) -> str:
    """Compute a digest of a model's tensors, files, their sizes and times, and samples of their bytes.

    The time of a file alone would not do, as copies and archives may keep or set it; a hash of the whole would cost as
    much as the run. The same files on another machine, by another path, have the same identity.

    Args:
        model: Any checkpoint; one on the Hub is known by its commit.

    Returns:
        Hexadecimal digits.

    Raises:
        InputError: A file can no longer be read.
    """
    digest = hashlib.sha256()
    for name, info in model.tensors.items():
        digest.update(_bytes(f"{name}\0{info.shape}\0{info.dtype}\0{info.file}\n"))
    for path in model.paths:
        # The directory of a Hub snapshot has its commit for a name.
        digest.update(_bytes(path.resolve().name))
    for path in _files(model):
        try:
            _add_file(digest, path)
        except OSError as error:
            raise cannot_read(path, error) from error
    return digest.hexdigest()


def _files(model: Checkpoint) -> Iterator[Path]:
    """Files that a model may be read from: those beside its weights and its adapter's."""
    places = [path.resolve() for path in model.paths]
    yield from (path for path in places if path.is_file())
    folders = {path for path in places if path.is_dir()}
    folders |= {(model.root / file.file).parent.resolve() for file in model.weight_files if folders}
    for folder in sorted(folder for folder in folders if folder.is_dir()):
        yield from sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES and path.is_file())


def _add_file(digest: "hashlib._Hash", path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        status = os.fstat(descriptor)
        digest.update(_bytes(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\n"))
        step = max(status.st_size // _SAMPLES, _SAMPLE_BYTES)
        for start in range(0, status.st_size, step):
            digest.update(os.pread(descriptor, _SAMPLE_BYTES, start))
    finally:
        os.close(descriptor)


def _bytes(text: str) -> bytes:
    """Names of files may hold bytes that are no text."""
    return text.encode(errors="surrogateescape")
