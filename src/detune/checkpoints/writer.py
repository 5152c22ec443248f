"""Writing a checkpoint tensor by tensor, so that it appears whole or not at all.

Everything goes to a hidden directory beside the target. The data of each shard is written at its final
offsets; the headers, without which no program takes a file for a checkpoint, come last, and one rename ends
it. So even a killed process leaves nothing that could be mistaken for a model.
"""

import errno
import json
import logging
import math
import os
import secrets
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Self

import torch

from detune.checkpoints.atomic import sync
from detune.checkpoints.blocks import memory_of, new_block, round_to
from detune.checkpoints.headers import PICKLE_SUFFIXES, Entry, encode_safetensors_header, safetensors_name
from detune.checkpoints.layout import read_json
from detune.checkpoints.source import Checkpoint, TensorInfo, WeightFile
from detune.errors import InputError, OutputError

__all__ = ["CheckpointWriter"]

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 16 * 2**20
_CHECKPOINT_SIGNS = ("detune.json", "model_index.json")


@dataclass(frozen=True)
class _Place:
    """Where a tensor goes: its output file and the first byte there."""

    file: str
    offset: int


class CheckpointWriter:
    """Writes a checkpoint with the files, names, dtypes and metadata of another one. A context manager.

    Leaving the block normally checks that every tensor has been written, adds the files that travel with
    the weights and moves the whole to `out` in one step. Leaving it by an exception removes what was
    written and leaves `out` as it was. Pickled weight files become safetensors; a safetensors file whose
    tensors are all copied is byte-identical to its model. Writing is safe from several threads.

    Args:
        like: The checkpoint whose layout the output takes.
        out: The directory to make.
        overwrite: Whether an existing checkpoint in `out` may be replaced.
        inputs: Files and directories that must survive, besides those of `like`.
        dtype: Store every float tensor in this dtype instead of `like`'s.

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
        overwrite: bool = False,
        inputs: Sequence[Path] = (),
        dtype: torch.dtype | None = None,
    ) -> None:
        self._like = like
        self._infos = {name: _stored(info, dtype) for name, info in like.tensors.items()}
        # A link to a directory stays a link: what it points to is replaced.
        self._out = Path(out).expanduser().resolve()
        self._overwrite = overwrite
        self._inputs = [Path(path).resolve() for path in (*like.paths, *inputs)]
        self._headers: dict[str, bytes] = {}
        self._places: dict[str, _Place] = {}
        self._size_bytes = 0
        for file in like.weight_files:
            self._plan(file)
        self._extra: dict[str, bytes] = {}
        self._written: set[str] = set()
        self._lock = threading.Lock()
        suffix = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._partial = self._out.with_name(f".{self._out.name}.partial-{suffix}")
        self._replaced = self._out.with_name(f".{self._out.name}.replaced-{suffix}")

    @property
    def needed_bytes(self) -> int:
        """Size of the weight files to be written."""
        return self._size_bytes

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor.

        Args:
            name: A key of `like.tensors`.
            tensor: Its values, on any device; floats are rounded to nearest in the stored dtype.

        Raises:
            OutputError: The disk refuses, or the tensor has been written before.
            ValueError: The tensor has another shape, or a kind of dtype that cannot be stored there.
        """
        info = self._infos[name]
        if tuple(tensor.shape) != info.shape:
            raise ValueError(f"tensor {name!r} has shape {tuple(tensor.shape)}, expected {info.shape}")
        if tensor.dtype != info.dtype and not (tensor.is_floating_point() and info.dtype.is_floating_point):
            raise ValueError(f"tensor {name!r} is {tensor.dtype}, expected {info.dtype}")
        self._claim(name)
        place = self._places[name]
        values = tensor.detach().reshape(-1)
        step = _BLOCK_BYTES // info.dtype.itemsize
        with self._report_disk(place.file), _opened(self._partial / place.file) as descriptor:
            for start in range(0, len(values), step):
                block = round_to(values[start : start + step], info.dtype).cpu()
                _write_at(descriptor, memory_of(block), place.offset + start * info.dtype.itemsize)

    def copy(self, name: str) -> None:
        """Copy one tensor of `like` byte for byte, in blocks, or in the dtype asked for if that holds it exactly.

        Args:
            name: A key of `like.tensors`.

        Raises:
            InputError: The tensor can no longer be read, or would be rounded.
            OutputError: The disk refuses, or the tensor has been written before.
        """
        info = self._infos[name]
        if info != self._like.tensors[name]:
            values = self._like.read(name)
            if not torch.equal(values.to(info.dtype).to(values.dtype), values):
                raise InputError(
                    f"tensor {name!r} would be rounded",
                    f"it is {values.dtype} and not representable in {info.dtype}",
                    "leave out --dtype",
                )
            self.write(name, values)
            return
        self._claim(name)
        place = self._places[name]
        buffer = new_block(min(_BLOCK_BYTES, info.nbytes))
        with self._report_disk(place.file), _opened(self._partial / place.file) as descriptor:
            for start in range(0, info.nbytes, _BLOCK_BYTES):
                block = self._like.read_bytes(name, start, _BLOCK_BYTES, buffer)
                _write_at(descriptor, block, place.offset + start)

    def add_file(self, relative_path: str | Path, data: bytes) -> None:
        """Add a small file, in place of a file of `like` of the same name.

        Args:
            relative_path: Where it goes below the output directory.
            data: Its content.

        Raises:
            ValueError: The path leads outside the output directory.
        """
        path = PurePosixPath(relative_path)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{relative_path} leads outside the output directory")
        self._extra[str(path)] = data

    def __enter__(self) -> Self:
        parent = self._out.parent
        with self._report_disk(""):
            self._check_target()
            parent.mkdir(parents=True, exist_ok=True)
            available = shutil.disk_usage(parent).free
        if available < self._size_bytes:
            raise OutputError(
                f"no space left for {self._out}",
                f"it needs {self._size_bytes} bytes and {parent} has {available} available",
                "free some space or choose another disk",
            )
        try:
            with self._report_disk(""):
                self._partial.mkdir()
                for file in self._headers:
                    path = self._partial / file
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.touch()
        except BaseException:
            self.abort()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self.abort()

    def abort(self) -> None:
        """Remove everything that has not been moved to its place. Harmless when there is nothing."""
        shutil.rmtree(self._partial, ignore_errors=True)

    def _plan(self, file: WeightFile) -> None:
        output = safetensors_name(file.file)
        prefix = file.file[: file.file.rfind("/") + 1]
        infos = [self._infos[name] for name in file.names]
        metadata = dict(file.metadata)
        as_it_was = file.header is not None and infos == [self._like.tensors[name] for name in file.names]
        if not as_it_was:
            # Largest elements first keeps every tensor aligned, as the safetensors library does.
            infos.sort(key=lambda info: -info.dtype.itemsize)
            metadata = metadata or {"format": "pt"}
        entries = [Entry(info.name.removeprefix(prefix), info.dtype, info.shape, 0) for info in infos]
        header = file.header if as_it_was and file.header else encode_safetensors_header(entries, metadata)
        if output in self._headers:
            raise OutputError(
                f"two weight files of {self._like.spec} clash",
                f"both would become {output}",
                "rename one of them",
            )
        self._headers[output] = header
        offset = len(header)
        for info in infos:
            self._places[info.name] = _Place(output, offset)
            offset += info.nbytes
        self._size_bytes += offset

    def _claim(self, name: str) -> None:
        with self._lock:
            if name in self._written:
                raise OutputError(f"tensor {name!r} was written twice", "expected once", "report this")
            self._written.add(name)

    def _check_target(self) -> None:
        out = self._out
        if not out.exists():
            return
        if not out.is_dir():
            raise OutputError(f"{out} exists", "it is not a directory", "choose another output directory")
        if not any(out.iterdir()):
            return
        if not self._overwrite:
            raise OutputError(
                f"{out} exists and is not empty",
                "expected a new or empty directory",
                "choose another, or allow it with --overwrite",
            )
        for path in self._inputs:
            if path == out or path.is_relative_to(out) or out.is_relative_to(path):
                raise OutputError(
                    f"{out} cannot be overwritten",
                    f"it is, contains or lies inside the input {path}",
                    "choose another",
                )
        children = list(out.iterdir())
        # A config.json alone may be anybody's: it needs weights beside it.
        has_weights = any(child.suffix in (".safetensors", *PICKLE_SUFFIXES) for child in children)
        only_weights = all(child.suffix in (".safetensors", *PICKLE_SUFFIXES) for child in children)
        is_model = only_weights or (has_weights and (out / "config.json").is_file())
        if not is_model and not any((out / sign).is_file() for sign in _CHECKPOINT_SIGNS):
            raise OutputError(
                f"{out} does not look like a checkpoint",
                f"found {children[0].name} and none of {', '.join(_CHECKPOINT_SIGNS)}",
                "remove it yourself or choose another output directory",
            )

    def _finish(self) -> None:
        missing = [name for name in self._like.tensors if name not in self._written]
        if missing:
            raise OutputError(
                f"{len(missing)} of {len(self._like.tensors)} tensors were never written",
                f"the first is {missing[0]!r}",
                "report this",
            )
        for file, header in self._headers.items():
            with self._report_disk(file), _opened(self._partial / file) as descriptor:
                _write_at(descriptor, memoryview(header), 0)
                os.fsync(descriptor)
        small: dict[str, bytes | Path] = {}
        with self._report_disk(""):
            small |= {str(path): self._like.root / path for path in self._like.side_files()}
            small |= {safetensors_name(file): self._index(file) for file in self._like.index_files}
        small |= self._extra
        for file, content in small.items():
            with self._report_disk(file):
                path = self._partial / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
                with _opened(path) as descriptor:
                    os.fsync(descriptor)
        self._rename()

    def _index(self, file: str) -> bytes:
        path = self._like.root / file
        unchanged = self._infos == dict(self._like.tensors) and all(
            weight_file.header is not None for weight_file in self._like.weight_files
        )
        if unchanged and safetensors_name(file) == file:
            return path.read_bytes()
        content = read_json(path)
        prefix = file[: file.rfind("/") + 1]
        names = list(content["weight_map"])
        total_bytes = sum(self._infos[prefix + name].nbytes for name in names)
        content["metadata"] = {**(content.get("metadata") or {}), "total_size": total_bytes}
        content["weight_map"] = {name: self._places[prefix + name].file.removeprefix(prefix) for name in names}
        return (json.dumps(content, indent=2) + "\n").encode()

    def _rename(self) -> None:
        with self._report_disk(""):
            for directory, _, _ in os.walk(self._partial):
                sync(Path(directory))
            # Somebody may have put something there in the meantime.
            self._check_target()
            aside = self._out.exists() and any(self._out.iterdir())
            try:
                if aside:
                    os.rename(self._out, self._replaced)
                os.rename(self._partial, self._out)
            except BaseException:
                if self._replaced.exists() and not self._out.exists():
                    os.rename(self._replaced, self._out)
                raise
            sync(self._out.parent)
        if aside:
            shutil.rmtree(self._replaced, ignore_errors=True)
        logger.info("wrote %s (%d bytes of weights)", self._out, self._size_bytes)

    @contextmanager
    def _report_disk(self, file: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            target = self._out / file
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise OutputError(
                    f"cannot write {target}", str(error), "check the directory and its permissions"
                ) from error
            available = shutil.disk_usage(self._out.parent).free
            raise OutputError(
                f"no space left for {target}",
                f"the checkpoint needs {self._size_bytes} bytes and {available} are available now",
                "free some space or choose another disk",
            ) from error


def _stored(info: TensorInfo, dtype: torch.dtype | None) -> TensorInfo:
    """A tensor as it will be stored."""
    if dtype is None or not info.dtype.is_floating_point or info.dtype == dtype:
        return info
    return replace(info, dtype=dtype, nbytes=math.prod(info.shape) * dtype.itemsize)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _write_at(descriptor: int, memory: memoryview, offset: int) -> None:
    done = 0
    while done < len(memory):
        done += os.pwrite(descriptor, memory[done:], offset + done)
