"""Recovery methods: pure functions of a stack of matrices. `SOLVERS` names them."""

from detune.solvers.auto import Auto
from detune.solvers.base import Bits, Expected, LowRank, NotLowRank, NotRecoverable, Recovery, Solver
from detune.solvers.frozen_factors import FrozenFactors
from detune.solvers.intersect import Intersect
from detune.solvers.kronecker import Kronecker
from detune.solvers.mean import Mean
from detune.solvers.on_grid import OnGrid
from detune.solvers.row_scales import RowScales
from detune.solvers.single import Single
from detune.solvers.sparse import Sparse
from detune.solvers.spectral import Spectral
from detune.solvers.stack import NonFinite, Stack

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
    "Bits",
    "Expected",
    "FrozenFactors",
    "Intersect",
    "Kronecker",
    "LowRank",
    "Mean",
    "NonFinite",
    "NotLowRank",
    "NotRecoverable",
    "OnGrid",
    "Recovery",
    "RowScales",
    "Single",
    "Solver",
    "Sparse",
    "Spectral",
    "Stack",
]
