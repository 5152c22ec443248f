"""The execution of a recovery: here, by processes of this machine, or by workers anywhere on a shared file system.

| module | what it knows |
| --- | --- |
| `job` | what is done with one tensor: the same code in every process |
| `completed` | how a tensor is written, and what is known of it then |
| `run` | one run, from what an earlier one left to the last tensor |
| `units` | how tensors are cut into pieces of work |
| `retry` | how pieces are handed to an executor, and again when a worker dies |
| `executors/` | where executors come from: a file each |

How completed tensors are kept on the disk is `detune.checkpoints.run_directory`'s to know.
"""

from detune.recovery.execution.completed import CompletedTensor, read_changes, read_masks
from detune.recovery.execution.executors.dask_cluster import dask_workers, slurm_workers
from detune.recovery.execution.executors.processes import Processes
from detune.recovery.execution.job import Job
from detune.recovery.execution.run import complete, completed_before, hashing, kept_for_later, require_unchanged
from detune.recovery.execution.units import make_units

__all__ = [
    "CompletedTensor",
    "Job",
    "Processes",
    "complete",
    "completed_before",
    "dask_workers",
    "hashing",
    "kept_for_later",
    "make_units",
    "read_changes",
    "read_masks",
    "require_unchanged",
    "slurm_workers",
]
