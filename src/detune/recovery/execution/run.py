"""One run, from what an earlier one left to the last tensor."""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, suppress

import torch

from detune._runtime import OnStart
from detune.adapters.changes import ChangeFitter
from detune.checkpoints import Checkpoint, CheckpointFiles, RunDirectory, Target, identity
from detune.compatibility.model_set import ModelSet
from detune.errors import DetuneError, InputError
from detune.recovery.execution.completed import CompletedTensor, verify
from detune.recovery.execution.job import Job, Performer
from detune.recovery.execution.retry import hashed_by, submit_with_retries
from detune.recovery.execution.units import make_units
from detune.recovery.loop import OnTensor

logger = logging.getLogger(__name__)


@contextmanager
def kept_for_later(run_directory: RunDirectory) -> Iterator[None]:
    """Leave what is complete for the same command to go on from, unless it is of no use; a note on the error says so.

    Args:
        run_directory: The run's.
    """
    try:
        yield
    except BaseException as error:
        # An error with a cause is that of a disk, a network or a worker, and may be gone the next time.
        useless = isinstance(error, InputError) and error.__cause__ is None
        if not run_directory.is_spent and not useless:
            kept = f"what is complete stays in {run_directory.directory}{_count(run_directory)}"
            error.add_note(f"{kept}: the same command does the rest")
        else:
            run_directory.remove()
        raise


def _count(run_directory: RunDirectory) -> str:
    """The number of tensors that are complete, where it can still be told."""
    with suppress(DetuneError, OSError, ValueError):
        names = {row["row"]["name"] for row in run_directory.journal.rows()}
        return f", {len(names)} tensor{'s' * (len(names) != 1)}"
    return ""


def completed_before(
    run_directory: RunDirectory, files: CheckpointFiles, target: Target, family: ModelSet
) -> dict[str, CompletedTensor]:
    """Find what an earlier run of the same command left, and make the files to go on with.

    Args:
        run_directory: The run's.
        files: The checkpoint in it.
        target: Where it will go.
        family: Its models.

    Returns:
        What is complete, by tensor.

    Raises:
        OutputError: There is no space for the rest, or the disk refuses.
    """
    files.prepare()
    completed = verify(run_directory, files, family.names)
    if completed:
        logger.info("%d tensors were complete before", len(completed))
    target.require_space(files.needed_bytes - files.stored_bytes(completed))
    return completed


def complete(
    job: Job,
    family: ModelSet,
    run_directory: RunDirectory,
    completed: dict[str, CompletedTensor],
    executor: Executor | None,
    on_tensor: OnTensor | None,
    on_start: OnStart | None,
) -> dict[str, CompletedTensor]:
    """Recover what is not complete yet.

    Args:
        job: What to do.
        family: Its models.
        run_directory: Where to.
        completed: What was complete before, by tensor.
        executor: Whose workers do it; None does it here.
        on_tensor: As in `recover`.
        on_start: As in `recover`.

    Returns:
        All that is complete, by tensor.

    Raises:
        DetuneError: It cannot be done.
    """

    def tell(found: CompletedTensor) -> None:
        if on_tensor:
            on_tensor(found.row.name, None)
            on_tensor(found.row.name, found.row)

    for found in completed.values():
        tell(found)
    missing = [name for name in family.names if name not in completed]
    if on_start:
        on_start({name: family.read_bytes(name) for name in missing})
    if executor is None:
        fitter = ChangeFitter(family, job.adapters, job.rank, job.device) if job.adapters else None
        done = Performer(job, family, run_directory, fitter).perform(missing, on_tensor)
        return completed | {found.row.name: found for found in done}
    done = []

    def take(found: CompletedTensor) -> None:
        done.append(found)
        tell(found)

    submit_with_retries(executor, job, make_units(family, missing), take)
    return completed | {found.row.name: found for found in done}


@contextmanager
def hashing(
    models: Sequence[Checkpoint], merge_dtype: torch.dtype | None, executor: Executor | None
) -> Iterator[list[Callable[[], dict[str, str]]]]:
    """Compute the hashes of the models' files meanwhile, where the tensors are computed.

    Args:
        models: The models.
        merge_dtype: With which they were opened.
        executor: Whose workers do it; None does it here.

    Yields:
        For each model, what waits for its hashes.
    """
    if executor is not None:
        yield [hashed_by(executor, model, merge_dtype) for model in models]
        return
    thread = ThreadPoolExecutor(1, thread_name_prefix="detune-hash")
    try:
        yield [thread.submit(model.hashes).result for model in models]
    finally:
        thread.shutdown(wait=False, cancel_futures=True)


def require_unchanged(job: Job, family: ModelSet) -> None:
    """Refuse a result of models that are not what they were.

    Args:
        job: Names what they were.
        family: The models.

    Raises:
        InputError: They are not.
    """
    if tuple(map(identity, family.models)) != job.identities:
        raise InputError(
            "a model has changed since the run began", "its files have other content, sizes or times", "run it again"
        )
