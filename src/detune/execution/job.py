"""What is done with the tensors of a family, in whichever process: solve, and land."""

import hashlib
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from detune.adapter_changes import AdapterRow, Change, ChangeFitter, Kept
from detune.checkpoints import (
    CheckpointFiles,
    Kind,
    Landing,
    identity,
    open_checkpoint,
    read_layers,
    reported,
    save_layers,
    save_mask,
)
from detune.errors import DetuneError
from detune.family import Family
from detune.report import Status, TensorRow, versions
from detune.solvers import Solver
from detune.solving import solve_tensor
from detune.walk import Answer, OnTensor, walk

# How long what is on the disk may wait until it is written down; a killed run does that much again.
RECORD_SECONDS = 5.0


@dataclass(frozen=True)
class Job:
    """All that a process must know to recover tensors. Small, and can be pickled.

    Attributes:
        models: The family, by specs that mean the same in every process; the first gives the layout.
        identities: What they must be, as `detune.checkpoints.identity` tells.
        merge_dtype: For `BASE+ADAPTER`.
        landing: The directory of the run.
        solver: The method.
        rank: The most that any adapter's rank can be; None finds it.
        device: Where to compute; None is the CPU.
        dtype: What floats are stored in; None is the first model's.
        check: Whether to recover from parts of the models too.
        mask: Whether to land which entries are certain.
        adapters: What adapters will be loaded onto; None makes none.
        shared: Whether several machines write.
    """

    models: tuple[str, ...]
    identities: tuple[str, ...]
    merge_dtype: torch.dtype | None
    landing: Path
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
        """Stands for all that decides what lands: the models' content, the options, and the versions."""
        settled = asdict(replace(self, landing=Path(), shared=False)) | {"solver": repr(self.solver)}
        text = repr(sorted(settled.items())) + repr(sorted(versions().items()))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Landed:
    """What is known of a tensor that has landed, besides its bytes.

    Attributes:
        row: For the report.
        changes: What it becomes in adapters; their factors are in a part of the landing.
    """

    row: TensorRow
    changes: tuple[Change, ...] = ()

    @property
    def has_mask(self) -> bool:
        """Whether the base's bits were looked at, so that a mask has landed where one was asked for."""
        return self.row.certain is not None

    def to_json(self) -> dict[str, Any]:
        """What JSON can hold."""
        return {"row": asdict(self.row), "changes": [asdict(change) for change in self.changes]}

    @classmethod
    def of_json(cls, content: Mapping[str, Any]) -> "Landed":
        """The same again."""
        row = content["row"]
        row = TensorRow(
            **row | {"shape": tuple(row["shape"]), "ranks": tuple(row["ranks"]), "status": Status(row["status"])}
        )
        changes = (
            Change(change["model"], _row(change["row"]), _row(change["as_base"]) if change["as_base"] else None)
            for change in content["changes"]
        )
        return cls(row, tuple(changes))


def _row(content: Mapping[str, Any]) -> AdapterRow:
    return AdapterRow(**{**content, "shape": tuple(content["shape"]), "kept": Kept(content["kept"])})


def read_landed(landing: Landing) -> dict[str, Landed]:
    """What a landing's journal speaks of, by tensor."""
    return {landed.row.name: landed for landed in map(Landed.of_json, landing.rows())}


def read_changes(landing: Landing, landed: Landed, kind: Kind | None) -> tuple[Change, ...]:
    """The changes of a tensor with their factors.

    Args:
        landing: Where they are.
        landed: The tensor.
        kind: What its weight is to PEFT, if that takes a LoRA.
    """
    if kind is None or not any(change.row.kept is Kept.LORA for change in landed.changes):
        return landed.changes
    layers = read_layers(landing.part(landed.row.name, ".lora"), kind)
    return tuple(replace(change, layer=layers.get(change.model)) for change in landed.changes)


class Performer:
    """Recovers tensors of a family into its landing.

    Tensors are solved side by side; a thread writes what is solved.

    Args:
        job: What to do.
        family: Its models, opened.
        landing: Its landing.
        fitter: Where adapters are wanted.
    """

    def __init__(self, job: Job, family: Family, landing: Landing, fitter: ChangeFitter | None) -> None:
        self._job = job
        self._family = family
        self._fitter = fitter
        self._landing = landing
        self._files = CheckpointFiles(family.models[0], self._landing.checkpoint, job.dtype, shared=job.shared)

    def perform(self, names: Iterable[str], on_tensor: OnTensor | None = None) -> list[Landed]:
        """Recover some tensors.

        Args:
            names: Which, in the order of their files.
            on_tensor: Called with the name and None when one is begun, and with its row when it is solved.

        Returns:
            What has landed.

        Raises:
            InputError: A model cannot be read, or holds NaN or Inf.
            OutputError: The disk refuses.
        """
        with _Lander(self._landing, self._files) as lander:
            solved: dict[str, _Solved] = {}

            def keep(name: str) -> None:
                solved[name] = _Solved(partial(self._files.copy, name))

            def solve(name: str, tensors: tuple[Tensor, ...]) -> Answer:
                answer, solved[name] = self._solve(name, tensors)
                return answer

            def land(name: str, row: TensorRow | None) -> None:
                if row is not None:
                    done = solved.pop(name)
                    lander.land(done.write, Landed(row, done.changes))
                if on_tensor:
                    on_tensor(name, row)

            walk(self._family, keep, solve, land, names, self._job.device, self._job.solver.working_copies)
        return lander.landed

    def _solve(self, name: str, tensors: tuple[Tensor, ...]) -> tuple[Answer, "_Solved"]:
        job = self._job
        answer, weight = solve_tensor(tensors, job.solver, job.rank, job.device, job.dtype, job.check)
        # As it will be stored: smaller, and what counts for the adapters.
        stored = self._files.as_stored(name, weight.reshape(tensors[0].shape))
        changes = self._fitter.fit(name, stored, tensors) if self._fitter else ()
        mask = answer.bits.certain if job.mask and answer.bits is not None else None

        def write() -> None:
            self._files.write(name, stored)
            layers = {change.model: change.layer for change in changes if change.layer}
            with reported(job.landing):
                if mask is not None:
                    save_mask(self._landing.part(name, ".mask"), mask)
                if layers:
                    save_layers(self._landing.part(name, ".lora"), layers)

        return answer, _Solved(write, tuple(replace(change, layer=None) for change in changes))


@dataclass(frozen=True)
class _Solved:
    """A tensor that is yet to be written."""

    write: Callable[[], None]
    changes: tuple[Change, ...] = ()


class _Lander:
    """Writes tensors in a thread, and then down that they are there. A context manager.

    It holds one tensor: handing over the next waits for the last. Leaving the block, even by an exception, waits for
    what was handed over.
    """

    def __init__(self, landing: Landing, files: CheckpointFiles) -> None:
        self._landing = landing
        self._files = files
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="detune-write")
        self._writing: Future[None] | None = None
        self._unrecorded: list[Landed] = []
        self._recorded = time.monotonic()
        self.landed: list[Landed] = []

    def land(self, write: Callable[[], None], landed: Landed) -> None:
        """Have a tensor written, as soon as the last one is."""
        if self._writing is not None:
            self._writing.result()
        self._writing = self._thread.submit(self._land, write, landed)

    def _land(self, write: Callable[[], None], landed: Landed) -> None:
        write()
        self._unrecorded.append(landed)
        if time.monotonic() - self._recorded > RECORD_SECONDS:
            self._record()

    def _record(self) -> None:
        if not self._unrecorded:
            return
        self._files.sync(landed.row.name for landed in self._unrecorded)
        self._landing.record([landed.to_json() for landed in self._unrecorded])
        self.landed += self._unrecorded
        self._unrecorded = []
        self._recorded = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        try:
            # In this thread: the other one is done.
            self._record()
        except DetuneError:
            if error is None:
                raise
        if error is None and self._writing is not None:
            self._writing.result()


def perform(job: Job, names: tuple[str, ...]) -> list[Landed]:
    """Recover some tensors in a process that knows nothing yet: what an executor is given.

    Args:
        job: What to do.
        names: The tensors.

    Returns:
        What has landed.

    Raises:
        DetuneError: This process does not see the models as the run does, or the tensors cannot be recovered.
    """
    family = _open(job.models, job.identities, job.merge_dtype)
    fitter = _fitter(job.models, job.identities, job.merge_dtype, job.adapters, job.rank, job.device)
    return Performer(job, family, _landing(job.landing), fitter).perform(names)


def hashes(spec: str, merge_dtype: torch.dtype | None) -> dict[str, str]:
    """The SHA-256 of a model's weight files, computed by an executor's worker; see `Checkpoint.hashes`."""
    with open_checkpoint(spec, merge_dtype=merge_dtype) as model:
        return model.hashes()


# One journal for each process.
@lru_cache(maxsize=1)
def _landing(directory: Path) -> Landing:
    return Landing(directory)


# Opened once in each process, and left open for the next unit.
@lru_cache(maxsize=1)
def _open(models: tuple[str, ...], identities: tuple[str, ...], merge_dtype: torch.dtype | None) -> Family:
    try:
        family = Family(models, merge_dtype)
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
    models: tuple[str, ...],
    identities: tuple[str, ...],
    merge_dtype: torch.dtype | None,
    base: str | None,
    rank: int | None,
    device: torch.device | str | None,
) -> ChangeFitter | None:
    if base is None:
        return None
    return ChangeFitter(_open(models, identities, merge_dtype).models, base, rank, device)
