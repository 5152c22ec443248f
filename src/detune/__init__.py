"""Recover the weights of a base model from several merged LoRA fine-tunes of it.

Recover a checkpoint with `recover`, one stack of matrices with `recover_matrix`; look first with `inspect`, measure
with `compare`. Method: Horwitz, Kahana & Hoshen, ICML 2024 (arXiv 2402.10208), and this project's closed form.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# For type checkers; `X as X` exports a name.
if TYPE_CHECKING:
    from detune.adapters.extract import Extraction as Extraction
    from detune.adapters.extract import extract as extract
    from detune.checkpoints.push import Pushed as Pushed
    from detune.checkpoints.push import push as push
    from detune.compatibility.check import FamilyCheck as FamilyCheck
    from detune.compatibility.check import check_family as check_family
    from detune.errors import DetuneError as DetuneError
    from detune.errors import InputError as InputError
    from detune.errors import OutputError as OutputError
    from detune.lineage import Lineage as Lineage
    from detune.lineage import find_lineage as find_lineage
    from detune.packing import PackReport as PackReport
    from detune.packing import UnpackReport as UnpackReport
    from detune.packing import pack as pack
    from detune.packing import unpack as unpack
    from detune.problem import LowRank as LowRank
    from detune.problem import NotRecoverable as NotRecoverable
    from detune.problem import Recovery as Recovery
    from detune.recovery.api import recover as recover
    from detune.recovery.api import recover_matrix as recover_matrix
    from detune.recovery.compare import Comparison as Comparison
    from detune.recovery.compare import compare as compare
    from detune.recovery.inspect import inspect as inspect
    from detune.recovery.report import Report as Report
    from detune.recovery.report import TensorResult as TensorResult

__version__ = "0.1.0"

# Where each public name lives. They are imported when first used: `import detune` does not import torch.
_HOMES = {
    "Comparison": "recovery.compare",
    "DetuneError": "errors",
    "Extraction": "adapters.extract",
    "FamilyCheck": "compatibility.check",
    "InputError": "errors",
    "Lineage": "lineage",
    "LowRank": "problem",
    "NotRecoverable": "problem",
    "OutputError": "errors",
    "PackReport": "packing",
    "Pushed": "checkpoints.push",
    "Recovery": "problem",
    "Report": "recovery.report",
    "TensorResult": "recovery.report",
    "UnpackReport": "packing",
    "check_family": "compatibility.check",
    "compare": "recovery.compare",
    "extract": "adapters.extract",
    "find_lineage": "lineage",
    "inspect": "recovery.inspect",
    "pack": "packing",
    "push": "checkpoints.push",
    "recover": "recovery.api",
    "recover_matrix": "recovery.api",
    "unpack": "packing",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'detune' has no attribute {name!r}")
    return getattr(import_module(f"detune.{_HOMES[name]}"), name)
