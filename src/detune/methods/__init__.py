"""Recovery methods, one file each: pure functions of a stack of matrices. `SOLVERS` has them by name."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detune.methods.auto import Auto
    from detune.methods.dora import DoRA
    from detune.methods.intersect import Intersect
    from detune.methods.lattice import Lattice
    from detune.methods.lokr import LoKr
    from detune.methods.mean import Mean
    from detune.methods.shira import SHiRA
    from detune.methods.single import Single
    from detune.methods.spectral import Spectral
    from detune.methods.vera import VeRA
    from detune.problem import Solver

    SOLVERS: dict[str, type[Solver]]

# Each method's class, by the name of its file, which is also what the command calls it. The command lists the names
# without importing torch: a class is imported when it is asked for.
CLASSES = {
    "auto": "Auto",
    "lattice": "Lattice",
    "intersect": "Intersect",
    "lokr": "LoKr",
    "dora": "DoRA",
    "shira": "SHiRA",
    "vera": "VeRA",
    "spectral": "Spectral",
    "mean": "Mean",
    "single": "Single",
}

__all__ = [
    "CLASSES",
    "SOLVERS",
    "Auto",
    "DoRA",
    "Intersect",
    "Lattice",
    "LoKr",
    "Mean",
    "SHiRA",
    "Single",
    "Spectral",
    "VeRA",
]


def __getattr__(name: str) -> Any:
    if name == "SOLVERS":
        found: Any = {method: __getattr__(cls) for method, cls in CLASSES.items()}
    elif name in CLASSES.values():
        method = next(method for method, cls in CLASSES.items() if cls == name)
        found = getattr(import_module(f"detune.methods.{method}"), name)
    else:
        raise AttributeError(f"module 'detune.methods' has no attribute {name!r}")
    globals()[name] = found
    return found
