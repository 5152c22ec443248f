"""Weights that are stored otherwise than they are meant: quantised, under other names, with rows in another order.

A `Coding` says how one quantised tensor is stored. `Decoded` shows a checkpoint in which such tensors are float32 under
the names of the weights, with the noise that their levels stand for, and the scales beside them are not seen.
"""

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from detune.checkpoints.blocks import copy_block
from detune.checkpoints.source import Checkpoint, TensorInfo

__all__ = ["Coding", "Decoded", "rows_of_heads"]

# Rows that the noise of a matrix is judged by: neighbours, and the places where they are taken.
NOISE_ROWS, NOISE_PLACES = 8, 8


class Coding(Protocol):
    """The stored form of a quantised tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        ...

    @property
    def about(self) -> str:
        """The format, in a few words."""
        ...

    def decode(self, stored: Checkpoint, rows: slice) -> Tensor:
        """Some rows of the tensor, float32.

        Args:
            stored: The checkpoint that holds it.
            rows: Which, along the first dimension.

        Raises:
            InputError: A file can no longer be read.
        """
        ...

    def steps(self, stored: Checkpoint, rows: slice) -> Tensor:
        """The distance of neighbouring levels at each entry of some rows, float32; see `decode`."""
        ...


class Decoded(Checkpoint):
    """A checkpoint as it is meant: quantised tensors are read as float32.

    Args:
        stored: The checkpoint as stored.
        codings: How quantised tensors are stored, by their stored names.
        hidden: Stored tensors that are no weights: scales, and what goes with them.
        names: Other names for stored tensors.
        heads: For tensors whose rows are stored in llama.cpp's order, by stored names, the number of heads.
        made: Small files that a checkpoint made like this one needs and that are not on disk.
        dropped: Names of small files that say how the stored one is quantised.

    Attributes:
        stored: As given.
    """

    def __init__(
        self,
        stored: Checkpoint,
        codings: Mapping[str, Coding],
        hidden: frozenset[str] = frozenset(),
        names: Mapping[str, str] = MappingProxyType({}),
        heads: Mapping[str, int] = MappingProxyType({}),
        made: Mapping[str, bytes] = MappingProxyType({}),
        dropped: Collection[str] = (),
    ) -> None:
        self.spec, self.root, self.index_files = stored.spec, stored.root, stored.index_files
        self.stored = stored
        self._codings, self._heads, self._made, self._dropped = dict(codings), dict(heads), made, dropped
        # Keys are a name, the first and the last row. Families ask for it, and recoveries again.
        self._noise: dict[tuple[str, int, int], float | None] = {}
        shown = {own: names.get(own, own) for own in stored.tensors if own not in hidden}
        self._own = {name: own for own, name in shown.items()}
        self.tensors = MappingProxyType({name: self._info(name, own) for own, name in shown.items()})
        self.weight_files = tuple(
            replace(file, names=tuple(shown[own] for own in file.names if own in shown), metadata={}, header=None)
            for file in stored.weight_files
        )

    def _info(self, name: str, own: str) -> TensorInfo:
        info = self.stored.tensors[own]
        coding = self._codings.get(own)
        if coding is None:
            return replace(info, name=name)
        nbytes = math.prod(coding.shape) * torch.float32.itemsize
        return TensorInfo(name, coding.shape, torch.float32, nbytes, info.file, coding.about)

    @property
    def paths(self) -> tuple[Path, ...]:
        """The paths that belong to this model and must not be overwritten."""
        return self.stored.paths

    def read(self, name: str) -> Tensor:
        """Read one tensor as it is meant; see `Checkpoint.read`."""
        own = self._own[name]
        coding = self._codings.get(own)
        tensor = self.stored.read(own) if coding is None else coding.decode(self.stored, slice(0, coding.shape[0]))
        return tensor[rows_of_heads(len(tensor), self._heads[own])] if own in self._heads else tensor

    def read_rows(self, name: str, runs: Sequence[slice]) -> Tensor:
        """Read some rows of a tensor; see `Checkpoint.read_rows`."""
        own = self._own[name]
        if own in self._heads:
            tensor = self.read(name)
            return torch.cat([tensor[run] for run in runs])
        if own not in self._codings:
            return self.stored.read_rows(own, runs)
        return torch.cat([self._codings[own].decode(self.stored, run) for run in runs])

    def read_bytes(
        self, name: str, start: int = 0, length: int | None = None, out: memoryview | None = None
    ) -> memoryview:
        """Read a block of a tensor's bytes; see `Checkpoint.read_bytes`. The rows that it lies in are decoded."""
        own = self._own[name]
        if own not in self._codings and own not in self._heads:
            return self.stored.read_bytes(own, start, length, out)
        info = self.tensors[name]
        stop = info.nbytes if length is None else min(start + length, info.nbytes)
        row_bytes = max(1, info.nbytes // max(1, info.shape[0]))
        first, last = start // row_bytes, min(info.shape[0], -(-stop // row_bytes))
        before = first * row_bytes
        return copy_block(self.read_rows(name, [slice(first, last)]), start - before, stop - before, out)

    def noise(self, name: str, rows: slice | None = None) -> float | None:
        """Root mean square of the rounding to the levels, judged by some rows; see `Checkpoint.noise`."""
        coding = self._codings.get(self._own[name])
        if coding is None:
            return self.stored.noise(self._own[name], rows)
        start, stop, _ = (slice(None) if rows is None else rows).indices(coding.shape[0])
        if (name, start, stop) not in self._noise:
            step = max(NOISE_ROWS, -(-(stop - start) // NOISE_PLACES))
            steps = [
                coding.steps(self.stored, slice(row, min(row + NOISE_ROWS, stop))).double().square().mean()
                for row in range(start, stop, step)
            ]
            self._noise[name, start, stop] = float(torch.stack(steps).mean() / 12) ** 0.5 if steps else None
        return self._noise[name, start, stop]

    def content_key(self, name: str) -> Hashable | None:
        """See `Checkpoint.content_key`."""
        own = self._own[name]
        return None if own in self._codings or own in self._heads else self.stored.content_key(own)

    def hashes(self) -> dict[str, str]:
        """See `Checkpoint.hashes`."""
        return self.stored.hashes()

    def known_hashes(self) -> dict[str, str]:
        """See `Checkpoint.known_hashes`."""
        return self.stored.known_hashes()

    def side_files(self) -> list[Path]:
        """See `Checkpoint.side_files`."""
        return [path for path in self.stored.side_files() if path.name not in self._dropped]

    def made_files(self) -> Mapping[str, bytes]:
        """See `Checkpoint.made_files`."""
        return {**self.stored.made_files(), **self._made}

    def close(self) -> None:
        """Release what the checkpoint holds."""
        self.stored.close()


def rows_of_heads(rows: int, heads: int) -> Tensor:
    """The order in which llama.cpp stores rows of queries and keys, `(rows,)`: the halves of a head in turns.

    Args:
        rows: All rows.
        heads: How many heads they are of.
    """
    return torch.arange(rows).view(heads, -1, 2).mT.flatten()
