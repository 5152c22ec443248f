"""Hands pieces of work to an executor, and again those whose worker died."""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, as_completed

import torch

from detune.checkpoints import Checkpoint, RunDirectory, absolute
from detune.errors import DetuneError
from detune.recovery.execution.completed import CompletedTensor, read_completed
from detune.recovery.execution.executors.dask_cluster import gave_up
from detune.recovery.execution.job import Job, hashes, perform

logger = logging.getLogger(__name__)

# Deaths of workers before a single piece is done: any number does, a cause that stays kills them all.
DEATHS = 3
GOES_ON = "what is complete stays: the same command does the rest"

Unit = tuple[str, ...]


def submit_with_retries(
    executor: Executor, job: Job, units: Sequence[Unit], on_completed: Callable[[CompletedTensor], None]
) -> None:
    """Have all pieces done.

    Where the executor replaces workers that died, what they had in hand is given out again, without what was complete.

    Args:
        executor: Whose workers see the models and the run's directory by the same paths.
        job: What to do.
        units: The pieces.
        on_completed: Called for each tensor, in no particular order.

    Raises:
        DetuneError: A piece cannot be done, or workers are no more; the first error of any worker.
    """
    deaths = 0
    left = list(units)
    while left:
        before = len(left)
        left = _round(executor, job, left, on_completed)
        if not left:
            return
        deaths = 1 if len(left) < before else deaths + 1
        if deaths >= DEATHS:
            raise DetuneError(
                f"workers died {deaths} times over the same tensors",
                f"{left[0][0]!r} is among them; most often memory is short",
                f"give each worker more memory, or take fewer; {GOES_ON}",
            )
        logger.warning("a worker died; going on without what it had in hand")
        left = _without_completed(job, left, on_completed)


def _round(
    executor: Executor, job: Job, units: Sequence[Unit], on_completed: Callable[[CompletedTensor], None]
) -> list[Unit]:
    """Give each piece out once.

    Returns:
        The pieces whose workers died.
    """
    given: dict[Future[list[CompletedTensor]], Unit] = {}
    left: list[Unit] = []
    try:
        for unit in units:
            given[executor.submit(perform, job, unit)] = unit
        for future in as_completed(given):
            try:
                for completed in future.result():
                    on_completed(completed)
            except BrokenExecutor:
                left.append(given[future])
    except BrokenExecutor as error:
        raise DetuneError("the executor has lost its workers", str(error), GOES_ON) from error
    except CancelledError:
        raise DetuneError(
            "the executor dropped the work", "its scheduler is gone, or somebody cancelled it", GOES_ON
        ) from None
    except Exception as error:
        if not gave_up(error):
            raise
        raise DetuneError("workers died over the same tensors", str(error), GOES_ON) from error
    finally:
        for future in given:
            future.cancel()
    return left


def _without_completed(job: Job, units: Sequence[Unit], on_completed: Callable[[CompletedTensor], None]) -> list[Unit]:
    found = {completed.row.name: completed for completed in read_completed(RunDirectory(job.run_directory))}
    for unit in units:
        for name in unit:
            if name in found:
                on_completed(found[name])
    left = [tuple(name for name in unit if name not in found) for unit in units]
    return [unit for unit in left if unit]


def hashed_by(executor: Executor, model: Checkpoint, merge_dtype: torch.dtype | None) -> Callable[[], dict[str, str]]:
    """Have a worker compute a model's hashes.

    Args:
        executor: Whose.
        model: The model.
        merge_dtype: With which it was opened.

    Returns:
        What waits for the hashes; it computes them itself where the worker was lost.
    """
    try:
        future = executor.submit(hashes, absolute(model.spec), merge_dtype)
    except BrokenExecutor:
        return model.hashes

    def result() -> dict[str, str]:
        try:
            return future.result()
        except (BrokenExecutor, CancelledError):
            logger.warning("a worker died; hashing %s here", model.spec)
            return model.hashes()

    return result
