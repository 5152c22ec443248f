"""Recovery methods: pure functions of a stack of matrices. `SOLVERS` names them."""

from detune.methods.auto import Auto
from detune.methods.dora import RowScales
from detune.methods.intersect import Intersect
from detune.methods.lattice import OnGrid
from detune.methods.lokr import Kronecker
from detune.methods.mean import Mean
from detune.methods.shira import Sparse
from detune.methods.single import Single
from detune.methods.spectral import Spectral
from detune.methods.vera import FrozenFactors
from detune.problem import Solver

SOLVERS: dict[str, type[Solver]] = {
    "auto": Auto,
    "lattice": OnGrid,
    "intersect": Intersect,
    "kronecker": Kronecker,
    "scaled": RowScales,
    "sparse": Sparse,
    "vera": FrozenFactors,
    "spectral": Spectral,
    "mean": Mean,
    "single": Single,
}

# Solvers of models that may differ at full rank: whether such models share a base, low ranks do not tell.
ANY_RANK = (Kronecker, RowScales, Sparse, FrozenFactors, Mean, Single)

__all__ = [
    "ANY_RANK",
    "SOLVERS",
    "Auto",
    "FrozenFactors",
    "Intersect",
    "Kronecker",
    "Mean",
    "OnGrid",
    "RowScales",
    "Single",
    "Sparse",
    "Spectral",
]
