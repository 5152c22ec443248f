"""The problem and its answer: a stack of matrices `W_i = W + M_i`, its storage noise, and a `Recovery` of W."""

from detune.problem.low_rank import LowRank
from detune.problem.recovery import Bits, Expected, NotLowRank, NotRecoverable, Recovery, Solver
from detune.problem.stack import NonFinite, Stack

__all__ = [
    "Bits",
    "Expected",
    "LowRank",
    "NonFinite",
    "NotLowRank",
    "NotRecoverable",
    "Recovery",
    "Solver",
    "Stack",
]
