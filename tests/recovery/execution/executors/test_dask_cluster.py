"""Where workers of a cluster come from, and what is said when they cannot be had."""

import os
import stat
import sys
import time
from pathlib import Path

import pytest

import detune
from detune.errors import DetuneError
from detune.recovery.execution import dask_workers, slurm_workers
from detune.recovery.execution.executors import dask_cluster
from tests.families import plain_family

dask = pytest.importorskip("dask")


@pytest.mark.parametrize(
    ("address", "reason"),
    [("tcp://127.0.0.1:1", "Timed out|refused"), ("nowhere", "missing port number"), ("", "port")],
)
def test_a_scheduler_that_is_not_there(monkeypatch, address, reason):
    monkeypatch.setattr(dask_cluster, "CONNECT_SECONDS", 0.2)
    # One that failed to connect would block the next one when it is collected.
    monkeypatch.setattr("distributed.Client", None)
    with pytest.raises(DetuneError, match=rf"no Dask scheduler at '{address}'; .*({reason}).*; start one with"):
        dask_workers(address).__enter__()


@pytest.mark.parametrize("workers", [dask_workers, slurm_workers])
def test_dask_that_is_not_installed(monkeypatch, workers):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(DetuneError, match=r"distributed is not installed; .*; pip install 'detune\[cluster\]'"):
        workers(1).__enter__()


SBATCH = """#!{python}
import os, subprocess, sys
# Slurm's part: take a copy of the script, give the job its cores, and run it somewhere else.
script = open(sys.argv[-1]).read()
environment = os.environ | {{"SLURM_CPUS_PER_TASK": "3"}}
log = open({log!r}, "w")
process = subprocess.Popen(["sh", "-c", script], env=environment, stdout=log, stderr=log, start_new_session=True)
print("Submitted batch job", process.pid)
"""
SCANCEL = """#!{python}
import os, signal, sys
os.killpg(int(sys.argv[1]), signal.SIGTERM)
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An `sbatch` and a `scancel` that run jobs on this machine."""
    log = tmp_path / "job.log"
    (tmp_path / "bin").mkdir()
    for name, text in (("sbatch", SBATCH), ("scancel", SCANCEL)):
        path = tmp_path / "bin" / name
        path.write_text(text.format(python=sys.executable, log=str(log)))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    # Jobs run what the tests run.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    return log


def test_jobs_of_slurm_are_workers(slurm, tmp_path):
    fine = plain_family(tmp_path / "models")
    job = {"cores": 3, "memory": "1GiB", "python": sys.executable, "local-directory": str(tmp_path)}
    with dask.config.set({f"jobqueue.slurm.{key}": value for key, value in job.items()}), slurm_workers(1) as executor:
        assert executor.submit(thread_variables).result(timeout=60) == ["3", "3"]
        detune.recover(fine.models, tmp_path / "out", "intersect", executor=executor)
        (pid,) = {executor.submit(os.getpid).result() for _ in range(3)}
    assert (tmp_path / "out" / "model.safetensors").is_file()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists(), slurm.read_text()


def thread_variables() -> list[str]:
    return [os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")]


def test_a_job_that_is_not_described():
    with (
        dask.config.set({"jobqueue.slurm.cores": None, "jobqueue.slurm.memory": None}),
        pytest.raises(
            DetuneError, match=r"cannot describe a job to Slurm; jobqueue.slurm has no cores and no memory; set"
        ),
    ):
        slurm_workers(1).__enter__()
