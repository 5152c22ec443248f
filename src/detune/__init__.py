"""Recover the weights of a base model from several merged LoRA fine-tunes of it.

Recover a checkpoint with `recover`, one stack of matrices with `recover_matrix`; look first with `inspect`, measure
with `compare`. Method: Horwitz, Kahana & Hoshen, ICML 2024 (arXiv 2402.10208), and this project's closed form.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detune.adapters.extract import Extraction, extract
    from detune.compatibility.check import FamilyCheck, check_family
    from detune.errors import DetuneError, InputError, OutputError
    from detune.packing import PackReport, UnpackReport, pack, unpack
    from detune.problem import LowRank, NotRecoverable, Recovery
    from detune.recovery.api import recover, recover_matrix
    from detune.recovery.compare import Comparison, compare
    from detune.recovery.inspect import inspect
    from detune.recovery.report import Report, TensorRow

__version__ = "0.1.0"

# Where each public name lives. They are imported when first used: `import detune` does not import torch.
_HOMES = {
    "Comparison": "recovery.compare",
    "DetuneError": "errors",
    "Extraction": "adapters.extract",
    "InputError": "errors",
    "FamilyCheck": "compatibility.check",
    "LowRank": "problem",
    "NotRecoverable": "problem",
    "OutputError": "errors",
    "PackReport": "packing",
    "Recovery": "problem",
    "Report": "recovery.report",
    "TensorRow": "recovery.report",
    "UnpackReport": "packing",
    "check_family": "compatibility.check",
    "compare": "recovery.compare",
    "extract": "adapters.extract",
    "inspect": "recovery.inspect",
    "pack": "packing",
    "recover": "recovery.api",
    "recover_matrix": "recovery.api",
    "unpack": "packing",
}

__all__ = [
    "Comparison",
    "DetuneError",
    "Extraction",
    "FamilyCheck",
    "InputError",
    "LowRank",
    "NotRecoverable",
    "OutputError",
    "PackReport",
    "Recovery",
    "Report",
    "TensorRow",
    "UnpackReport",
    "check_family",
    "compare",
    "extract",
    "inspect",
    "pack",
    "recover",
    "recover_matrix",
    "unpack",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'detune' has no attribute {name!r}")
    return getattr(import_module(f"detune.{_HOMES[name]}"), name)
