"""How a recovery is executed: here, by processes of this machine, or by workers anywhere on a shared file system.

| module | what it knows |
| --- | --- |
| `job` | what is done with one tensor, and where that lands: the same code in every process |
| `units` | how tensors are cut into pieces of work |
| `dispatch` | how pieces are handed to an executor, and what happens when a worker dies |
| `processes`, `on_dask` | where executors come from |

What has landed is `detune.checkpoints.landing`'s to know.
"""

from detune.execution.dispatch import dispatch, hashed_by
from detune.execution.job import Job, Landed, Performer, read_changes, read_landed
from detune.execution.on_dask import dask_workers, slurm_workers
from detune.execution.processes import Processes
from detune.execution.units import make_units

__all__ = [
    "Job",
    "Landed",
    "Performer",
    "Processes",
    "dask_workers",
    "dispatch",
    "hashed_by",
    "make_units",
    "read_changes",
    "read_landed",
    "slurm_workers",
]
