"""The work on tensors of a family, in whichever process: solve, and write."""

import hashlib
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from detune._runtime import versions
from detune.adapters.changes import ChangeFitter
from detune.checkpoints import (
    CheckpointFiles,
    RunDirectory,
    identity,
    open_checkpoint,
    pack_layers,
    pack_mask,
)
from detune.compatibility.model_set import Held, ModelSet
from detune.errors import DetuneError
from detune.problem import Solver
from detune.recovery.execution.completed import FACTORS, MASK, CompletedTensor, ResultWriter, Solved, Written
from detune.recovery.loop import OnTensor, map_tensors
from detune.recovery.report import TensorResult
from detune.recovery.tensor import solve_tensor


@dataclass(frozen=True)
class Job:
    """All that a process must know to recover tensors. Small, and can be pickled.

    Attributes:
        models: The family, by specs that mean the same in every process.
        like: What gives the layout; None where most of them do.
        identities: What they must be, as `detune.checkpoints.identity` tells.
        merge_dtype: For `BASE+ADAPTER`.
        run_directory: The directory of the run.
        solver: The method.
        rank: The most that any adapter's rank can be; None finds it.
        device: Where to compute; None is the CPU.
        dtype: What floats are stored in; None is the first model's.
        check: Whether to recover from parts of the models too.
        mask: Whether to keep which entries are certain.
        adapters: What adapters will be loaded onto; None makes none.
        shared: Whether several machines write.
    """

    models: tuple[str, ...]
    like: str | None
    identities: tuple[str, ...]
    merge_dtype: torch.dtype | None
    run_directory: Path
    solver: Solver
    rank: int | None
    device: torch.device | str | None
    dtype: torch.dtype | None
    check: bool
    mask: bool
    adapters: str | None
    shared: bool

    @property
    def key(self) -> str:
        """Stands for all that decides the results: the models' content, the options, and the versions."""
        settled = asdict(replace(self, run_directory=Path(), shared=False)) | {"solver": repr(self.solver)}
        text = repr(sorted(settled.items())) + repr(sorted(versions().items()))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Performer:
    """Recovers tensors of a family into its directory.

    Tensors are solved side by side; a thread writes what is solved.

    Args:
        job: What to do.
        family: Its models, opened.
        run_directory: Its directory.
        fitter: Where adapters are wanted.
    """

    def __init__(self, job: Job, family: ModelSet, run_directory: RunDirectory, fitter: ChangeFitter | None) -> None:
        self._job = job
        self._family = family
        self._fitter = fitter
        self._run_directory = run_directory
        self._files = CheckpointFiles(
            family.layout, self._run_directory.checkpoint, job.dtype, parts=family.parts, shared=job.shared
        )

    def perform(self, names: Sequence[str], on_tensor: OnTensor | None = None) -> list[CompletedTensor]:
        """Recover some tensors.

        Args:
            names: Which, in the order of their files.
            on_tensor: Called with the name and None when one is begun, and with its row when it is solved.

        Returns:
            What is complete.

        Raises:
            InputError: A model cannot be read, or holds NaN or Inf.
            OutputError: The disk refuses.
        """
        # A few smaller matrices may wait, so that no thread stands still for the disk; the largest only by itself.
        largest = max((self._files.stored_bytes([name]) for name in self._family.names), default=0)
        device, copies = self._job.device, self._job.solver.working_copies
        with ResultWriter(self._run_directory, self._files, largest // 2) as writer:
            for result, solved in map_tensors(self._family, self._solve, on_tensor, names, device, copies):
                writer.complete(solved or self._copied(result.name), result)
        return writer.completed

    def _copied(self, name: str) -> Solved:
        """A tensor that is yet to be copied."""
        original = self._family.original(name)

        def write() -> Written:
            if original is None:
                return Written(self._files.copy(name))
            return Written(self._files.write(name, original.read(name)))

        return Solved(write)

    def _solve(self, name: str, held: Held) -> tuple[TensorResult, Solved]:
        """The result of a tensor, which is yet to be written."""
        job = self._job
        found = solve_tensor(name, held, job.solver, job.rank, job.device, self._files.dtype(name), job.check)
        # The stored form is smaller, and counts for the adapters.
        stored = self._files.as_stored(name, found.weight.reshape(held.tensors[0].shape))
        changes = self._fitter.fit(name, stored, held) if self._fitter else ()
        mask = found.certain if job.mask else None

        def write() -> Written:
            written = Written(self._files.write(name, stored))
            layers = {change.model: change.layer for change in changes if change.layer}
            if mask is not None:
                written.parts[MASK] = self._run_directory.save_part(name, MASK, pack_mask(mask))
            if layers:
                written.parts[FACTORS] = self._run_directory.save_part(name, FACTORS, pack_layers(layers))
            return written

        held_bytes = stored.nbytes + (0 if mask is None else mask.nbytes)
        return found.result, Solved(write, held_bytes, tuple(replace(change, layer=None) for change in changes))


def perform(job: Job, names: tuple[str, ...]) -> list[CompletedTensor]:
    """Recover some tensors in a process that knows nothing yet: what an executor is given.

    Args:
        job: What to do.
        names: The tensors.

    Returns:
        What is complete.

    Raises:
        DetuneError: This process does not see the models as the run does, or the tensors cannot be recovered.
    """
    family = _open(job.models, job.like, job.identities, job.merge_dtype)
    fitter = _fitter(family, job.adapters, job.rank, job.device)
    return Performer(job, family, _run_directory(job.run_directory), fitter).perform(names)


def hashes(spec: str, merge_dtype: torch.dtype | None) -> dict[str, str]:
    """The SHA-256 of a model's weight files, computed by an executor's worker; see `Checkpoint.hashes`."""
    with open_checkpoint(spec, merge_dtype=merge_dtype) as model:
        return model.hashes()


# One journal for each process.
@lru_cache(maxsize=1)
def _run_directory(directory: Path) -> RunDirectory:
    return RunDirectory(directory)


# Opened once in each process, and left open for the next unit.
@lru_cache(maxsize=1)
def _open(
    models: tuple[str, ...], like: str | None, identities: tuple[str, ...], merge_dtype: torch.dtype | None
) -> ModelSet:
    try:
        family = ModelSet(models, merge_dtype, like=like)
        same = tuple(map(identity, family.models)) == identities
    except DetuneError as error:
        raise DetuneError(f"a worker on {socket.gethostname()} cannot open the models", str(error)) from None
    if not same:
        raise DetuneError(
            f"a worker on {socket.gethostname()} finds other models than the run was started with",
            "they differ in content, size or time",
            "give workers the same files by the same paths, and leave them alone while detune runs",
        )
    return family


@lru_cache(maxsize=1)
def _fitter(
    family: ModelSet, base: str | None, rank: int | None, device: torch.device | str | None
) -> ChangeFitter | None:
    return None if base is None else ChangeFitter(family, base, rank, device)
