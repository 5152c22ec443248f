"""Unpack a pack to the files, byte by byte."""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from detune._runtime import OnStart
from detune.checkpoints import inside, new_directory
from detune.checkpoints.blocks import memory_of
from detune.checkpoints.disk import require_space
from detune.documents import document, to_json
from detune.errors import InputError
from detune.packing.archive import ArchiveReader
from detune.packing.codec import decode_factors, decode_residual, decode_tensor
from detune.packing.layout import blocks
from detune.packing.manifest import Manifest, PackedFile, PackedModel, TensorCoding
from detune.packing.prediction import predict
from detune.problem.stack import matricise

# Five fine-tunes of one base take a sixth of their size; a hundred that nobody changed, about a hundredth.
MAX_GROWTH = 1000
# Fewer bytes do no harm, whatever it was.
SMALL_BYTES = 64 * 2**20


@dataclass(frozen=True)
class UnpackReport:
    """The outcome of `unpack`.

    Attributes:
        models: The directory of each model, by its name.
        files: Number of files restored; each has the hash it was packed with.
        size_bytes: Their size.
        seconds: Wall time.
    """

    models: dict[str, str]
    files: int
    size_bytes: int
    seconds: float

    def to_json(self) -> str:
        """The report as JSON."""
        return to_json(document("detune-unpack/1", asdict(self)))


def unpack(
    pack: str | Path,
    out: str | Path,
    *,
    on_start: OnStart | None = None,
    on_file: Callable[[str, PackedFile | None], None] | None = None,
) -> UnpackReport:
    """Restore the checkpoints of a pack, every file byte for byte, each in a directory of its own below `out`.

    Every file is checked against the hash that it was packed with before `out` appears.

    Args:
        pack: The file.
        out: The directory to make.
        on_start: For progress: called once with the files, and the size of each in bytes.
        on_file: Called with a file's name and None when it is begun, and with what the pack says of it when it is done.

    Returns:
        What was restored.

    Raises:
        InputError: It is no pack, or is damaged.
        OutputError: `out` exists, or cannot be written.
        DetuneError: The extra `pack` is not installed.

    Example:
        >>> unpack("fine-tunes.detune", "fine-tunes").models  # doctest: +SKIP
        {'ft-a': 'fine-tunes/ft-a', 'ft-b': 'fine-tunes/ft-b'}
    """
    started = time.perf_counter()
    with ArchiveReader(Path(pack).expanduser()) as archive, new_directory(out) as partial:
        contents = Contents(archive)
        require_space(Path(out), contents.size_bytes)
        models = contents.manifest.models
        if on_start:
            on_start({f"{model.name}/{file.path}": file.size_bytes for model in models for file in model.files})
        for model in models:
            for file in model.files:
                name = f"{model.name}/{file.path}"
                if on_file:
                    on_file(name, None)
                path = inside(partial, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("xb") as stream:
                    for block in contents.checked(model, file):
                        stream.write(block)
                if on_file:
                    on_file(name, file)
    return UnpackReport(
        {model.name: str(Path(out) / model.name) for model in models},
        sum(len(model.files) for model in models),
        contents.size_bytes,
        time.perf_counter() - started,
    )


class Contents:
    """The models of an opened pack.

    Args:
        archive: The pack.

    Attributes:
        manifest: What is in it.
        size_bytes: Size of all its files together.

    Raises:
        InputError: The manifest is damaged, or of another format.
    """

    def __init__(self, archive: ArchiveReader) -> None:
        self._archive = archive
        with archive.checked("the manifest"):
            self.manifest = Manifest.from_json(archive.read_manifest())
        self.size_bytes = sum(file.size_bytes for model in self.manifest.models for file in model.files)
        most_bytes = max(MAX_GROWTH * archive.size_bytes, SMALL_BYTES)
        if self.size_bytes > most_bytes:
            raise InputError(
                f"{archive.path} would grow from {archive.size_bytes} bytes to {self.size_bytes}",
                f"expected at most {MAX_GROWTH} times as much",
                "do not trust where it comes from",
            )

    def checked(self, model: PackedModel, file: PackedFile) -> Iterator[bytes | memoryview]:
        """The bytes of a file, block by block.

        Args:
            model: A model of the manifest.
            file: A file of it.

        Yields:
            Its blocks.

        Raises:
            InputError: The pack is damaged: after the last block, where the hash is not that of the file.
        """
        digest, left = hashlib.sha256(), file.size_bytes
        for block in self._restored(model, file):
            left -= len(block)
            if left < 0:
                break
            digest.update(block)
            yield block
        if left:
            raise InputError(
                f"{file.path!r} of {model.name} does not come back from {self._archive.path}",
                f"it has {'more' if left < 0 else file.size_bytes - left} of {file.size_bytes} bytes",
                "copy the pack again, or pack the models anew",
            )
        if digest.hexdigest() != file.sha256:
            raise InputError(
                f"{file.path!r} of {model.name} does not come back from {self._archive.path}",
                f"its SHA-256 is {digest.hexdigest()}, expected {file.sha256}",
                "copy the pack again, or pack the models anew",
            )

    def _restored(self, model: PackedModel, file: PackedFile) -> Iterator[bytes | memoryview]:
        what = f"file {file.path!r} of {model.name}"
        if not file.spans:
            with self._archive.open(file.member, what) as stream:
                yield from blocks(stream)
            return
        tensors_bytes = sum(model.tensors[span.tensor].nbytes(self.manifest.base) for span in file.spans)
        between = self._archive.read(file.member, what, file.size_bytes - tensors_bytes)
        position = used = 0
        for span in file.spans:
            gap = span.offset - position
            yield between[used : used + gap]
            tensor = memory_of(self._tensor(model, span.tensor))
            yield tensor
            used, position = used + gap, span.offset + len(tensor)
        yield between[used:]

    def _tensor(self, model: PackedModel, name: str) -> Tensor:
        what = f"tensor {name!r} of {model.name}"
        with self._archive.checked(what):
            packed = model.tensors[name]
            info = self.manifest.base[packed.index]
            place = f"{self.manifest.models.index(model)}/{packed.index}"
            if packed.coding is TensorCoding.PLAIN:
                data = self._archive.read(f"plain/{place}", what, packed.nbytes(self.manifest.base))
                return decode_tensor(data, info.shape, packed.dtype)
            base = decode_tensor(self._archive.read(f"base/{packed.index}", what, info.nbytes), info.shape, info.dtype)
            if packed.coding is TensorCoding.SAME:
                return base
            factors = None
            if packed.rank:
                rows, columns = matricise(base).shape
                data = self._archive.read(f"factors/{place}", what, 4 * packed.rank * (rows + columns))
                factors = decode_factors(data, packed.rank, (rows, columns), packed.exponent)
            residual = self._archive.read(f"residual/{place}", what, packed.nbytes(self.manifest.base))
            return decode_residual(residual, predict(base, factors, packed.dtype)).contiguous()
