"""Worker processes of this machine."""

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, parent_process
from multiprocessing.context import SpawnContext, SpawnProcess
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from detune.errors import InputError
from detune.recovery.execution.memory import keep_freed_memory

P = ParamSpec("P")
T = TypeVar("T")


class Processes(Executor):
    """A pool of processes that replaces those that are killed. A context manager.

    Each computes with its share of the cores. They end with the process that made them, however it ends.

    Args:
        workers: How many.

    Raises:
        InputError: Fewer than one.

    Example:
        >>> with Processes(4) as executor:  # doctest: +SKIP
        ...     detune.recover(models, "base", executor=executor)
    """

    def __init__(self, workers: int) -> None:
        if workers < 1:
            raise InputError(f"{workers} workers: expected at least one", "leave it out to compute in this process")
        self._workers = workers
        self._context = _Context()
        self._pool = self._new_pool()

    def _new_pool(self) -> ProcessPoolExecutor:
        threads = max(1, cores() // self._workers)
        return ProcessPoolExecutor(self._workers, self._context, _begin, (threads,))

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """See `concurrent.futures.Executor.submit`; makes a new pool where the last one has lost a process."""
        try:
            return self._pool.submit(fn, *args, **kwargs)
        except BrokenProcessPool:
            self._pool.shutdown()
            self._pool = self._new_pool()
            return self._pool.submit(fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """See `concurrent.futures.Executor.shutdown`."""
        self._pool.shutdown(wait, cancel_futures=cancel_futures)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            # Whatever they are at is not wanted any more.
            for process in self._context.started:
                if process.is_alive():
                    process.terminate()
        self.shutdown(cancel_futures=error is not None)


# Sent to all processes of a terminal at once: its parent's to hear, and the parent ends its workers.
_PARENTS_SIGNALS = (signal.SIGINT, signal.SIGHUP)


class _Worker(SpawnProcess):
    """A process that hears nothing of a terminal's signals, from its first moment on."""

    def start(self) -> None:
        """See `multiprocessing.Process.start`."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _PARENTS_SIGNALS)
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Context(SpawnContext):
    """Starts processes afresh, as threads and forks do not mix, and knows them."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[SpawnProcess] = []

    def Process(self, *args: Any, **kwargs: Any) -> SpawnProcess:  # type: ignore[override]
        process = _Worker(*args, **kwargs)
        self.started.append(process)
        return process


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _begin(threads: int) -> None:
    """Set a worker up: without its parent there is nothing to do."""
    import torch

    keep_freed_memory()
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
