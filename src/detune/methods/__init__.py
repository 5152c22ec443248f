"""Recovery methods: pure functions of a stack of matrices. `SOLVERS` names them."""

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

SOLVERS: dict[str, type[Solver]] = {
    "auto": Auto,
    "lattice": Lattice,
    "intersect": Intersect,
    "lokr": LoKr,
    "dora": DoRA,
    "shira": SHiRA,
    "vera": VeRA,
    "spectral": Spectral,
    "mean": Mean,
    "single": Single,
}

# Solvers of models that may differ at full rank: whether such models share a base, low ranks do not tell.
ANY_RANK = (LoKr, DoRA, SHiRA, VeRA, Mean, Single)

__all__ = [
    "ANY_RANK",
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
