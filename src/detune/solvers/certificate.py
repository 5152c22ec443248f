"""How far an answer can be trusted, without the truth.

Nothing here believes the solver: misfit and distance to the maximum-likelihood answer are measured on the data. What
must be assumed is said in `Certificate.reason`, and in the section on the certificate of `docs/method.md`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from detune.solvers.agreement import Solve, disagreement
from detune.solvers.base import Recovery
from detune.solvers.fine import fine_part
from detune.solvers.grid import name_of
from detune.solvers.identifiability import ErrorTraces, error_traces
from detune.solvers.misfit import Misfit
from detune.solvers.normal_operator import Core
from detune.solvers.nullspace import blurs, undetermined
from detune.solvers.principal import lacks_principal_part
from detune.solvers.rounding import StoredError, rounded_mse
from detune.solvers.space import Space
from detune.solvers.stack import Stack
from detune.solvers.structured import certify_structured
from detune.solvers.unseen import unseen_directions
from detune.solvers.verdict import Certificate, Verdict

__all__ = ["Certificate", "Verdict", "certify"]

# A misfit of more than this many times the storage noise's (root mean square) is not storage noise.
MOST_LEFT = 2.0
# Of more than this the computation is the cause, if it can be.
MOST_COMPUTED = 1.2
# Factors are computed to this many units of float64's precision.
COMPUTED = 32.0
# The noise that rounding must leave is known as well as if so many entries had been seen.
PRIOR = 30.0
# A direction shows from this multiple of the noise's largest singular value.
NOTICED = 2.0
# A spectrum whose weakest singular value found is so far above what shows has no more to come.
GAP = 3.0
# Shares of the predicted error that may come from what cannot be predicted.
MOST_HIDDEN = 0.5
MOST_DISTANT = 0.25
# Where rounding leaves less than this share of the error, its rare large values are what counts.
TAIL = 0.1
# Parts of the models disagree by so many times the predicted error (mean square) only if something is wrong.
MOST_DISAGREEMENT = 10.0
# Entries of deltas below this many times the noise's variance are rounded alike in all models.
ALIKE = 144.0
# In half precision an error is known to a factor of 1.6; if to no better than this once it is stored, it is not known.
STEEP = 2.8
# Intervals leave no less than this share of the error of least squares.
MOST_SAVED = 0.05
# With fewer directions the error scatters by more than a factor of two (two standard deviations of its logarithm).
FEW = 16.0
# On a base's grid the error must be within a factor of two of the prediction with this probability.
FORESEEABLE = 0.95
# Where least squares amplifies noise by more than this, the errors of the M_i are not independent.
CLOSE_SPACES = 1.12


def certify(
    stack: Stack, recovery: Recovery, stored: torch.dtype | None = None, check: Solve | None = None
) -> Certificate:
    """Judge an answer by the data it was made from.

    Args:
        stack: The models.
        recovery: What a solver made of them.
        stored: The dtype that the weight will be rounded to; its own by default.
        check: Recovers from a part of the models, to see whether the parts agree; None saves that time.

    Returns:
        The certificate.
    """
    structured = certify_structured(stack, recovery, stored, check, certify)
    if structured is not None:
        return structured
    if recovery.of_models:
        part, of_part = fine_part(stack, recovery)
        return certify(part, of_part, stored, check)
    if recovery.method == "unchanged":
        return Certificate(Verdict.EXACT, f"the base's own bits, if {recovery.reason.partition(':')[0]} by no accident")
    if recovery.bits is not None:
        return _of_bits(stack, recovery)
    if not recovery.deltas:
        return Certificate(Verdict.NOT_DETERMINED, "no model of the deltas: how far they are from zero is unknown")
    disagreed = None if check is None else disagreement(stack, check)
    return _of_fit(stack, recovery, stored or recovery.weight.dtype, disagreed)


def _of_bits(stack: Stack, recovery: Recovery) -> Certificate:
    """The base's grid decides what the ranks leave open."""
    bits = recovery.bits
    assert bits is not None
    name = name_of(bits.grid)
    chance = f"off that grid with a probability below 1e{math.ceil(bits.log10_false_positive)}"
    if bool(bits.certain.all()):
        return Certificate(Verdict.EXACT, f"every entry is certain on the base's {name} grid; {chance}", 0)
    if not bits.share:
        reason = f"the base lies on the {name} grid, {chance}; but no entry is certain"
        return Certificate(Verdict.APPROXIMATE, reason, 0, _log10(bits.expected_mse))
    reason = f"{100 * bits.share:.4g} % of the entries are certain on the base's {name} grid; {chance}"
    if bits.foreseeable < FORESEEABLE:
        reason += "; which of the others with long steps are wrong is chance, so the error is known to a factor"
        return Certificate(Verdict.APPROXIMATE, reason, 0, _log10(bits.expected_mse))
    amplified = _amplified(stack, recovery)
    if amplified > CLOSE_SPACES:
        why = (
            "but for the grid, nothing tells the weight from the adapters"
            if math.isinf(amplified)
            else f"the adapters' spaces are close to each other, which amplifies noise {amplified:.2g} times"
        )
        reason += f"; {why}: errors that many entries share do not show in each"
        return Certificate(Verdict.APPROXIMATE, reason, 0, _log10(bits.expected_mse))
    return Certificate(Verdict.FLOOR, reason, 0, _log10(bits.expected_mse))


def _amplified(stack: Stack, recovery: Recovery) -> float:
    """Root of the error of least squares over that of an average; infinite where it has no answer.

    So it is for one or two models, and where spaces coincide as far as their own errors let tell.
    """
    if stack.n < 3:
        return math.inf
    spaces = _spaces(stack, recovery)
    core = Core.of([space.U for space in spaces], [space.V for space in spaces])
    if undetermined(core, *blurs(stack, spaces)):
        return math.inf
    variances = stack.noise.square().to(core.Q.device)
    error = float((variances * error_traces(core).weight).sum()) / recovery.weight.numel()
    return math.sqrt(error * stack.n**2 / float(variances.sum()))


def _spaces(stack: Stack, recovery: Recovery) -> tuple[Space, ...]:
    """Of the deltas: half precision does not tell them better than to float32's rounding."""
    return tuple(Space.of(M_i, stack.factor_dtype) for M_i in recovery.deltas)


def _of_fit(stack: Stack, recovery: Recovery, stored: torch.dtype, disagreed: float | None) -> Certificate:
    """From the operator at the recovered spaces, the misfit and the storage noise."""
    spaces = _spaces(stack, recovery)
    core = Core.of([space.U for space in spaces], [space.V for space in spaces])
    null = undetermined(core, *blurs(stack, spaces))
    if null:
        reason = f"the data cannot see changes of the weight in a space of dimension {null}"
        return Certificate(Verdict.NOT_DETERMINED, reason, null)
    if lacks_principal_part(recovery):
        reason = (
            "the adapters are nearly the same, and the weight is empty where they are: a part of the base is in them"
        )
        return Certificate(Verdict.NOT_DETERMINED, reason)
    evidence = _Evidence.of(stack, recovery, core, spaces, stored)
    rounded = rounded_mse(
        recovery,
        core,
        [W_i.dtype for W_i in stack.matrices],
        stored,
        evidence.mse,
        min(evidence.mse, evidence.averaged),
    )
    mse = rounded.mse
    # Storing takes or adds the same share, whichever way the error was found.
    agreement = _log10(mse * disagreed / evidence.mse) if disagreed and evidence.mse else None
    doubt = evidence.doubt(rounded)
    if doubt is None and disagreed and disagreed > MOST_DISAGREEMENT * evidence.mse:
        times = (disagreed / evidence.mse) ** 0.5
        doubt = f"recoveries from parts of the models disagree {times:.2g} times as much as predicted"
    if doubt is not None:
        return Certificate(Verdict.APPROXIMATE, doubt, 0, _log10(mse), agreement)
    reason = (
        f"the only answer in which no part is common to all adapters; storage noise, {evidence.amplified:.2g} times "
        "that of an average, is all that is left"
    )
    return Certificate(Verdict.FLOOR, reason, 0, _log10(mse), agreement)


@dataclass(frozen=True)
class _Evidence:
    """What the data say of an answer with deltas.

    Attributes:
        spaces: Of the deltas.
        core: The operator at them.
        traces: How noise enters the answer.
        misfit: What it leaves, and how far it is from the best.
        variances: Of the models' storage noise, `(n,)`.
        excess: Variance found in the misfit over the storage noise's. Directions below the noise are in it.
        computed: Variance of the rounding errors of the computation.
        saved: What the answer's mean squared error is below that of least squares.
        rounded: Whether the weight is in the dtype it will be stored in.
        coarse: Whether some model is in half precision.
        entries: Of the matrix.
    """

    spaces: tuple[Space, ...]
    core: Core
    traces: ErrorTraces
    misfit: Misfit
    variances: Tensor
    excess: float
    computed: float
    saved: float
    rounded: bool
    coarse: bool
    entries: int

    @classmethod
    def of(
        cls, stack: Stack, recovery: Recovery, core: Core, spaces: tuple[Space, ...], stored: torch.dtype
    ) -> "_Evidence":
        """Gather it."""
        traces = error_traces(core)
        misfit = Misfit.of(stack, recovery, core, spaces)
        variances = stack.noise.square().to(core.Q.device)
        entries = recovery.weight.numel()
        energy = sum(float(space.S.square().sum()) for space in spaces) / (stack.n * entries)
        computed = (COMPUTED * torch.finfo(torch.float64).eps) ** 2 * energy
        return cls(
            spaces,
            core,
            traces,
            misfit,
            variances,
            _excess(misfit, traces, variances),
            computed,
            recovery.saved_mse,
            torch.finfo(recovery.weight.dtype).eps >= torch.finfo(stored).eps,
            any(W_i.dtype.itemsize <= 2 for W_i in stack.matrices),
            entries,
        )

    @property
    def averaged(self) -> float:
        """Mean squared error of the mean of n rounding errors: the least that least squares can do."""
        return self.excess * float(self.variances.sum()) / len(self.variances) ** 2

    @property
    def noise(self) -> float:
        """Mean squared error that the noise leaves at the most likely answer."""
        least_squares = self.excess * float((self.variances * self.traces.weight).sum()) / self.entries
        return max(least_squares - self.saved, least_squares * MOST_SAVED)

    @property
    def distance(self) -> float:
        """Mean square of the step to that answer.

        A weight that was rounded as coarsely as it will be stored may already be the base's own: then the step is as
        long as the noise.
        """
        if self.saved:
            # Least squares is not the aim.
            return 0.0
        distance = self.misfit.distance / self.entries
        return max(0.0, distance - self.noise) if self.rounded else distance

    @property
    def mse(self) -> float:
        """Mean squared error to expect of the weight."""
        return self.noise + self.distance

    @property
    def amplified(self) -> float:
        """Root of the error over the least that there can be."""
        return math.sqrt(self.noise / self.averaged) if self.averaged else 1.0

    def doubt(self, rounded: StoredError) -> str | None:
        """Why the prediction, of the weight as it will be stored, may be wrong; None where there is no reason."""
        mse = rounded.mse
        if _excess(self.misfit, self.traces, self.variances + self.computed) <= MOST_LEFT**2:
            if self.excess > MOST_COMPUTED**2 and self.computed > MOST_DISTANT * float(self.variances.mean()):
                return "the rounding of the computation, not of the models, is what limits the answer"
        elif self.excess > MOST_LEFT**2:
            left = f"{self.excess**0.5:.2g} times the storage noise is left"
            return f"{left}: adapters of these ranks do not explain the data"
        hidden = self.hidden
        if hidden > MOST_HIDDEN * mse:
            return (
                "directions as strong as the weakest found would not show where the adapters' spaces are close to each "
                f"other: W-Error up to {math.log10(mse + hidden):.2f} if there are any"
            )
        if self.distance > MOST_DISTANT * self.noise:
            return "the solver stopped short of the most likely answer"
        if mse < TAIL * self.mse and self._runs_into_noise:
            return (
                "rounding brings most entries to the base's own numbers; how many it does not, depends on directions "
                "that do not show"
            )
        # Intervals may have saved more than is known; directions that do not show cost as much.
        if (self.coarse or self._runs_into_noise) and mse > STEEP * rounded.if_less:
            return "rounding brings many entries to the base's own numbers; how many, cannot be predicted that closely"
        if self.rounded and self._weakest_delta < ALIKE * float(self.variances.mean()):
            return "deltas hardly exceed a unit in the last place: the models round alike, and that cannot be simulated"
        if not self.traces.solved:
            return "the equations are too ill-conditioned to tell how the noise enters"
        if self.traces.directions < FEW:
            few = round(self.traces.directions)
            return f"the error lies in some {few} directions: its size is known to a factor only"
        return None

    @property
    def _noticed(self) -> float:
        """Singular value from which a direction shows."""
        noise = math.sqrt(self.excess * float(self.variances.mean()))
        return NOTICED * noise * (math.sqrt(self.core.Q.shape[0]) + math.sqrt(self.core.P.shape[0]))

    @property
    def _weakest_delta(self) -> float:
        """Mean square of the weakest delta's entries, of those that there are."""
        return min((float(space.S.square().sum()) / self.entries for space in self.spaces if len(space.S)), default=0.0)

    @property
    def _runs_into_noise(self) -> bool:
        """Whether some spectrum may go on below what shows."""
        return any(not len(space.S) or float(space.S[-1]) < GAP * self._noticed for space in self.spaces)

    @property
    def hidden(self) -> float:
        """Mean squared error from directions below the noise that could have escaped, if the adapters have such.

        Spectra go on as they were: one that ends well above what shows has ended. Of a model without any direction
        nothing is known; one could be as strong as the strongest of the others.
        """
        strongest = max((float(space.S[0]) for space in self.spaces if len(space.S)), default=0.0)
        weakest = [float(space.S[-1]) if len(space.S) else strongest for space in self.spaces]
        least = [each / GAP if len(space.S) else 0.0 for each, space in zip(weakest, self.spaces, strict=True)]
        by_side = [0.0, 0.0]
        for unseen in unseen_directions(self.core, self._noticed, least):
            i, strengths = unseen.model, unseen.strengths
            possible = strengths[strengths > least[i]] if least[i] else strengths[:1]
            reach = possible.clamp(max=weakest[i]) * unseen.moves[: len(possible)]
            by_side[unseen.columns] += float(reach.square().sum()) / self.entries
        return max(by_side)


def _excess(misfit: Misfit, traces: ErrorTraces, variances: Tensor) -> float:
    """The variance found in the misfit over the one expected."""
    prior = PRIOR * float(variances.mean())
    expected = float((variances * traces.residual).sum())
    return (misfit.energy + prior) / (expected + prior) if prior else 1.0


def _log10(value: float) -> float | None:
    return math.log10(value) if value > 0 else None
