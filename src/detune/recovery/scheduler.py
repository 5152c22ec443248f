"""The scheduler of tensors: how many are computed at the same time, and on how many threads each.

One matrix alone keeps several threads busy for a part of its time only: between large products lie small
factorisations. So tensors are computed side by side, as many as memory and threads allow, and the threads are shared
out between them. Small matrices get one thread each, the largest all of them.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Self, TypeVar

import torch

from detune._runtime import use_threads

__all__ = ["SHARED_OUT", "TensorLoad", "TensorScheduler", "computing_threads"]

Result = TypeVar("Result")

# Matrices with fewer entries are computed on one thread: up to 1024x1024 a second was no faster,
# and may have to wait. Any number does near it.
SHARED_OUT = 2**20
# Most memory that may be held at a time, in float32 copies of the largest tensor: with what waits to be written six.
# One tensor alone may hold what it needs. Any number does, it bounds memory.
HELD = 5
# 256 MiB may be held in any case: any number does that every machine has.
HELD_BYTES = 2**28


@dataclass(frozen=True)
class TensorLoad:
    """The memory that one tensor takes.

    Attributes:
        entries: Number of entries of the tensor.
        stack_bytes: Size of all models' tensors together, as stored.
        working_bytes: With what a solver holds beside.
    """

    entries: int
    stack_bytes: int
    working_bytes: int


class TensorScheduler(Generic[Result]):
    """Threads that compute tensors side by side. A context manager.

    Leaving it waits for what is being computed, unless the program is being ended.

    Tensors in work at the same time have the same number of threads, because torch has one setting for all.

    Args:
        loads: Load of each tensor that may come.
        most: How many tensors may be in work at a time; None is one for each thread that torch computes with.
    """

    def __init__(self, loads: Iterable[TensorLoad], most: int | None = None) -> None:
        self._all_threads = torch.get_num_threads()
        # In a forked process the first call makes torch's pool anew, which two threads must not do at once.
        torch.set_num_threads(self._all_threads)
        self._slots = self._all_threads if most is None else most
        largest = max((load.entries for load in loads), default=0)
        self._limit_bytes = max(HELD * 4 * largest, HELD_BYTES)
        self._pool = ThreadPoolExecutor(self._slots, thread_name_prefix="detune-solve")
        self._running: dict[Future[Result], TensorLoad] = {}
        self._threads = self._all_threads

    def threads(self, load: TensorLoad) -> int:
        """The number of threads that a tensor is computed on: the same in every run."""
        if load.entries < SHARED_OUT:
            return 1
        side_by_side = min(self._slots, self._limit_bytes // max(1, load.working_bytes))
        return max(1, self._all_threads // max(1, side_by_side))

    def may_read(self, load: TensorLoad) -> bool:
        """Whether there is memory to read a tensor's stack while others are computed."""
        return not self._running or self._held_bytes + load.stack_bytes <= self._limit_bytes

    def may_start(self, load: TensorLoad) -> bool:
        """Whether there are threads and memory to compute a tensor."""
        if not self._running:
            return True
        threads = self.threads(load)
        slots = min(self._slots, self._all_threads // threads)
        fits = self._held_bytes + load.working_bytes <= self._limit_bytes
        return fits and threads == self._threads and len(self._running) < slots

    def start(self, load: TensorLoad, compute: Callable[[], Result]) -> None:
        """Compute a tensor that may start."""
        self._threads = self.threads(load)
        self._running[self._pool.submit(_on_threads, self._threads, compute)] = load

    def finished(self) -> Iterator[Result]:
        """Wait for some of what is in work.

        Raises:
            Exception: What the computation raised.
        """
        for future in wait(self._running, return_when=FIRST_COMPLETED).done:
            del self._running[future]
            yield future.result()

    def rest(self) -> Iterator[Result]:
        """Wait for all that is in work; raises as `finished`."""
        while self._running:
            yield from self.finished()

    @property
    def _held_bytes(self) -> int:
        return sum(load.working_bytes for load in self._running.values())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ended = error is not None and not isinstance(error, Exception | GeneratorExit)
        self._pool.shutdown(wait=not ended, cancel_futures=True)
        torch.set_num_threads(self._all_threads)


def _on_threads(threads: int, compute: Callable[[], Result]) -> Result:
    # Each thread that computes has a setting of its own.
    torch.set_num_threads(threads)
    return compute()


def computing_threads(entries: int) -> AbstractContextManager[None]:
    """Compute on one thread in the block where a matrix is too small to share out.

    Args:
        entries: Number of entries of the matrix.
    """
    return use_threads(1 if entries < SHARED_OUT else torch.get_num_threads())
