"""Completed tensors: the thread that writes them, and what is known of them afterwards."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from types import TracebackType
from typing import Any, Self

from detune.adapters.changes import AdapterChange, AdapterRow, Kept
from detune.checkpoints import CheckpointFiles, Kind, RunDirectory, unpack_layers
from detune.errors import DetuneError, OutputError
from detune.recovery.report import TensorResult

__all__ = [
    "FACTORS",
    "MASK",
    "CompletedTensor",
    "ResultWriter",
    "Solved",
    "Written",
    "read_changes",
    "read_completed",
    "read_masks",
    "verify",
]

logger = logging.getLogger(__name__)

MASK = ".mask"
FACTORS = ".lora"
"""Suffixes of the parts of a tensor."""

# The time that a tensor on the disk may wait for its line in the journal; a killed run does that much again. Any number
# does that is short beside the work on a tensor, and long beside the writing of a line.
RECORD_SECONDS = 5.0


@dataclass(frozen=True)
class CompletedTensor:
    """A completed tensor: all that is known of it besides its bytes.

    Attributes:
        row: For the report.
        written: The checksums of its bytes and parts.
        changes: What it becomes in adapters; their factors are in a part of the run's directory.
    """

    row: TensorResult
    written: "Written"
    changes: tuple[AdapterChange, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The tensor as JSON can hold it."""
        return asdict(self)

    @classmethod
    def of_json(cls, content: Any) -> "CompletedTensor":
        """Inverse of `to_json`.

        Raises:
            TypeError: It is something else, as is said by the other exceptions.
            LookupError: Something is missing.
            ValueError: Something has another kind of value.
        """
        changes = (
            AdapterChange(change["model"], _row(change["row"]), _row(change["as_base"]) if change["as_base"] else None)
            for change in content["changes"]
        )
        return cls(TensorResult.of_json(content["row"]), Written(**content["written"]), tuple(changes))


def _row(content: Mapping[str, Any]) -> AdapterRow:
    return AdapterRow(**{**content, "shape": tuple(content["shape"]), "kept": Kept(content["kept"])})


def read_completed(run_directory: RunDirectory) -> list[CompletedTensor]:
    """Read the completed tensors that a run's journal lists, in its order."""
    found = []
    for row in run_directory.journal.rows():
        try:
            found.append(CompletedTensor.of_json(row))
        except (TypeError, LookupError, ValueError):
            logger.warning("a line of the journal in %s speaks of no tensor", run_directory.directory)
    return found


def verify(run_directory: RunDirectory, files: CheckpointFiles, names: Iterable[str]) -> dict[str, CompletedTensor]:
    """Find what is still as it was written; forget the rest, and say so.

    Args:
        run_directory: The run's.
        files: The checkpoint in it.
        names: The tensors that may be complete.

    Returns:
        What is complete, by tensor.

    Raises:
        OutputError: The disk refuses.
    """
    spoken_of: dict[str, list[CompletedTensor]] = {name: [] for name in names}
    lines = read_completed(run_directory)
    for line in lines:
        spoken_of.get(line.row.name, []).append(line)
    # A tensor that was written more than once is as one of its lines says.
    found = {
        name: next((line for line in candidates if _is_whole(line, run_directory, files)), None)
        for name, candidates in spoken_of.items()
    }
    whole = {name: completed for name, completed in found.items() if completed is not None}
    changed = [name for name, candidates in spoken_of.items() if candidates and name not in whole]
    if changed:
        logger.warning(
            "%d of %d tensors in %s have changed since they were written, the first is %r: they are computed again",
            len(changed),
            len(changed) + len(whole),
            run_directory.directory,
            changed[0],
        )
    if len(whole) < len(lines):
        run_directory.journal.keep([completed.to_json() for completed in whole.values()])
    return whole


def _is_whole(completed: CompletedTensor, run_directory: RunDirectory, files: CheckpointFiles) -> bool:
    name = completed.row.name
    if files.checksum(name) != completed.written.weights:
        return False
    try:
        for suffix, checksum in completed.written.parts.items():
            run_directory.read_part(name, suffix, checksum)
    except OutputError as error:
        logger.info("%s", error)
        return False
    return True


def read_changes(
    run_directory: RunDirectory, completed: CompletedTensor, kind: Kind | None
) -> tuple[AdapterChange, ...]:
    """The changes of a tensor with their factors.

    Args:
        run_directory: Where they are.
        completed: The tensor.
        kind: What its weight is to PEFT, if that takes a LoRA.

    Raises:
        OutputError: The factors have changed since they were written.
    """
    if kind is None or not any(change.row.kept is Kept.LORA for change in completed.changes):
        return completed.changes
    layers = unpack_layers(run_directory.read_part(completed.row.name, FACTORS, completed.written.parts[FACTORS]), kind)
    return tuple(replace(change, layer=layers.get(change.model)) for change in completed.changes)


def read_masks(
    run_directory: RunDirectory, completed: Mapping[str, CompletedTensor], names: Iterable[str]
) -> Iterator[tuple[str, tuple[int, ...], bytes]]:
    """Read the masks for `write_masks`, of each tensor whose bits were looked at.

    Args:
        run_directory: Where they are.
        completed: What is complete, by tensor.
        names: The tensors in their order.

    Yields:
        A tensor's name, its shape and its mask.

    Raises:
        OutputError: A mask has changed since it was written.
    """
    for name in names:
        parts = completed[name].written.parts
        if MASK in parts:
            yield name, completed[name].row.shape, run_directory.read_part(name, MASK, parts[MASK])


@dataclass(frozen=True)
class Written:
    """The checksums, CRC-32, of what was written of a tensor.

    Attributes:
        weights: That of the tensor's bytes.
        parts: Those of its parts, by their suffix.
    """

    weights: int
    parts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Solved:
    """A tensor that is yet to be written.

    Attributes:
        write: Writes it.
        held_bytes: What it holds until then: nothing where it is copied from a file.
        changes: What it becomes in adapters.
    """

    write: Callable[[], Written]
    held_bytes: int = 0
    changes: tuple[AdapterChange, ...] = ()


class ResultWriter:
    """Writes tensors in a thread, one after the other, and then down that they are there. A context manager.

    What waits to be written holds memory: handing over more than `most_bytes` waits. Leaving the block waits for all
    that was handed over; leaving it by an exception, for what was computed.

    Args:
        run_directory: Where to.
        files: The checkpoint in it.
        most_bytes: What tensors that wait may hold; one alone may hold more.

    Attributes:
        completed: What is complete.
    """

    def __init__(self, run_directory: RunDirectory, files: CheckpointFiles, most_bytes: int) -> None:
        self._run_directory = run_directory
        self._files = files
        self._most_bytes = most_bytes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="detune-write")
        self._waiting: deque[tuple[Future[None], int]] = deque()
        self._unrecorded: list[CompletedTensor] = []
        self._recorded = time.monotonic()
        self.completed: list[CompletedTensor] = []

    def complete(self, solved: Solved, row: TensorResult) -> None:
        """Have a tensor written.

        Raises:
            OutputError: The disk has refused one that was handed over before.
        """
        while self._waiting and (self._waiting[0][0].done() or not self._has_room(solved.held_bytes)):
            self._waiting.popleft()[0].result()
        self._waiting.append((self._thread.submit(self._write, solved, row), solved.held_bytes))

    def _has_room(self, more_bytes: int) -> bool:
        held_bytes = sum(held for _, held in self._waiting)
        return not more_bytes or held_bytes + more_bytes <= self._most_bytes

    def _write(self, solved: Solved, row: TensorResult) -> None:
        self._unrecorded.append(CompletedTensor(row, solved.write(), solved.changes))
        if time.monotonic() - self._recorded > RECORD_SECONDS:
            self._record()

    def _record(self) -> None:
        if not self._unrecorded:
            return
        self._files.sync(completed.row.name for completed in self._unrecorded)
        self._run_directory.journal.record([completed.to_json() for completed in self._unrecorded])
        self.completed += self._unrecorded
        self._unrecorded = []
        self._recorded = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for future, held_bytes in self._waiting if error is not None else ():
            # Nothing was computed for a copy.
            if not held_bytes:
                future.cancel()
        self._thread.shutdown()
        try:
            # This thread may record: the other one is done.
            self._record()
        except DetuneError:
            if error is None:
                raise
        if error is None:
            for future, _ in self._waiting:
                future.result()
