"""A part of a checkpoint that shows what is in the whole: some rows of every matrix.

Rows of `W_i = W + M_i` are rows of `W` and of `M_i`, whose rank they keep as long as there are more of them than the
rank. So the rows of several models ask the same question as their matrices, for a fraction of the bytes. They are
taken in a few runs, because a run is one read: the first rows, the last, and some between, so that each part of a
matrix that was stacked from several (queries, keys and values) has its turn.
"""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from threading import Lock

import torch

from detune.checkpoints.blocks import copy_block
from detune.checkpoints.source import Checkpoint

__all__ = ["Excerpt", "runs_of_rows"]

RUNS = 4
# Bytes of what was read last that are kept: a tensor is looked at several times.
KEPT_BYTES = 64 * 2**20


class Excerpt(Checkpoint):
    """A checkpoint of whose matrices only some rows are read. `tensors` tells the shapes of the whole.

    Args:
        whole: The checkpoint.
        rows: Rows of each matrix, or slices of each kernel along its first dimension; what has no more is whole.

    Attributes:
        whole: As given.
        rows: As given.
    """

    def __init__(self, whole: Checkpoint, rows: int) -> None:
        self.spec, self.root, self.index_files = whole.spec, whole.root, whole.index_files
        self.tensors, self.weight_files = whole.tensors, whole.weight_files
        self.rows = rows
        # Shared by all excerpts of one model.
        self._read_bytes = Counter[str]()
        self.whole = whole
        self._kept: dict[str, torch.Tensor] = {}
        self._lock = Lock()

    def over(self, whole: Checkpoint) -> "Excerpt":
        """An excerpt of another view of the model, with the same rows; what is read counts together."""
        excerpt = Excerpt(whole, self.rows)
        excerpt._read_bytes = self._read_bytes
        return excerpt

    @property
    def read_total_bytes(self) -> int:
        """Bytes of tensors read so far."""
        return self._read_bytes.total()

    @property
    def paths(self) -> tuple[Path, ...]:
        """The paths that belong to this model and must not be overwritten."""
        return self.whole.paths

    @property
    def places(self) -> tuple[Path, ...]:
        """See `Checkpoint.places`."""
        return self.whole.places

    def read(self, name: str) -> torch.Tensor:
        """Read some rows of a matrix, and all of anything else.

        Args:
            name: A key of `tensors`.

        Returns:
            A CPU tensor, for reading only: the next call may give the same.

        Raises:
            InputError: A file can no longer be read.
        """
        with self._lock:
            tensor = self._kept.pop(name, None)
            if tensor is None:
                runs = self._runs(name)
                tensor = self.whole.read_rows(name, runs) if runs else self.whole.read(name)
                self._read_bytes[name] += self.shown_bytes(name)
            self._kept[name] = tensor
            while sum(map(self.shown_bytes, self._kept)) > KEPT_BYTES and len(self._kept) > 1:
                del self._kept[next(iter(self._kept))]
        return tensor

    def read_bytes(
        self, name: str, start: int = 0, length: int | None = None, out: memoryview | None = None
    ) -> memoryview:
        """Read a block of the bytes that are shown; see `Checkpoint.read_bytes`.

        Args:
            name: A key of `tensors`.
            start: First byte, counted from the start of what `read` gives.
            length: Number of bytes; cut at the end. None reads to the end.
            out: Writable memory of at least that many bytes to read into, instead of new memory.

        Returns:
            The bytes read.
        """
        shown = self.shown_bytes(name)
        return copy_block(self.read(name), start, shown if length is None else min(start + length, shown), out)

    def shown_bytes(self, name: str) -> int:
        """The number of bytes of a tensor that `read` and `read_bytes` give."""
        info, runs = self.tensors[name], self._runs(name)
        return info.nbytes // info.shape[0] * sum(run.stop - run.start for run in runs) if runs else info.nbytes

    def read_whole(self, name: str) -> torch.Tensor:
        """Read all of a tensor; see `Checkpoint.read`."""
        if not self._runs(name):
            return self.read(name)
        self._read_bytes[name] += self.tensors[name].nbytes
        return self.whole.read(name)

    def noise(self, name: str, rows: slice | None = None) -> float | None:
        """See `Checkpoint.noise`."""
        return self.whole.noise(name, rows)

    def made_files(self) -> Mapping[str, bytes]:
        """See `Checkpoint.made_files`."""
        return self.whole.made_files()

    def content_key(self, name: str) -> Hashable | None:
        """See `Checkpoint.content_key`."""
        return self.whole.content_key(name)

    def read_rows(self, name: str, runs: Sequence[slice]) -> torch.Tensor:
        """Read rows of the whole; see `Checkpoint.read_rows`."""
        tensor = self.whole.read_rows(name, runs)
        self._read_bytes[name] += tensor.numel() * tensor.element_size()
        return tensor

    def hashes(self) -> dict[str, str]:
        """See `Checkpoint.hashes`; of the files that need not be read for it."""
        return self.whole.known_hashes()

    def known_hashes(self) -> dict[str, str]:
        """See `Checkpoint.known_hashes`."""
        return self.whole.known_hashes()

    def side_files(self) -> list[Path]:
        """See `Checkpoint.side_files`."""
        return self.whole.side_files()

    def close(self) -> None:
        """Release what the checkpoint holds."""
        self._kept.clear()
        self.whole.close()

    def _runs(self, name: str) -> tuple[slice, ...]:
        """The rows of a matrix to read; none where that is all of them, and for vectors."""
        shape = self.tensors[name].shape
        return runs_of_rows(shape[0], self.rows) if len(shape) > 1 and shape[0] > self.rows else ()


def runs_of_rows(out: int, rows: int) -> tuple[slice, ...]:
    """Choose rows of a matrix: a few runs of neighbours, from the first row to the last, evenly apart.

    Args:
        out: Rows that the matrix has.
        rows: Rows wanted, fewer than that.

    Returns:
        Runs in order that do not overlap; they add up to `rows`.

    Example:
        >>> runs_of_rows(100, 8)
        (slice(0, 2, None), slice(33, 35, None), slice(65, 67, None), slice(98, 100, None))
    """
    runs = min(RUNS, rows)
    cuts = [rows * k // runs for k in range(runs + 1)]
    left_out, gaps = out - rows, max(1, runs - 1)
    starts = [cut + round(left_out * k / gaps) for k, cut in enumerate(cuts[:-1])]
    return tuple(slice(start, start + cuts[k + 1] - cuts[k]) for k, start in enumerate(starts))
