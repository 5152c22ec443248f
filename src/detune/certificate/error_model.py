"""What the data say of an answer with deltas: the error to expect, what speaks against that, and between what it is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import torch
from torch import Tensor

from detune.certificate.misfit import Misfit
from detune.certificate.stored_error import StoredError
from detune.fitting.normal_operator import NormalOperator
from detune.identifiability.error_traces import ErrorTraces, error_traces
from detune.identifiability.undetected import UndetectedDirections, undetected_directions
from detune.problem.low_rank import LowRank, SVDFactors
from detune.problem.recovery import PredictedError, Recovery
from detune.problem.stack import Stack

# Of an error of which more than half is what all models have in common, only the size of that is known: any number does
# that is well above what finite matrices scatter by.
MOST_ALIKE = 0.5
# A misfit of more than this many times the storage noise's (root mean square) is not storage noise.
MOST_LEFT = 2.0
# A variance of the misfit that is so many times that of the storage noise, which is seen to a few per cent of it, has
# directions in it that were not found, where spectra run into the noise; elsewhere a merge that was rounded on its way.
MOST_EXCESS = 1.2
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
# Entries of deltas below this many times the noise's variance are rounded alike in all models.
ALIKE = 144.0
# In half precision an error is known to a factor of 1.6; if to no better than this once it is stored, it is not known.
STEEP = 2.8
# Rounding intervals of half precision bound what least squares takes for noise, and save this much more of the error
# than is accounted for: the median of random problems (seeds as below); not where it is amplified more than so.
FINER, AMPLIFIED = 0.8, 3.0
# Intervals leave no less than this share of the error of least squares.
MOST_SAVED = 0.05
# With fewer directions the error scatters by more than a factor of two (two standard deviations of its logarithm).
FEW = 16.0
# Of an error that lies in few directions the range leaves out one case in forty at either end.
LIKELY = 0.975
# Cube root of a hundredth.
LEAST_ROOT = 0.215
# What an error before storing was, over the one to expect and all that may hide, in random problems: those of
# `benchmarks/certificate.py` with seeds from 6000 to 6199, and those outside of earlier ranges, of seeds up to 9199.
LESS, MORE = 0.7, 1.6
# Where spectra run into the noise, there is rather more than shows.
MORE_RUNNING_ON = 4.0
# If the deltas are wrong altogether, the answer is off by what they moved it from the mean of the models; in these
# problems by no more than this times as much (mean square), however much seemed to hide.
WRONG = 2.0


@dataclass(frozen=True)
class ErrorModel:
    """What the data say of an answer with deltas.

    Attributes:
        spaces: Of the deltas.
        operator: The operator at them.
        traces: How noise enters the answer.
        misfit: What it leaves, and how far it is from the best.
        variances: Of the models' storage noise, `(n,)`.
        excess: Variance found in the misfit over the storage noise's. Directions below the noise are in it.
        computed: Variance of the rounding errors of the computation.
        saved: What the answer's mean squared error is below that of least squares.
        moved: Mean square of the mean of the deltas: how far the answer is from the mean of the models.
        rounded: Whether the weight is in the dtype it will be stored in.
        coarse: Whether some model is in half precision.
        entries: Of the matrix.
    """

    spaces: tuple[SVDFactors, ...]
    operator: NormalOperator
    traces: ErrorTraces
    misfit: Misfit
    variances: Tensor
    excess: float
    computed: float
    saved: float
    moved: float
    rounded: bool
    coarse: bool
    entries: int
    told: bool

    @classmethod
    def of(
        cls,
        stack: Stack,
        recovery: Recovery,
        operator: NormalOperator,
        spaces: tuple[SVDFactors, ...],
        stored: torch.dtype,
    ) -> "ErrorModel":
        """Gather it."""
        traces = error_traces(operator)
        misfit = Misfit.of(stack, recovery, operator, spaces)
        variances = stack.noise.square().to(operator.Q.device)
        entries = recovery.weight.numel()
        energy = sum(float(space.S.square().sum()) for space in spaces) / (stack.n * entries)
        computed = (COMPUTED * torch.finfo(torch.float64).eps) ** 2 * energy
        return cls(
            spaces,
            operator,
            traces,
            misfit,
            variances,
            _excess(misfit, traces, variances),
            computed,
            recovery.mse_reduction,
            _moved_mse(operator, spaces, entries),
            torch.finfo(recovery.weight.dtype).eps >= torch.finfo(stored).eps,
            any(W_i.dtype.itemsize <= 2 for W_i in stack.matrices),
            entries,
            bool(stack.noise_override),
        )

    @property
    def averaged(self) -> float:
        """Mean squared error of the mean of n rounding errors: the least that least squares can do."""
        return self.excess * float(self.variances.sum()) / len(self.variances) ** 2

    @property
    def rounding(self) -> float:
        """The part of it that is rounding to the models' dtypes: an excess of noise, or one told, is something else."""
        return 0.0 if self.told else self.averaged / max(1.0, self.excess)

    @property
    def noise(self) -> float:
        """Mean squared error that the noise leaves at the most likely answer."""
        least_squares = self.excess * float((self.variances * self.traces.weight).sum()) / self.entries
        return max(least_squares - self.saved, least_squares * MOST_SAVED) + self.alike

    @property
    def alike(self) -> float:
        """Mean square of what quantisation has rounded off all models alike, which no residual shows."""
        return max(0.0, 1 - self.excess) * float(self.variances.mean()) if self.told else 0.0

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
        mse = self.noise + self.distance
        # Least squares alone has saved nothing.
        finer = self.saved and not self._runs_into_noise and self.amplified < AMPLIFIED
        return mse * FINER if finer else mse

    @property
    def amplified(self) -> float:
        """Root of the error over the least that there can be."""
        return math.sqrt(self.noise / self.averaged) if self.averaged else 1.0

    @property
    def expected(self) -> PredictedError:
        """The error of the weight before it is stored, and between what it is."""
        mse, directions, runs_on = self.mse, self.traces.directions, self._runs_into_noise
        most = (mse + self.could_hide) * (MORE_RUNNING_ON if runs_on else MORE)
        most *= max(1.0, _at_quantile(LIKELY, directions))
        wrong = WRONG * (self.moved + mse)
        # A weight in the dtype that it will be stored in was rounded while it was computed, too: no less is left.
        sure = min(mse, self.rounding) if self.rounded else 0.0
        least = sure + (mse - sure) * LESS * _at_quantile(1 - LIKELY, directions)
        if self.excess > MOST_LEFT**2:
            # What is left may be in the deltas alone.
            least = min(least, self.noise / self.excess)
        return PredictedError(mse, least, min(most, wrong) if self.traces.solved else wrong)

    def doubts(self, rounded: StoredError) -> list[str]:
        """All reasons for which the prediction may be wrong; none where nothing speaks against it.

        Args:
            rounded: The error of the weight as it will be stored.
        """
        mse, noise = rounded.mse, float(self.variances.mean())
        few, runs_on = round(self.traces.directions), self._runs_into_noise
        computed = _excess(self.misfit, self.traces, self.variances + self.computed) <= MOST_LEFT**2
        unexplained = not computed and self.excess > MOST_LEFT**2
        mostly_undone = mse < TAIL * self.mse and runs_on
        table = (
            (
                self.alike > MOST_ALIKE * self.noise,
                "deltas are small beside the levels of quantisation: the models were rounded alike",
            ),
            (
                computed and self.excess > MOST_COMPUTED**2 and self.computed > MOST_DISTANT * noise,
                "the rounding of the computation, not of the models, is what limits the answer",
            ),
            (
                unexplained,
                f"{self.excess**0.5:.2g} times the storage noise is left: adapters of these ranks do not explain the "
                "data",
            ),
            (
                self.hidden > MOST_HIDDEN * mse,
                "directions as strong as the weakest found would not show where the adapters' spaces are close to each "
                "other",
            ),
            (self.distance > MOST_DISTANT * self.noise, "the solver stopped short of the most likely answer"),
            (
                mostly_undone,
                "rounding brings most entries to the base's own numbers; how many it does not, depends on directions "
                "that do not show",
            ),
            (
                # Intervals may have saved more than is known; directions that do not show cost as much.
                not mostly_undone and (self.coarse or runs_on) and mse > STEEP * rounded.if_less,
                "rounding brings many entries to the base's own numbers; how many, cannot be predicted that closely",
            ),
            (
                self.rounded and self._weakest_delta < ALIKE * noise,
                "deltas hardly exceed a unit in the last place: the models round alike, and that cannot be simulated",
            ),
            (
                self.excess > MOST_EXCESS and runs_on and not unexplained,
                "more is left than storage noise: directions of the adapters that were not found may be in it",
            ),
            (not self.traces.solved, "the equations are too ill-conditioned to tell how the noise enters"),
            (
                self.traces.directions < FEW,
                f"the error lies in some {few} directions: its size is known to a factor only",
            ),
        )
        return [why for holds, why in table if holds]

    @property
    def _noticed(self) -> float:
        """Singular value from which a direction shows."""
        noise = math.sqrt(self.excess * float(self.variances.mean()))
        return NOTICED * noise * (math.sqrt(self.operator.Q.shape[0]) + math.sqrt(self.operator.P.shape[0]))

    @property
    def _weakest_delta(self) -> float:
        """Mean square of the weakest delta's entries, of those that there are."""
        return min((float(space.S.square().sum()) / self.entries for space in self.spaces if len(space.S)), default=0.0)

    @property
    def _runs_into_noise(self) -> bool:
        """Whether some spectrum may go on below what shows."""
        return any(not len(space.S) or float(space.S[-1]) < GAP * self._noticed for space in self.spaces)

    @cached_property
    def hidden(self) -> float:
        """Mean squared error from directions below the noise that could have escaped, if the adapters have such.

        Spectra go on as they were: one that ends well above what shows has ended. Of a model without any direction
        nothing is known; one could be as strong as the strongest of the others.
        """
        return max(self._hidden_by_side(GAP))

    @property
    def could_hide(self) -> float:
        """The same, if spectra that run into the noise may go on by any step: each with one direction more."""
        return max(self.hidden, sum(self._hidden_by_side(math.inf)) if self._runs_into_noise else 0.0)

    def _hidden_by_side(self, gap: float) -> list[float]:
        """From directions of the rows and of the columns that are less than so many times weaker than those found."""
        by_side = [0.0, 0.0]
        for undetected in self._undetected:
            i, strengths = undetected.model, undetected.strengths
            least = self._weakest[i] / gap if len(self.spaces[i].S) else 0.0
            possible = strengths[strengths > least] if least else strengths[:1]
            reach = possible.clamp(max=self._weakest[i]) * undetected.moves[: len(possible)]
            by_side[undetected.columns] += float(reach.square().sum()) / self.entries
        return by_side

    @cached_property
    def _weakest(self) -> list[float]:
        """The weakest singular value of each model; of one that has none, the strongest of the others."""
        strongest = max((float(space.S[0]) for space in self.spaces if len(space.S)), default=0.0)
        return [float(space.S[-1]) if len(space.S) else strongest for space in self.spaces]

    @cached_property
    def _undetected(self) -> tuple[UndetectedDirections, ...]:
        """What could have escaped; where no spectrum runs into the noise, only what is asked for, which is quick."""
        least = None if self._runs_into_noise else [each / GAP for each in self._weakest]
        return undetected_directions(self.operator, self._noticed, least)


def moved_mse(recovery: Recovery) -> float:
    """Mean square per entry of the mean of an answer's deltas: how far it is from the mean of the models."""
    deltas = recovery.deltas
    total = LowRank(torch.cat([M_i.left for M_i in deltas], dim=1), torch.cat([M_i.right for M_i in deltas], dim=1))
    return total.energy / len(deltas) ** 2 / recovery.weight.numel()


def _moved_mse(operator: NormalOperator, spaces: Sequence[SVDFactors], entries: int) -> float:
    """The same, of deltas in the coordinates of the core."""
    total = sum((a_i * space.S) @ b_i.mT for a_i, b_i, space in zip(operator.a, operator.b, spaces, strict=True))
    return float(torch.as_tensor(total).square().sum()) / len(spaces) ** 2 / entries


def _excess(misfit: Misfit, traces: ErrorTraces, variances: Tensor) -> float:
    """The variance found in the misfit over the one expected."""
    prior = PRIOR * float(variances.mean())
    expected = float((variances * traces.residual).sum())
    return (misfit.energy + prior) / (expected + prior) if prior else 1.0


def _at_quantile(quantile: float, directions: float) -> float:
    """An error in so many directions, over its mean: the quantile of chi-square.

    By the cube of a normal number (Wilson & Hilferty 1931, doi 10.1073/pnas.17.12.684). Of one or two directions that
    falls below zero; a hundredth is as good.
    """
    spread = 2 / (9 * directions)
    return max(1 - spread + NormalDist().inv_cdf(quantile) * math.sqrt(spread), LEAST_ROOT) ** 3
