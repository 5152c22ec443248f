"""What lands of a tensor, the thread that lands it, and what is known of it afterwards."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any, Self

from detune.adapters.changes import AdapterRow, Change, Kept
from detune.checkpoints import CheckpointFiles, Kind, Landing, read_layers
from detune.errors import DetuneError
from detune.recovery.report import Status, TensorRow

__all__ = ["Landed", "Lander", "Solved", "read_changes", "read_landed"]

# How long what is on the disk may wait until it is written down; a killed run does that much again.
RECORD_SECONDS = 5.0


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


@dataclass(frozen=True)
class Solved:
    """A tensor that is yet to be written.

    Attributes:
        write: Writes it.
        held_bytes: What it holds until then: nothing where it is copied from a file.
        changes: What it becomes in adapters.
    """

    write: Callable[[], None]
    held_bytes: int = 0
    changes: tuple[Change, ...] = ()


class Lander:
    """Writes tensors in a thread, one after the other, and then down that they are there. A context manager.

    What waits to be written holds memory: handing over more than `most_bytes` waits. Leaving the block waits for all
    that was handed over; leaving it by an exception, for what was computed.

    Args:
        landing: Where to.
        files: The checkpoint in it.
        most_bytes: What tensors that wait may hold; one alone may hold more.

    Attributes:
        landed: What has landed.
    """

    def __init__(self, landing: Landing, files: CheckpointFiles, most_bytes: int) -> None:
        self._landing = landing
        self._files = files
        self._most_bytes = most_bytes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="detune-write")
        self._waiting: deque[tuple[Future[None], int]] = deque()
        self._unrecorded: list[Landed] = []
        self._recorded = time.monotonic()
        self.landed: list[Landed] = []

    def land(self, solved: Solved, row: TensorRow) -> None:
        """Have a tensor written.

        Raises:
            OutputError: The disk has refused one that was handed over before.
        """
        while self._waiting and (self._waiting[0][0].done() or not self._has_room(solved.held_bytes)):
            self._waiting.popleft()[0].result()
        landed = Landed(row, solved.changes)
        self._waiting.append((self._thread.submit(self._land, solved.write, landed), solved.held_bytes))

    def _has_room(self, more_bytes: int) -> bool:
        held_bytes = sum(held for _, held in self._waiting)
        return not more_bytes or held_bytes + more_bytes <= self._most_bytes

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
        for future, held_bytes in self._waiting if error is not None else ():
            # Nothing was computed for a copy.
            if not held_bytes:
                future.cancel()
        self._thread.shutdown()
        try:
            # In this thread: the other one is done.
            self._record()
        except DetuneError:
            if error is None:
                raise
        if error is None:
            for future, _ in self._waiting:
                future.result()
