"""A model under other names, and in other pieces: some rows of a tensor, one matrix of a stack, a transpose.

Models of one base are published under different names, with other numbers of tokens, and with matrices stacked into one
tensor or not. A view shows a model so that what it holds can be compared with others tensor by tensor.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch

from detune.checkpoints.blocks import copy_block, memory_of
from detune.checkpoints.excerpt import Excerpt
from detune.checkpoints.source import Checkpoint, TensorInfo

__all__ = ["Part", "View", "own_name", "raw"]


@dataclass(frozen=True)
class Part:
    """A part of a tensor that stands for itself.

    Attributes:
        tensor: The tensor's name.
        start: Its first row, along the first dimension.
        stop: The row after its last; None takes all.
        alone: Whether it is one matrix of a stack `(matrices, rows, columns)`, without the first dimension then.
        turned: Whether the matrix is transposed.
        added: Whether each model has these rows of its own, as tokens that it has added: they are no base's.
    """

    tensor: str
    start: int = 0
    stop: int | None = None
    alone: bool = False
    turned: bool = False
    added: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the tensor, as it is."""
        return self.stop is None and not self.turned

    def rows(self, shape: Sequence[int]) -> slice:
        """The rows that it takes of a tensor of some shape."""
        return slice(self.start, shape[0] if self.stop is None else self.stop)

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """Its shape, in a tensor of some shape."""
        if self.stop is None:
            shape = tuple(whole)
        else:
            shape = tuple(whole[1:]) if self.alone else (self.stop - self.start, *whole[1:])
        return shape[::-1] if self.turned else shape


class View(Checkpoint):
    """Parts of a model's tensors under names of their own. Reading is that of the model.

    Args:
        model: The model.
        parts: What to show, by the names to show it under.

    Attributes:
        model: As given.
        parts: As given.
    """

    def __init__(self, model: Checkpoint, parts: Mapping[str, Part]) -> None:
        self.spec, self.root, self.index_files = model.spec, model.root, model.index_files
        self.weight_files = model.weight_files
        self.model = model
        self.parts = MappingProxyType(dict(parts))
        self.tensors = MappingProxyType({name: self._info(name, part) for name, part in parts.items()})

    def _info(self, name: str, part: Part) -> TensorInfo:
        info = self.model.tensors[part.tensor]
        shape = part.shape(info.shape)
        return replace(info, name=name, shape=shape, nbytes=math.prod(shape) * info.dtype.itemsize)

    @property
    def paths(self) -> tuple[Path, ...]:
        """The paths that belong to this model and must not be overwritten."""
        return self.model.paths

    @property
    def places(self) -> tuple[Path, ...]:
        """See `Checkpoint.places`."""
        return self.model.places

    def read(self, name: str) -> torch.Tensor:
        """Read a part; see `Checkpoint.read`."""
        part = self.parts[name]
        if part.stop is None:
            tensor = self.model.read(part.tensor)
        else:
            tensor = self.model.read_rows(part.tensor, [slice(part.start, part.stop)])
        tensor = tensor[0] if part.alone else tensor
        return tensor.mT.contiguous() if part.turned else tensor

    def read_rows(self, name: str, runs: Sequence[slice]) -> torch.Tensor:
        """Read some rows of a part; see `Checkpoint.read_rows`."""
        part, info = self.parts[name], self.tensors[name]
        if part.turned:
            tensor = self.read(name)
            return torch.cat([tensor[run] for run in runs])
        if part.alone:
            rows = torch.empty(sum(run.stop - run.start for run in runs), *info.shape[1:], dtype=info.dtype)
            memory, row_bytes = memory_of(rows), info.nbytes // max(1, info.shape[0])
            for run in runs:
                length = (run.stop - run.start) * row_bytes
                self.read_bytes(name, run.start * row_bytes, length, memory[:length])
                memory = memory[length:]
            return rows
        moved = [slice(run.start + part.start, run.stop + part.start) for run in runs]
        return self.model.read_rows(part.tensor, moved)

    def read_bytes(
        self, name: str, start: int = 0, length: int | None = None, out: memoryview | None = None
    ) -> memoryview:
        """Read a block of the bytes of a part; see `Checkpoint.read_bytes`."""
        part, nbytes = self.parts[name], self.tensors[name].nbytes
        stop = nbytes if length is None else min(start + length, nbytes)
        if part.turned:
            return copy_block(self.read(name), start, stop, out)
        info = self.model.tensors[part.tensor]
        before = part.start * (info.nbytes // max(1, info.shape[0])) if part.start else 0
        return self.model.read_bytes(part.tensor, before + start, stop - start, out)

    def content_key(self, name: str) -> Hashable | None:
        """See `Checkpoint.content_key`."""
        part = self.parts[name]
        key = self.model.content_key(part.tensor)
        return key if key is None or part.is_whole else (key, part.start, part.stop, part.turned)

    def noise(self, name: str, rows: slice | None = None) -> float | None:
        """See `Checkpoint.noise`; of a transpose or a matrix of a stack, by all of it."""
        part = self.parts[name]
        start, stop, _ = (slice(None) if rows is None or part.alone or part.turned else rows).indices(
            part.rows(self.model.tensors[part.tensor].shape).stop - part.start
        )
        return self.model.noise(part.tensor, slice(part.start + start, part.start + stop))

    def made_files(self) -> Mapping[str, bytes]:
        """See `Checkpoint.made_files`."""
        return self.model.made_files()

    def hashes(self) -> dict[str, str]:
        """See `Checkpoint.hashes`."""
        return self.model.hashes()

    def known_hashes(self) -> dict[str, str]:
        """See `Checkpoint.known_hashes`."""
        return self.model.known_hashes()

    def side_files(self) -> list[Path]:
        """See `Checkpoint.side_files`."""
        return self.model.side_files()

    def close(self) -> None:
        """Release what the model holds."""
        self.model.close()


def own_name(model: Checkpoint, name: str) -> str:
    """A model's own name for what a view shows as a whole; `name` itself where it is no view."""
    return own_name(model.model, model.parts[name].tensor) if isinstance(model, View) else name


def raw(model: Checkpoint) -> Checkpoint:
    """The model that a view or an excerpt shows; itself where it is neither."""
    if isinstance(model, Excerpt):
        return raw(model.whole)
    return raw(model.model) if isinstance(model, View) else model
