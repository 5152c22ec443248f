"""Estimates of how long a command takes: a few matrices are computed here, some bytes hashed and compressed.

Matrices are computed by the functions that the command calls, side by side where it does so, after a first one that
compiles the loops and warms the libraries up. The time for all of them follows from the entries; what opening the
models and that first one took is added once.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from detune._runtime import needs_extra
from detune.adapters.changes import ChangeFitter
from detune.checkpoints import Checkpoint, CheckpointFiles
from detune.compatibility.model_set import Held, ModelSet
from detune.packing.archive import LEVEL
from detune.plan.report import Read, Spent
from detune.problem import Solver
from detune.recovery.loop import map_tensors
from detune.recovery.report import TensorResult
from detune.recovery.tensor import solve_tensor

__all__ = ["Timed", "carrying", "compressing", "moving", "opening", "time_fits", "time_recovery"]

# The number of matrices that are computed; more where more are computed side by side.
LEAST_MATRICES = 4
# After so long no further one is begun.
PATIENCE_SECONDS = 20.0
# Least number of entries of the first one, if any has as many: smaller ones may not reach the compiled loops.
WARMING_ENTRIES = 2**17
# Bytes that are hashed and compressed to see how long that takes.
SAMPLE_BYTES = 2**24
# Nothing is known of connections: 100 Mbit/s.
CONNECTION_BYTES_PER_SECOND = 12.5e6


@dataclass(frozen=True)
class Timed:
    """Matrices that were computed.

    Attributes:
        matrices: How many.
        entries: Number of entries of all of them, in the rows that are shown.
        seconds: How long it took.
        ranks: Those that were found.
        first_seconds: How long the first one took, before these.
    """

    matrices: int
    entries: int
    seconds: float
    ranks: tuple[int, ...]
    first_seconds: float

    def spent(self, what: str, family: ModelSet, names: Sequence[str]) -> Spent:
        """The time for all tensors."""
        times = sum(math.prod(family.shape(name)) for name in names) / self.entries
        computed = f"{self.matrices} matri{'x' if self.matrices == 1 else 'ces'} with {self.entries} entries"
        source = f"{computed} took {self.seconds:.2g} s here, and all have {times:.3g} times as many"
        return Spent(what, self.seconds * times, source)


def time_recovery(
    family: ModelSet,
    names: Sequence[str],
    files: CheckpointFiles,
    solver: Solver,
    rank: int | None,
    device: torch.device | str | None,
    check: bool,
    fitter: ChangeFitter | None,
) -> Timed | None:
    """Recover some matrices, as `recover` does.

    Args:
        family: The models.
        names: The tensors that would be computed.
        files: What would be written.
        solver: The method.
        rank: The most that an adapter's rank can be; None finds it.
        device: Where to compute; None is the CPU.
        check: Whether to recover from parts of the models too.
        fitter: Fits each model's adapter to the answer; None where none is wanted.

    Returns:
        What was seen; None where no matrix would be computed.
    """

    def solve(name: str, held: Held) -> tuple[TensorResult, None]:
        found = solve_tensor(name, held, solver, rank, device, files.dtype(name), check)
        if fitter is not None:
            fitter.fit(name, files.as_stored(name, found.weight.reshape(held.tensors[0].shape)), held)
        return found.result, None

    def recover(chosen: Sequence[str]) -> Iterator[tuple[str, Sequence[int | None]]]:
        for result, _ in map_tensors(family, solve, names=chosen, device=device, working_copies=solver.working_copies):
            yield result.name, result.ranks

    return _timed(_entries(family, names), max(LEAST_MATRICES, 2 * torch.get_num_threads()), recover)


def time_fits(base: Checkpoint, family: ModelSet, names: Sequence[str], fitter: ChangeFitter) -> Timed | None:
    """Fit all models' adapters in some matrices, one after the other, as `extract` does.

    Args:
        base: By the names of the family.
        family: The models.
        names: The tensors in which they differ from it.
        fitter: Fits them.

    Returns:
        What was seen; None where there is no matrix.
    """

    def fit(chosen: Sequence[str]) -> Iterator[tuple[str, Sequence[int | None]]]:
        for name in chosen:
            yield name, [change.row.rank for change in fitter.fit(name, base.read(name), family.held(name))]

    return _timed(_entries(family, names), LEAST_MATRICES, fit)


def _entries(family: ModelSet, names: Sequence[str]) -> dict[str, int]:
    """The entries that are shown of each matrix."""
    return {
        name: family.reference.shown_bytes(name) // family.reference.tensors[name].dtype.itemsize
        for name in names
        if min(family.shape(name)[:2], default=1) > 1 and len(family.shape(name)) > 1
    }


def _timed(
    entries: Mapping[str, int],
    count: int,
    compute: Callable[[Sequence[str]], Iterator[tuple[str, Sequence[int | None]]]],
) -> Timed | None:
    """Compute some matrices, of all sizes, until patience ends.

    Args:
        entries: Number of entries of each matrix that may be computed.
        count: How many to compute.
        compute: Takes some of them, and gives the name and ranks of each when it is done.

    Returns:
        What was seen; None where there is no matrix.
    """
    if not entries:
        return None
    names = sorted(entries, key=lambda name: entries[name])
    first = next((name for name in names if entries[name] >= WARMING_ENTRIES), names[-1])
    chosen = dict.fromkeys(names[(2 * k + 1) * len(names) // (2 * count)] for k in range(count))
    before = time.perf_counter()
    for _ in compute((first,)):
        pass
    began = time.perf_counter()
    done: dict[str, tuple[int, ...]] = {}
    seconds = 0.0
    for name, ranks in compute(tuple(chosen)):
        done[name] = tuple(rank for rank in ranks if rank is not None)
        seconds = time.perf_counter() - began
        if seconds > PATIENCE_SECONDS:
            break
    entries_done = sum(entries[name] for name in done)
    return Timed(len(done), entries_done, seconds, sum(done.values(), ()), began - before)


def opening(seconds: float, *timed: Timed | None) -> Spent:
    """The time of what a command does once, whatever the size of the models: by what it took here.

    Args:
        seconds: For opening and choosing the models.
        timed: Matrices of each kind of computation.
    """
    first = [each.first_seconds for each in timed if each is not None]
    return Spent("opening", seconds + sum(first), "what that took here" + ", with a first matrix" * bool(first))


def moving(reads: Sequence[Read], times: int) -> list[Spent]:
    """Downloading what is on the Hub, and hashing all files."""
    block = bytes(SAMPLE_BYTES)
    began = time.perf_counter()
    hashlib.sha256(block).digest()
    rate = SAMPLE_BYTES / (time.perf_counter() - began)
    total_bytes = times * sum(read.size_bytes for read in reads)
    source = f"SHA-256 takes {rate / 1e6:.0f} MB/s here, from memory; a disk may be slower"
    downloads = sum(read.download_bytes for read in reads)
    downloading = [carrying("downloading", downloads)] if downloads else []
    return [*downloading, Spent("reading and hashing", total_bytes / rate, source)]


def carrying(what: str, size_bytes: int) -> Spent:
    """Moving some bytes to the Hub, or from it."""
    source = "at 100 Mbit/s, an assumption; what is there already is not sent again"
    return Spent(what, size_bytes / CONNECTION_BYTES_PER_SECOND, source)


def compressing(family: ModelSet, input_bytes: int) -> Spent:
    """Compressing all files twice: alone, to compare with, and as what base and factors leave.

    Raises:
        DetuneError: The extra `pack` is not installed.
    """
    with needs_extra("pack"):
        import zstandard
    largest = max(family.layout.tensors, key=lambda name: family.reference.shown_bytes(name))
    block = bytes(family.reference.read_bytes(largest, 0, SAMPLE_BYTES))
    began = time.perf_counter()
    zstandard.ZstdCompressor(level=LEVEL).compress(block)
    rate = len(block) / (time.perf_counter() - began)
    source = f"zstd takes {rate / 1e6:.0f} MB/s of {largest} here, and every file is compressed twice"
    return Spent("compressing", 2 * input_bytes / rate, source)
