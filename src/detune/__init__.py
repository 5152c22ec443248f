"""Recover the weights of a base model from several merged LoRA fine-tunes of it.

Recover a checkpoint with `recover`, one stack of matrices with `recover_matrix`; look first with `inspect`, measure
with `compare`. Method: Horwitz, Kahana & Hoshen, ICML 2024 (arXiv 2402.10208), and this project's closed form.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detune.comparison import Comparison, compare
    from detune.errors import DetuneError, InputError, OutputError
    from detune.extraction import Extraction, extract
    from detune.inspection import inspect
    from detune.kinship import Kinship, check_family
    from detune.packing import PackReport, UnpackReport, pack, unpack
    from detune.recovery import recover, recover_matrix
    from detune.report import Report, TensorRow
    from detune.solvers import LowRank, NotRecoverable, Recovery

__version__ = "0.1.0"

# Where each public name lives. They are imported when first used: `import detune` does not import torch.
_HOMES = {
    "Comparison": "comparison",
    "DetuneError": "errors",
    "Extraction": "extraction",
    "InputError": "errors",
    "Kinship": "kinship",
    "LowRank": "solvers",
    "NotRecoverable": "solvers",
    "OutputError": "errors",
    "PackReport": "packing",
    "Recovery": "solvers",
    "Report": "report",
    "TensorRow": "report",
    "UnpackReport": "packing",
    "check_family": "kinship",
    "compare": "comparison",
    "extract": "extraction",
    "inspect": "inspection",
    "pack": "packing",
    "recover": "recovery",
    "recover_matrix": "recovery",
    "unpack": "packing",
}

__all__ = [
    "Comparison",
    "DetuneError",
    "Extraction",
    "InputError",
    "Kinship",
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
