"""Lazy reading of checkpoints: opening one reads headers, and a weight is read when it is asked for.

Names that share one storage (tied weights): `save_pretrained` stores only one of them in safetensors, so
there is nothing to do. In a `.bin` all of them are listed; they are read from the same bytes and so stay
equal.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

import torch

from detune.checkpoints.blocks import copy_block, memory_of, new_block
from detune.checkpoints.entries import Entry
from detune.checkpoints.side_files import side_files
from detune.checkpoints.storage import ByteRange, Storage
from detune.errors import InputError

__all__ = ["Checkpoint", "TensorInfo", "WeightFile"]


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as a checkpoint's headers describe it.

    Attributes:
        name: Qualified name: `encoder.x.weight`, or `unet/down.weight` in a component directory.
        shape: Its shape.
        dtype: The dtype in which it is read.
        nbytes: Its size in that dtype.
        file: Its weight file relative to the checkpoint's root, with forward slashes.
        quantised: How it is stored, where that is not the dtype in which it is read; empty where it is.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    file: str
    quantised: str = ""

    @property
    def component(self) -> str:
        """The directory of its weight file with a slash, empty for the checkpoint's own.

        It is what the checkpoint's list of components says, whatever the tensor's own name holds.
        """
        return self.file[: self.file.rfind("/") + 1]


@dataclass(frozen=True)
class WeightFile:
    """One weight file of a checkpoint.

    Attributes:
        file: Its path relative to the checkpoint's root, with forward slashes.
        names: Qualified names of its tensors in the order of their offsets.
        metadata: The `__metadata__` of a safetensors file.
        header: The bytes of a safetensors file up to the first tensor; None where one has to be made.
    """

    file: str
    names: tuple[str, ...]
    metadata: Mapping[str, str]
    header: bytes | None


class Checkpoint:
    """A model, read lazily. Made by `open_checkpoint`; safe to read from several threads.

    Args:
        spec: The model as the user typed it.
        storage: Where its files are; `root` of it is the model's directory (of a single file: the parent).
        files: Weight files relative to `root`, in reading order.
        components: Directories below `root` that hold the parts of the model.
        index_files: Indices of shards relative to `root`.
        single_file: Whether the model is one file and the rest of `root` has nothing to do with it.

    Attributes:
        spec: As given.
        root: The directory.
        tensors: Every tensor by qualified name, in file order and then offset order: reading in this order is
            sequential.
        weight_files: The files with their metadata.
        index_files: As given.

    Raises:
        InputError: A file cannot be read, is damaged, or two files hold the same tensor.
    """

    def __init__(
        self,
        spec: str,
        storage: Storage,
        files: Iterable[str],
        *,
        components: Iterable[str] = ("",),
        index_files: Iterable[str] = (),
        single_file: bool = False,
    ) -> None:
        self.spec = spec
        self.root = storage.root
        self.index_files = tuple(index_files)
        self._components = tuple(components)
        self._single_file = single_file
        self._storage = storage
        self._entries: dict[str, Entry] = {}
        tensors: dict[str, TensorInfo] = {}
        weight_files: list[WeightFile] = []
        for file in files:
            header = storage.header(file)
            prefix = file[: file.rfind("/") + 1]
            for entry in header.entries:
                name = prefix + entry.name
                if name in tensors:
                    raise InputError(
                        f"tensor {entry.name!r} is stored twice",
                        f"in {storage.where(tensors[name].file)} and {storage.where(file)}",
                        "copy the model again",
                    )
                tensors[name] = TensorInfo(name, entry.shape, entry.dtype, entry.nbytes, file)
                self._entries[name] = entry
            names = tuple(prefix + entry.name for entry in header.entries)
            weight_files.append(WeightFile(file, names, MappingProxyType(dict(header.metadata)), header.raw))
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)
        self.weight_files = tuple(weight_files)

    @property
    def paths(self) -> tuple[Path, ...]:
        """The paths that belong to this model and must not be overwritten: directories, or the one file."""
        return (self.root / self.weight_files[0].file,) if self._single_file else (self.root,)

    @property
    def places(self) -> tuple[Path, ...]:
        """All paths of the model, with those that its weights really lie at: files may be links."""
        files = (self.root / file.file for file in self.weight_files)
        return (*self.paths, *(file.resolve() for file in files))

    @property
    def total_bytes(self) -> int:
        """Size of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor.

        Args:
            name: A key of `tensors`.

        Returns:
            A new CPU tensor in the dtype and shape of its `TensorInfo`.

        Raises:
            InputError: The file can no longer be read.
        """
        entry = self._entries[name]
        if entry.stride is None:
            tensor = torch.empty(entry.shape, dtype=entry.dtype)
            self._load(name, [ByteRange(entry.offset, memory_of(tensor))])
            return tensor
        span = torch.empty(entry.span_bytes // entry.dtype.itemsize, dtype=entry.dtype)
        self._load(name, [ByteRange(entry.offset, memory_of(span))])
        return span.as_strided(entry.shape, entry.stride).clone(memory_format=torch.contiguous_format)

    def read_rows(self, name: str, runs: Sequence[slice]) -> torch.Tensor:
        """Read some rows of a tensor, along its first dimension.

        Args:
            name: A key of `tensors`.
            runs: Rows from `start` to `stop`.

        Returns:
            A new CPU tensor of these rows, in this order.

        Raises:
            InputError: The file can no longer be read.
        """
        entry = self._entries[name]
        if entry.stride is not None:
            return torch.cat([self.read(name)[run] for run in runs])
        rows = torch.empty(sum(run.stop - run.start for run in runs), *entry.shape[1:], dtype=entry.dtype)
        row_bytes = entry.nbytes // max(1, entry.shape[0])
        parts, memory = [], memory_of(rows)
        for run in runs:
            length = (run.stop - run.start) * row_bytes
            parts.append(ByteRange(entry.offset + run.start * row_bytes, memory[:length]))
            memory = memory[length:]
        self._load(name, parts)
        return rows

    def shown_bytes(self, name: str) -> int:
        """The number of bytes of a tensor that `read` and `read_bytes` give: all; an excerpt gives fewer."""
        return self.tensors[name].nbytes

    def read_whole(self, name: str) -> torch.Tensor:
        """Read a tensor whole: as `read` does, but for an excerpt."""
        return self.read(name)

    def encoding(self, name: str) -> str:
        """The encoding of a tensor's bytes, where they are no numbers of its dtype; empty where they are."""
        return self._entries[name].encoding

    def noise(self, name: str, rows: slice | None = None) -> float | None:
        """The noise of a tensor's numbers, where it is more than rounding to the dtype.

        Args:
            name: A key of `tensors`.
            rows: The rows to judge it by; None is all.

        Returns:
            The root mean square error of an entry; None where it is the rounding to the dtype.

        Raises:
            InputError: The file can no longer be read.
        """
        return None

    def content_key(self, name: str) -> Hashable | None:
        """A key that tensors of equal bytes share, known without reading them.

        Args:
            name: A key of `tensors`.

        Returns:
            A key that two tensors of one key have only if their bytes are equal; None where nothing is known.
        """
        file = self.tensors[name].file
        sha256 = self._storage.known_sha256(file)
        return None if sha256 is None else (sha256, name.removeprefix(self.tensors[name].component))

    def read_bytes(
        self, name: str, start: int = 0, length: int | None = None, out: memoryview | None = None
    ) -> memoryview:
        """Read a block of a tensor's bytes, to compare or copy it without holding the whole.

        Args:
            name: A key of `tensors`.
            start: First byte, counted from the start of the tensor.
            length: Number of bytes; cut at the end of the tensor. None reads to the end.
            out: Writable memory of at least that many bytes to read into, instead of new memory.

        Returns:
            The bytes read: the beginning of `out` where it was given.

        Raises:
            InputError: The file can no longer be read.
        """
        entry = self._entries[name]
        stop = entry.nbytes if length is None else min(start + length, entry.nbytes)
        if entry.stride is not None:
            return copy_block(self.read(name), start, stop, out)
        block = new_block(stop - start, out)
        self._load(name, [ByteRange(entry.offset + start, block)])
        return block

    def _load(self, name: str, parts: Iterable[ByteRange]) -> None:
        self._storage.read(self.tensors[name].file, parts, name)

    def hashes(self) -> dict[str, str]:
        """Compute the SHA-256 of each weight file, as `sha256sum` prints it.

        Returns:
            Relative path to hexadecimal digest.

        Raises:
            InputError: A file can no longer be read.
        """
        return {file.file: self._storage.sha256(file.file) for file in self.weight_files}

    def known_hashes(self) -> dict[str, str]:
        """The hashes that are known without reading the files: of those on the Hub."""
        known = {file.file: self._storage.known_sha256(file.file) for file in self.weight_files}
        return {file: sha256 for file, sha256 in known.items() if sha256 is not None}

    def side_files(self) -> list[Path]:
        """List the files that should travel to a checkpoint made like this one, relative to `root`.

        Raises:
            InputError: One is not what it should be; see `detune.checkpoints.side_files`.
        """
        return [] if self._single_file else side_files(self.root, self._components)

    def made_files(self) -> Mapping[str, bytes]:
        """Small files that a checkpoint made like this one needs and that are not on disk, by relative path."""
        return {}

    def close(self) -> None:
        """Release what the checkpoint holds: nothing today, files are open only while they are read."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.spec!r}, {len(self.tensors)} tensors)"
