"""The error to expect of a least-squares answer: the point prediction, what says how good that is, and its doubts."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from detune.certificate.calibration import Assessment, log_ratio
from detune.certificate.misfit import Misfit
from detune.certificate.stored_error import StoredError, quantised_error, stored_error
from detune.fitting.normal_operator import NormalOperator
from detune.identifiability.error_traces import ErrorTraces, error_traces
from detune.identifiability.undetected import UndetectedDirections, undetected_directions
from detune.lattice import is_coarse
from detune.problem.low_rank import LowRank, SVDFactors
from detune.problem.recovery import Recovery
from detune.problem.stack import Stack
from detune.problem.storage_noise import COMPUTED, EXCESS_VARIANCE, FLOOR_RATIO

# A part is most of a whole from a half on, and a share of it that counts from a quarter on (definitions of doubts).
MOST, MUCH = 0.5, 0.25
# The noise that rounding must leave is known as well as if 30 entries had been seen: it decides where residuals have
# few degrees of freedom, and nowhere else (derived).
PRIOR = 30.0
# A direction shows from twice the noise's largest singular value (measured, see `problem.storage_noise`).
NOTICED = FLOOR_RATIO
# A spectrum that ends three times above the detection limit has no more to come (definition of a doubt).
GAP = 3.0
# Intervals leave no less than a twentieth of the error of least squares: 2 n / ((n + 1) (n + 2)) is 0.1 for the fifteen
# models that anybody has, and steps may differ (derived, see `docs/method.md`).
MOST_SAVED = 0.05
# A step is the square root of twelve times the noise that rounding to it makes: a delta below it is rounded alike in
# all models in most entries (derived). One of twelve times the noise is so in some, which counts in float64, where it
# cannot be simulated (definition of a doubt).
STEP = 12.0**0.5
ALIKE = 12.0
# In fewer than sixteen directions a sum of squares scatters by a factor of two: two standard deviations of chi-square's
# logarithm (derived).
FEW = 16.0
# Storing is steep where it makes twenty times as much of a hundredth of an error: ranges are then of orders
# (definition of a doubt).
STEEP = 2.0
# Parts of the models disagree by ten times the predicted error (mean square) only if something is wrong: two halves
# alone have twice its variance (definition of a doubt).
DISAGREEING = 10.0


@dataclass(frozen=True)
class ErrorModel:
    """The evidence of the data on an answer with deltas.

    Attributes:
        stack: The models.
        recovery: The answer.
        spaces: Spaces of the deltas.
        operator: The operator at them.
        traces: How noise enters the answer.
        misfit: What it leaves, and how far it is from the best.
        variances: Variances of the models' storage noise, `(n,)`.
        stored: The dtype that the weight will be stored in.
    """

    stack: Stack
    recovery: Recovery
    spaces: tuple[SVDFactors, ...]
    operator: NormalOperator
    traces: ErrorTraces
    misfit: Misfit
    variances: Tensor
    stored: torch.dtype

    @classmethod
    def of(
        cls,
        stack: Stack,
        recovery: Recovery,
        operator: NormalOperator,
        spaces: tuple[SVDFactors, ...],
        stored: torch.dtype,
    ) -> "ErrorModel":
        """Measure misfit and traces."""
        misfit = Misfit.of(stack, recovery, operator, spaces)
        variances = stack.noise.square().to(operator.Q.device)
        return cls(stack, recovery, spaces, operator, error_traces(operator), misfit, variances, stored)

    def assessment(self, disagreed: float = 0.0) -> Assessment:
        """The predicted error of the weight once stored, with what says how good that is.

        Args:
            disagreed: Mean squared error by the disagreement of parts of the models, before storing.
        """
        after = self._once_stored
        doubts = tuple(why for holds, why in self._doubts(after, disagreed) if holds)
        at_floor = self.excess <= FLOOR_RATIO**2 and self.distance <= MUCH * self.noise
        reason = (
            f"the only answer in which no part is common to all adapters; storage noise, {self.amplified:.2g} times "
            "that of an average, is all that is left"
        )
        # What storing undoes altogether is as good as one entry in the last place.
        least = float(self.stack.noise.square().mean()) / self.entries
        return Assessment(
            self._basis(after, at_floor, len(doubts)),
            after.mse or least,
            self._covariates(after),
            doubts,
            at_floor,
            reason,
            # Storing takes or adds the same share, whichever way the error was found.
            after.mse * disagreed / self.mse if self.mse else 0.0,
        )

    @cached_property
    def entries(self) -> int:
        """The number of entries of the matrix."""
        return self.recovery.weight.numel()

    @cached_property
    def excess(self) -> float:
        """Variance found in the misfit over the storage noise's. Directions below the noise are in it."""
        return self._excess_over(self.variances)

    @cached_property
    def averaged(self) -> float:
        """Mean squared error of the mean of n rounding errors: the least that least squares can do."""
        return self.excess * float(self.variances.sum()) / self.stack.n**2

    @cached_property
    def noise(self) -> float:
        """Mean squared error that the noise leaves at the most likely answer."""
        least_squares = self.excess * float((self.variances * self.traces.weight).sum()) / self.entries
        return max(least_squares - float(self.recovery.mse_reduction), least_squares * MOST_SAVED) + self.alike

    @cached_property
    def alike(self) -> float:
        """Mean square of what quantisation has rounded off all models alike, which no residual shows."""
        return max(0.0, 1 - self.excess) * float(self.variances.mean()) if self.stack.noise_override else 0.0

    @cached_property
    def distance(self) -> float:
        """Mean square of the step to that answer.

        A weight that was rounded as coarsely as it will be stored may already be the base's own: then the step is as
        long as the noise.
        """
        if self.recovery.mse_reduction:
            # Least squares is not the aim.
            return 0.0
        distance = self.misfit.distance / self.entries
        return max(0.0, distance - self.noise) if self._is_rounded else distance

    @property
    def mse(self) -> float:
        """Mean squared error to expect of the weight before it is stored."""
        return self.noise + self.distance

    @property
    def amplified(self) -> float:
        """Root of the error over the least that there can be."""
        return math.sqrt(self.noise / self.averaged) if self.averaged else 1.0

    @cached_property
    def hidden(self) -> float:
        """Mean squared error from directions below the noise that could have escaped, if the adapters have such.

        Spectra go on as they were: one that ends well above the limit has ended. Of a model without any direction
        nothing is known; one could be as strong as the strongest of the others.
        """
        return max(self._hidden_by_side(GAP))

    @cached_property
    def could_hide(self) -> float:
        """Mean squared error from such directions, if spectra that run into the noise may go on by any step."""
        return max(self.hidden, sum(self._hidden_by_side(math.inf)) if self._runs_into_noise else 0.0)

    @cached_property
    def weakest_direction(self) -> float:
        """The weakest singular value of any delta over the detection limit."""
        return min((float(space.S[-1]) / self._noticed if len(space.S) else 0.0 for space in self.spaces), default=0.0)

    @cached_property
    def weakest_delta(self) -> float:
        """Root mean square of the weakest delta's entries over that of rounding; of those deltas that there are."""
        energies = [float(space.S.square().sum()) for space in self.spaces if len(space.S)]
        return math.sqrt(min(energies, default=0.0) / self.entries / float(self.variances.mean()))

    @cached_property
    def _once_stored(self) -> StoredError:
        if self.stack.noise_override:
            return quantised_error(self.recovery, self.stored, self.mse)
        dtypes = [W_i.dtype for W_i in self.stack.matrices]
        # An excess of noise is something else than rounding to the models' dtypes.
        averaged = min(self.mse, self.averaged / max(1.0, self.excess))
        return stored_error(self.recovery, self.operator, dtypes, self.stored, self.mse, averaged)

    def _basis(self, after: StoredError, at_floor: bool, doubts: int) -> str:
        """The bin of the calibration: by the gravest of the doubts."""
        if self.recovery.mse_reduction and len(set(self.stack.rounded_dtypes)) > 1:
            # Finely stored models confine the error, by how much least squares does not know.
            return "least squares, intervals of mixed dtypes"
        if self._is_coarse:
            return "least squares, deltas below a step"
        if not at_floor or doubts > self._is_steep(after):
            return "least squares, in doubt"
        if not doubts:
            return "least squares"
        # Rounding to the dtype of the computation is not simulated by doing it.
        double = self.stored == torch.float64
        return "least squares, steep storing of float64" if double else "least squares, steep storing"

    @cached_property
    def _is_coarse(self) -> bool:
        """Whether rounding to the models' dtypes hides the deltas in many entries, which all models then round alike.

        That leaves less in the misfit than independent rounding errors would.
        """
        alike = self.weakest_delta < STEP or self.excess < 1 / EXCESS_VARIANCE
        return not self.stack.noise_override and (alike or is_coarse(self.stack))

    def _is_steep(self, after: StoredError) -> bool:
        """Whether storing makes orders of magnitude of what the error before it is not known by."""
        return not self.stack.noise_override and after.slope > STEEP

    def _covariates(self, after: StoredError) -> dict[str, float]:
        """The figures that say how good the prediction is; ratios as log10."""
        finest = min(torch.finfo(W_i.dtype).eps for W_i in self.stack.matrices)
        return {
            "amplification": log_ratio(self.amplified),
            "directions of the error": log_ratio(self.traces.directions),
            "excess of noise": log_ratio(self.excess),
            "distance from the best": log_ratio(1 + self.distance / self.noise) if self.noise else 0.0,
            "weakest direction": log_ratio(self.weakest_direction),
            "weakest delta": log_ratio(self.weakest_delta),
            "could hide": log_ratio(1 + self.could_hide / self.mse) if self.mse else 0.0,
            "slope of storing": min(after.slope, 100.0),
            "bits of the models": -math.log2(finest),
        }

    def _doubts(self, after: StoredError, disagreed: float) -> tuple[tuple[bool, str], ...]:
        """Each reason for which the prediction may be wrong, with whether it holds."""
        few, runs_on, noise = round(self.traces.directions), self._runs_into_noise, float(self.variances.mean())
        computed = COMPUTED**2 * self._energy
        explained = self._excess_over(self.variances + computed) <= FLOOR_RATIO**2
        unexplained = not explained and self.excess > FLOOR_RATIO**2
        told = bool(self.stack.noise_override)
        times = math.sqrt(disagreed / self.mse) if self.mse else math.inf
        return (
            (
                self._is_coarse,
                "deltas are below a step of the models' rounding, which then leaves many entries as they were",
            ),
            (
                told and (self.weakest_delta < STEP or self.alike > MOST * self.noise),
                "deltas are small beside the levels of quantisation: the models were rounded alike",
            ),
            (
                explained and self.excess > EXCESS_VARIANCE and computed > MUCH * noise,
                "the rounding of the computation, not of the models, is what limits the answer",
            ),
            (
                unexplained,
                f"{self.excess**0.5:.2g} times the storage noise is left: adapters of these ranks do not explain the "
                "data",
            ),
            (
                self.hidden > MOST * after.mse,
                "directions as strong as the weakest found would not show where the adapters' spaces are close to each "
                "other",
            ),
            (self.distance > MUCH * self.noise, "the solver stopped short of the most likely answer"),
            (
                self._is_steep(after),
                "rounding brings many entries to the base's own numbers; how many, cannot be predicted closely",
            ),
            (
                self._is_rounded and STEP <= self.weakest_delta < ALIKE,
                "deltas hardly exceed a unit in the last place: the models round alike, and that cannot be simulated",
            ),
            (
                self.excess > EXCESS_VARIANCE and runs_on and not unexplained,
                "more is left than storage noise: directions of the adapters that were not found may be in it",
            ),
            (
                self.traces.directions < FEW,
                f"the error lies in some {few} directions: its size is known to a factor only",
            ),
            (
                disagreed > DISAGREEING * self.mse,
                f"recoveries from parts of the models disagree {times:.2g} times as much as predicted",
            ),
        )

    def _excess_over(self, variances: Tensor) -> float:
        """The variance found in the misfit over the one expected."""
        prior = PRIOR * float(variances.mean())
        expected = float((variances * self.traces.residual).sum())
        return (self.misfit.energy + prior) / (expected + prior) if prior else 1.0

    @property
    def _energy(self) -> float:
        """Mean square of the deltas' entries."""
        return sum(float(space.S.square().sum()) for space in self.spaces) / (self.stack.n * self.entries)

    @property
    def _is_rounded(self) -> bool:
        """Whether the weight is in the dtype that it will be stored in."""
        return torch.finfo(self.recovery.weight.dtype).eps >= torch.finfo(self.stored).eps

    @property
    def _noticed(self) -> float:
        """Singular value from which a direction shows."""
        noise = math.sqrt(self.excess * float(self.variances.mean()))
        return NOTICED * noise * (math.sqrt(self.operator.Q.shape[0]) + math.sqrt(self.operator.P.shape[0]))

    @property
    def _runs_into_noise(self) -> bool:
        """Whether some spectrum may go on below the detection limit."""
        return self.weakest_direction < GAP

    def _hidden_by_side(self, gap: float) -> list[float]:
        """The mean square of directions of rows and of columns that are weaker than those found, up to a factor."""
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
        """The directions that could have escaped: few, and quick, where no spectrum runs into the noise."""
        least = None if self._runs_into_noise else [each / GAP for each in self._weakest]
        return undetected_directions(self.operator, self._noticed, least)


def moved_mse(recovery: Recovery) -> float:
    """Mean square per entry of the mean of an answer's deltas: how far it is from the mean of the models."""
    deltas = recovery.deltas
    total = LowRank(torch.cat([M_i.left for M_i in deltas], dim=1), torch.cat([M_i.right for M_i in deltas], dim=1))
    return total.energy / len(deltas) ** 2 / recovery.weight.numel()
