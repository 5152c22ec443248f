"""How far an answer can be trusted, without the truth.

Nothing here believes the solver: misfit and distance to the maximum-likelihood answer are measured on the data. What
must be assumed is said in `Certificate.reason`, and in the section on the certificate of `docs/method.md`.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from detune.solvers.base import LowRank, Recovery
from detune.solvers.identifiability import ErrorTraces, error_traces
from detune.solvers.linalg import thin_svd
from detune.solvers.misfit import Misfit
from detune.solvers.polish import Core
from detune.solvers.stack import Stack, storage_variance

# A misfit of more than this many times the storage noise's (root mean square) is not storage noise.
MOST_LEFT = 2.0
# Singular values below this share of a delta's largest are rounding.
ROUNDING = 1e-13
# The noise that rounding must leave is known as well as if so many entries had been seen.
PRIOR = 30.0


class Verdict(StrEnum):
    """What an answer is worth."""

    EXACT = "exact"
    """The base's own bits."""
    FLOOR = "to the storage floor"
    """As close as the rounding of the models lets any method come; the predicted W-Error says how close."""
    APPROXIMATE = "approximate"
    """The prediction may be too good: the reason says why."""
    NOT_DETERMINED = "not determined"
    """The data do not hold the answer, or part of it."""


@dataclass(frozen=True)
class Certificate:
    """What is known of an answer's error.

    Attributes:
        verdict: In two words.
        reason: In one sentence.
        undetermined: Dimension of the space of changes of W that the data cannot see; 0 is unique. None where the
            method has no model of the deltas.
        predicted_w_error: `log10` of the mean squared error per entry to expect of the weight once it is stored; None
            where there is none (exact) or no telling (not determined).
        agreement: The same figure from recoveries without some of the models; None where they were not made.
    """

    verdict: Verdict
    reason: str
    undetermined: int | None = None
    predicted_w_error: float | None = None
    agreement: float | None = None


def certify(stack: Stack, recovery: Recovery, stored: torch.dtype | None = None) -> Certificate:
    """Judge an answer by the data it was made from.

    Args:
        stack: The models.
        recovery: What a solver made of them.
        stored: The dtype that the weight will be rounded to; its own by default.

    Returns:
        The certificate.
    """
    if recovery.method == "unchanged":
        return Certificate(Verdict.EXACT, f"the base's own bits, if {recovery.reason.partition(':')[0]} by no accident")
    if recovery.bits is not None:
        return _of_bits(recovery)
    if not recovery.deltas:
        return Certificate(Verdict.NOT_DETERMINED, "no model of the deltas: how far they are from zero is unknown")
    return _of_fit(stack, recovery, stored or recovery.weight.dtype)


def _of_bits(recovery: Recovery) -> Certificate:
    """The base's grid decides what the ranks leave open."""
    bits = recovery.bits
    assert bits is not None
    name = str(bits.grid).removeprefix("torch.")
    chance = f"off that grid with a probability below 1e{math.ceil(bits.log10_false_positive)}"
    if bool(bits.certain.all()):
        return Certificate(Verdict.EXACT, f"every entry is certain on the base's {name} grid; {chance}", 0)
    reason = f"{100 * bits.share:.4g} % of the entries are certain on the base's {name} grid; {chance}"
    return Certificate(Verdict.FLOOR, reason, 0, _log10(bits.expected_mse))


def _of_fit(stack: Stack, recovery: Recovery, stored: torch.dtype) -> Certificate:
    """From the operator at the recovered spaces, the misfit and the storage noise."""
    spaces = [_Space.of(M_i) for M_i in recovery.deltas]
    U, V = [space.U for space in spaces], [space.V for space in spaces]
    core = Core.of(U, V)
    traces = error_traces(core)
    misfit = Misfit.of(stack, recovery, core, U, V)
    variances = stack.noise.square().to(core.Q.device)
    excess = _excess(misfit, traces, variances)
    noise = excess * float((variances * traces.weight).sum())
    rounded = float(storage_variance(recovery.weight.to(stored)).mean())
    mse = (noise + misfit.distance) / recovery.weight.numel() + rounded
    if traces.null:
        reason = f"the data cannot see a space of changes of the weight of dimension {traces.null}"
        return Certificate(Verdict.NOT_DETERMINED, reason, traces.null)
    if excess > MOST_LEFT**2:
        reason = f"{excess**0.5:.2g} times the storage noise is left: adapters of these ranks do not explain the data"
        return Certificate(Verdict.APPROXIMATE, reason, 0, _log10(mse))
    return Certificate(Verdict.FLOOR, "storage noise is all that is left", 0, _log10(mse))


@dataclass(frozen=True)
class _Space:
    """A recovered delta as `U diag(S) V^T`, float64.

    Attributes:
        U: `(out, r)`.
        S: Descending, `(r,)`.
        V: `(in, r)`.
    """

    U: Tensor
    S: Tensor
    V: Tensor

    @classmethod
    def of(cls, M_i: LowRank) -> "_Space":
        """Directions that rounding alone gave are dropped."""
        A, S_A, B = thin_svd(M_i.left.double())
        U, S, V = torch.linalg.svd((S_A[:, None] * B.mT) @ M_i.right.double().mT, full_matrices=False)
        kept = S.gt(ROUNDING * S[:1])
        return cls(A @ U[:, kept], S[kept], V.mT[:, kept])


def _excess(misfit: Misfit, traces: ErrorTraces, variances: Tensor) -> float:
    """By how much the noise's variance is larger than the rounding's: directions below the noise are in it."""
    expected = float((variances * traces.residual).sum())
    typical = float(variances.mean())
    return (misfit.energy + PRIOR * typical) / (expected + PRIOR * typical) if typical else 1.0


def _log10(value: float) -> float | None:
    return math.log10(value) if value > 0 else None
