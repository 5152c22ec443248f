"""Writing a checkpoint tensor by tensor, so that it appears whole or not at all.

The data of each weight file is written at its final offsets, in any order and by any number of processes; the
headers, without which no program takes a file for a checkpoint, come last. `CheckpointFiles` does that in a directory
it is given; `CheckpointWriter` makes a hidden one beside the target, and one rename ends it. So even a killed process
leaves nothing that could be mistaken for a model.
"""

import logging
import math
import os
import threading
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from mmap import mmap
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

import torch

from detune.checkpoints.atomic import new_directory, resolved
from detune.checkpoints.blocks import memory_of, round_to
from detune.checkpoints.direct_io import DirectFile, Read
from detune.checkpoints.disk import discard, reported, sync
from detune.checkpoints.formats import safetensors_name
from detune.checkpoints.output_plan import OutputPlan
from detune.checkpoints.paths import inside
from detune.checkpoints.side_files import read_side_file
from detune.checkpoints.source import Checkpoint
from detune.checkpoints.target import Target
from detune.checkpoints.view import Part, View
from detune.errors import InputError, OutputError

__all__ = ["CheckpointFiles", "CheckpointWriter"]

logger = logging.getLogger(__name__)

# Rounding takes several copies of what it rounds.
_ROUNDED_BYTES = 16 * 2**20
_READ_BYTES = 2**20


class CheckpointFiles:
    """The files of a checkpoint with the names, dtypes and metadata of another one, in a directory that is given.

    Pickled weight files become safetensors; a safetensors file whose tensors are all copied is byte-identical to its
    model. Tensors may be written from several threads, processes and machines, each by its own `CheckpointFiles`;
    one of them prepares and finishes.

    Args:
        like: The checkpoint whose layout the output takes.
        directory: Where the files are.
        dtype: Store every float tensor in this dtype instead of `like`'s; what is quantised there becomes bf16 without.
        parts: Names by which parts of tensors are written; None takes each as a whole, by its name in `like`.
        shared: Whether other machines write into the same files. Then each block goes to the server as it is: NFS
            clients may otherwise write whole pages back, with what a neighbour has changed since.

    Attributes:
        needed_bytes: Size of the weight files.
        side_files: The files of `like` that travel with the weights.

    Raises:
        InputError: One of these is not what it should be.
        OutputError: Two weight files would have one name.
    """

    def __init__(
        self,
        like: Checkpoint,
        directory: Path,
        dtype: torch.dtype | None = None,
        *,
        parts: Mapping[str, Part] | None = None,
        shared: bool = False,
    ) -> None:
        self._like = like
        self._view = View(like, {name: Part(name) for name in like.tensors} if parts is None else parts)
        self._directory = directory
        self._shared = shared
        self._buffers: deque[mmap] = deque()
        self._plan = OutputPlan.like(like, dtype)
        self.needed_bytes = sum(self._plan.sizes_bytes.values())
        self.side_files = tuple(path.as_posix() for path in like.side_files())

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a part is stored in."""
        return self._plan.tensors[self._view.parts[name].tensor].dtype

    def as_stored(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Round a tensor to the dtype that it is stored in.

        Args:
            name: Name of a part.
            tensor: Its values, on any device.

        Returns:
            The tensor on the CPU, contiguous; itself where nothing has to be done.
        """
        dtype = self.dtype(name)
        if tensor.dtype == dtype:
            return tensor.detach().cpu().contiguous()
        stored = torch.empty(tensor.shape, dtype=dtype)
        values, flat = tensor.detach().reshape(-1), stored.view(-1)
        step = _ROUNDED_BYTES // dtype.itemsize
        for start in range(0, len(values), step):
            flat[start : start + step] = round_to(values[start : start + step], dtype).cpu()
        return stored

    def prepare(self) -> None:
        """Make the weight files in their sizes, without their headers; those that are there stay, and nothing else.

        Raises:
            OutputError: The disk refuses.
        """
        sizes = {self._directory / file: size_bytes for file, size_bytes in self._plan.sizes_bytes.items()}
        folders = {folder for path in sizes for folder in path.parents}
        with self._report_disk(""):
            # Folders come before what is in them.
            for path in sorted(self._directory.rglob("*")):
                is_whole = path.is_file() and path.stat().st_size == sizes.get(path)
                if path.is_symlink() or not (is_whole or (path.is_dir() and path in folders)):
                    discard(path)
        for file, size_bytes in self._plan.sizes_bytes.items():
            path = inside(self._directory, file)
            if path.is_file():
                continue
            with self._report_disk(file):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
                os.truncate(path, size_bytes)

    def write(self, name: str, tensor: torch.Tensor) -> int:
        """Write one part.

        Args:
            name: Its name.
            tensor: Its values, on any device; floats are rounded to nearest in the stored dtype.

        Returns:
            The CRC-32 of its bytes.

        Raises:
            OutputError: The disk refuses.
            ValueError: The tensor has another shape, or a kind of dtype that cannot be stored there.
        """
        shape, dtype = self._view.tensors[name].shape, self.dtype(name)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"tensor {name!r} has shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.dtype != dtype and not (tensor.is_floating_point() and dtype.is_floating_point):
            raise ValueError(f"tensor {name!r} is {tensor.dtype}, expected {dtype}")
        memory = memory_of(self.as_stored(name, tensor))

        def read(start: int, out: memoryview) -> None:
            out[:] = memory[start : start + len(out)]

        return self._put(name, len(memory), read)

    def copy(self, name: str) -> int:
        """Copy one part of `like` byte for byte, in blocks, or in the dtype asked for if that holds it exactly.

        Args:
            name: Its name.

        Returns:
            The CRC-32 of its bytes.

        Raises:
            InputError: The tensor can no longer be read, or would be rounded.
            OutputError: The disk refuses.
        """
        info, dtype = self._view.tensors[name], self.dtype(name)
        if info.dtype != dtype:
            values = self._view.read(name)
            if not info.quantised and not torch.equal(values.to(dtype).to(values.dtype), values):
                raise InputError(
                    f"tensor {name!r} would be rounded",
                    f"it is {values.dtype} and not representable in {dtype}",
                    "leave out --dtype",
                )
            return self.write(name, values)

        def read(start: int, out: memoryview) -> None:
            self._view.read_bytes(name, start, len(out), out)

        return self._put(name, info.nbytes, read)

    def _put(self, name: str, length: int, read: Read) -> int:
        with self._opened(self._plan.places[self._view.parts[name].tensor].file) as file:
            return file.write(self._offset(name), length, read)

    def checksum(self, name: str) -> int:
        """Compute the CRC-32 of what is in the place of a part.

        Args:
            name: Its name.

        Raises:
            OutputError: It cannot be read.
        """
        file, left = self._plan.places[self._view.parts[name].tensor].file, self.stored_bytes([name])
        checksum = 0
        with self._report_disk(file), (self._directory / file).open("rb", buffering=0) as opened:
            opened.seek(self._offset(name))
            while left and (block := opened.read(min(left, _READ_BYTES))):
                checksum = zlib.crc32(block, checksum)
                left -= len(block)
        return checksum

    def _offset(self, name: str) -> int:
        """The first byte of a part in its file."""
        part = self._view.parts[name]
        info = self._plan.tensors[part.tensor]
        before = part.start * (info.nbytes // max(1, info.shape[0])) if part.start else 0
        return self._plan.places[part.tensor].offset + before

    def stored_bytes(self, names: Iterable[str]) -> int:
        """The bytes that some parts take."""
        return sum(math.prod(self._view.tensors[name].shape) * self.dtype(name).itemsize for name in names)

    def sync(self, names: Iterable[str]) -> None:
        """Wait until what was written of some parts is on the disk.

        Raises:
            OutputError: The disk refuses.
        """
        for file in {self._plan.places[self._view.parts[name].tensor].file for name in names}:
            with self._report_disk(file):
                sync(self._directory / file)

    def finish(self, extra: Mapping[str, bytes] = MappingProxyType({})) -> None:
        """Write the headers, and the files that travel with the weights.

        Args:
            extra: Small files by their paths in the directory, in place of files of `like` of the same name.

        Raises:
            OutputError: The disk refuses.
        """
        for file, header in self._plan.headers.items():
            # The header stays in the cache: readers look at it first, and it shares a page with the first tensor.
            with self._report_disk(file), inside(self._directory, file).open("r+b") as opened:
                opened.write(header)
        with self._report_disk(""):
            indices = {safetensors_name(file): self._plan.index(self._like, file) for file in self._like.index_files}
        made = {**self._like.made_files(), **indices}
        small: dict[str, bytes | None] = {**dict.fromkeys(self.side_files), **made, **extra}
        for name, content in small.items():
            with self._report_disk(name):
                path = inside(self._directory, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(read_side_file(self._like.root, name) if content is None else content)

    def _report_disk(self, file: str) -> AbstractContextManager[None]:
        return reported(self._directory / file, self.needed_bytes)

    @contextmanager
    def _opened(self, file: str) -> Iterator[DirectFile]:
        with (
            self._report_disk(file),
            DirectFile(inside(self._directory, file), self._buffers, through=self._shared) as opened,
        ):
            yield opened


class CheckpointWriter:
    """Writes a checkpoint with the layout of another one, in one go. A context manager.

    Leaving the block normally checks that every tensor has been written, adds the files that travel with
    the weights and moves the whole to `out` in one step. Leaving it by an exception removes what was
    written and leaves `out` as it was. Writing is safe from several threads.

    Args:
        like: The checkpoint whose layout the output takes.
        out: The directory to make.
        dtype: Store every float tensor in this dtype instead of `like`'s.
        parts: See `CheckpointFiles`.

    Raises:
        OutputError: `out` may not be written, or two weight files would have one name.

    Example:
        >>> with CheckpointWriter(like, Path("recovered")) as writer:  # doctest: +SKIP
        ...     for name in like.tensors:
        ...         writer.copy(name)
    """

    def __init__(
        self,
        like: Checkpoint,
        out: Path | str,
        *,
        dtype: torch.dtype | None = None,
        parts: Mapping[str, Part] | None = None,
    ) -> None:
        self._like = like
        self._parts = parts
        self._target = Target(resolved(out))
        self._dtype = dtype
        self._written: set[str] = set()
        self._lock = threading.Lock()
        self._opened = ExitStack()

    @property
    def side_files(self) -> tuple[str, ...]:
        """See `CheckpointFiles`; known inside the block."""
        return self._files.side_files

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor; see `CheckpointFiles.write`. None is written twice."""
        self._claim(name)
        self._files.write(name, tensor)

    def copy(self, name: str) -> None:
        """Copy one tensor of `like`; see `CheckpointFiles.copy`. None is written twice."""
        self._claim(name)
        self._files.copy(name)

    def __enter__(self) -> Self:
        with ExitStack() as opened:
            partial = opened.enter_context(new_directory(self._target.out, self._target.check))
            self._files = CheckpointFiles(self._like, partial, self._dtype, parts=self._parts)
            self._target.require_space(self._files.needed_bytes)
            self._files.prepare()
            self._opened = opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._opened.__exit__(kind, error, trace)
            return
        with self._opened:
            names = list(self._like.tensors if self._parts is None else self._parts)
            missing = [name for name in names if name not in self._written]
            if missing:
                raise OutputError(
                    f"{len(missing)} of {len(names)} tensors were never written",
                    f"the first is {missing[0]!r}",
                    "report this",
                )
            self._files.finish()
        logger.info("wrote %s (%d bytes of weights)", self._target.out, self._files.needed_bytes)

    def _claim(self, name: str) -> None:
        with self._lock:
            if name in self._written:
                raise OutputError(f"tensor {name!r} was written twice", "expected once", "report this")
            self._written.add(name)
