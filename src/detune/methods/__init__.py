"""Recovery methods, one file each: pure functions of a stack of matrices. `SOLVERS` has them by name."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# For type checkers; `X as X` exports a name.
if TYPE_CHECKING:
    from detune.methods.auto import Auto as Auto
    from detune.methods.dora import DoRA as DoRA
    from detune.methods.intersect import Intersect as Intersect
    from detune.methods.lattice import Lattice as Lattice
    from detune.methods.lokr import LoKr as LoKr
    from detune.methods.mean import Mean as Mean
    from detune.methods.shira import SHiRA as SHiRA
    from detune.methods.single import Single as Single
    from detune.methods.spectral import Spectral as Spectral
    from detune.methods.vera import VeRA as VeRA
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

__all__ = ["CLASSES", "SOLVERS", *CLASSES.values()]


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
