"""The problem and its answer: a stack of matrices `W_i = W + M_i`, its storage noise, and a `Recovery` of W."""

from detune.problem.low_rank import LowRank
from detune.problem.recovery import DecodedBits, NotLowRank, NotRecoverable, PredictedError, Recovery, Solver
from detune.problem.stack import NonFinite, Stack

__all__ = [
    "DecodedBits",
    "LowRank",
    "NonFinite",
    "NotLowRank",
    "NotRecoverable",
    "PredictedError",
    "Recovery",
    "Solver",
    "Stack",
]
