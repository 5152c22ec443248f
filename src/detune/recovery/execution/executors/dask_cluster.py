"""Workers of a Dask cluster, which may be anywhere: on Slurm, on Kubernetes, or started by hand."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager

from detune.errors import DetuneError, reason_of

# The time that a scheduler may take to answer: any number does that a network needs and a user waits.
CONNECT_SECONDS = 10
# Dask sets both to 1 where they are not set.
_THREADS = ("export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}", "export MKL_NUM_THREADS=$OMP_NUM_THREADS")


def gave_up(error: Exception) -> bool:
    """Whether an error is Dask's word that several workers died over one piece of work; no need to import Dask."""
    return type(error).__name__ == "KilledWorker"


@contextmanager
def dask_workers(scheduler: str) -> Iterator[Executor]:
    """Use the workers of a running scheduler.

    Args:
        scheduler: Its address, `tcp://host:8786` or `host:8786`.

    Yields:
        An executor.

    Raises:
        DetuneError: Dask is not installed, or nobody answers at that address.
    """
    with _required():
        import distributed
    try:
        # A thread of its own is needed: notebooks have a loop running in theirs.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(asyncio.run, _answers(scheduler)).result()
        client = distributed.Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise DetuneError(
            f"no Dask scheduler at {scheduler!r}",
            reason_of(error),
            "start one with `dask scheduler`, and give the address that it prints",
        ) from None
    with client:
        yield client.get_executor()


async def _answers(scheduler: str) -> None:
    """Connect to it and hang up.

    A `Client` that fails to connect is never closed; when it is collected, it asks for a lock, and waits for ever where
    that happens while another client holds it.

    Raises:
        OSError: Nobody answers.
        ValueError: That is no address.
        TypeError: The configuration lacks what such an address needs.
    """
    import distributed
    from distributed.comm.core import connect

    arguments = distributed.Security().get_connection_args("client")
    answered = await connect(scheduler, timeout=CONNECT_SECONDS, **arguments)
    await answered.close()


@contextmanager
def slurm_workers(jobs: int) -> Iterator[Executor]:
    """Submit jobs to Slurm, and use them as workers until the block ends.

    What a job is (partition, cores, memory, time) stands in dask-jobqueue's configuration, `jobqueue.slurm` in
    `~/.config/dask/jobqueue.yaml`. Each job is one worker, which computes with all of its cores.

    Args:
        jobs: How many.

    Yields:
        An executor. Work begins with the first job that starts.

    Raises:
        DetuneError: dask-jobqueue is not installed or not configured, or Slurm refuses.
    """
    with _required():
        import dask
        import dask_jobqueue
        import distributed
    configured = dask.config.get("jobqueue.slurm")
    missing = [key for key in ("cores", "memory") if configured.get(key) is None]
    if missing:
        raise DetuneError(
            "cannot describe a job to Slurm",
            f"jobqueue.slurm has no {' and no '.join(missing)}",
            "set them in ~/.config/dask/jobqueue.yaml",
        )
    try:
        # The last `--nthreads` counts: tensors are recovered one at a time, on all cores together.
        cluster = dask_jobqueue.SLURMCluster(
            processes=1,
            # Any port: several runs may start from one login node.
            scheduler_options={"dashboard_address": ":0"},
            worker_extra_args=[*(configured.get("worker-extra-args") or []), "--nthreads", "1"],
            job_script_prologue=[*_THREADS, *(configured.get("job-script-prologue") or [])],
        )
    except (ValueError, TypeError, OSError) as error:
        raise DetuneError(
            "cannot describe a job to Slurm", reason_of(error), "set jobqueue.slurm in ~/.config/dask/jobqueue.yaml"
        ) from None
    with cluster:
        try:
            cluster.scale(jobs=jobs)
        except (RuntimeError, OSError) as error:
            raise DetuneError("Slurm refuses the jobs", reason_of(error), "try `sbatch` by hand") from None
        with distributed.Client(cluster, set_as_default=False) as client:
            yield client.get_executor()


@contextmanager
def _required() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise DetuneError(
            f"{(error.name or 'dask').partition('.')[0]} is not installed",
            "a cluster needs it",
            "pip install 'detune[cluster]'",
        ) from None
