"""Verdict and certificate of an answer."""

import math
from dataclasses import dataclass, replace
from enum import Enum, StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # It brings torch along, which reports do without.
    from detune.problem.recovery import PredictedError

# No range is narrower than a factor of two to either side: "to the storage floor" promises no more, and a base that is
# unlike those of the corpus costs less than that (definition of the verdict).
BAND = 0.3
# What raises the upper end of a range by less is no doubt: a sixth of the band (definition of a doubt).
LITTLE = 0.05


class Trust(Enum):
    """How far code goes along with a verdict, whatever it is called."""

    BITS = "bits"
    """The base's own."""
    FLOOR = "floor"
    """An error that storage made, and that can be predicted."""
    RANGE = "range"
    """An error that is known to a range."""
    NONE = "none"
    """No model of the error."""


class Verdict(StrEnum):
    """How far a tensor can be trusted; what there was nothing to solve for is shared or averaged."""

    SHARED = "shared"
    """Identical in all models: copied byte for byte."""
    EXACT = "exact"
    """The base's own bits."""
    FLOOR = "to the storage floor"
    """As close as the rounding of the models lets any method come; the predicted W-Error says how close."""
    APPROXIMATE = "approximate"
    """The prediction is known to a range only, mostly because it may be too good: the reason says why."""
    AVERAGED = "averaged"
    """The mean of the models: the method asked for, or a vector, which has no low rank to use."""
    NOT_DETERMINED = "not determined"
    """The data do not hold the answer, or part of it; where no method applies the mean of the models stands in."""

    @property
    def trust(self) -> Trust:
        """How far code goes along with it."""
        return _ABOUT[self].trust

    @property
    def is_close(self) -> bool:
        """Whether the tensor is the base's but for what storage rounds off."""
        return self.trust in (Trust.BITS, Trust.FLOOR)

    @property
    def summary(self) -> str:
        """A few words for the terminal, after "3 tensors"."""
        return _ABOUT[self].summary

    @property
    def meaning(self) -> str:
        """Sentences for the card."""
        return _ABOUT[self].meaning


@dataclass(frozen=True)
class _About:
    """See the properties of `Verdict`."""

    trust: Trust
    summary: str
    meaning: str


_ABOUT = {
    Verdict.SHARED: _About(
        Trust.BITS,
        "identical in all models, copied",
        "No model changed it: the same bytes in all, copied. Taken for the base's.",
    ),
    Verdict.EXACT: _About(Trust.BITS, "exact: the base's bits", "The base's own bits."),
    Verdict.FLOOR: _About(
        Trust.FLOOR,
        "to the storage floor",
        "The answer is unique, and storage rounding of the models is all that is left: the W-Error is a prediction, "
        "good to 0.3.",
    ),
    Verdict.APPROXIMATE: _About(
        Trust.RANGE,
        "approximate: the error is known to a range only",
        "The error is known to a range only; the reason is below.",
    ),
    Verdict.AVERAGED: _About(
        Trust.NONE,
        "averaged",
        "The mean of the models, with the mean of their deltas in it: a vector has no low rank to use.",
    ),
    Verdict.NOT_DETERMINED: _About(
        Trust.NONE,
        "not determined by these models",
        "The models do not hold the answer, or a part of it; what stands there is no recovery.",
    ),
}


@dataclass(frozen=True)
class Certificate:
    """The error of an answer, as far as the data tell it.

    Attributes:
        verdict: How far it can be trusted.
        reason: In one sentence.
        undetermined: Dimension of the space of changes of W that the data cannot see; 0 is unique. None where the
            method has no model of the deltas.
        predicted_w_error: `log10` of the mean squared error per entry to expect of the weight once it is stored; None
            where there is none (exact) or no telling (not determined).
        best_w_error: Lower end of the range that the W-Error is in; None, beside an upper end, where the weight may be
            exact.
        worst_w_error: Upper end. The range holds the truth in 95 % of problems: see "The certificate" in
            `docs/method.md`.
        agreement: The same figure from the disagreement of recoveries from parts of the models; None where they were
            not made.
        certain: Whether the entries that the solver calls certain (`DecodedBits.certain`) are to be taken for it.
    """

    verdict: Verdict
    reason: str
    undetermined: int | None = None
    predicted_w_error: float | None = None
    best_w_error: float | None = None
    worst_w_error: float | None = None
    agreement: float | None = None
    certain: bool = True

    @classmethod
    def of_error(
        cls, verdict: Verdict, reason: str, expected: "PredictedError | float", agreement: float = 0.0
    ) -> "Certificate":
        """Certify an answer that is the only one and whose error can be predicted.

        Args:
            verdict: What it is worth.
            reason: Why.
            expected: Mean squared error of the stored weight; a number where it is known as closely as any.
            agreement: Mean squared error by the disagreement of parts; 0 where that was not looked at.
        """
        least, mse, most = (
            (expected,) * 3 if isinstance(expected, float | int) else (expected.least, expected.mse, expected.most)
        )
        best, predicted, worst = map(_log10, (least, mse, most))
        if predicted is not None:
            best = None if best is None else min(best, predicted - BAND)
            worst = max(predicted if worst is None else worst, predicted + BAND)
        return cls(verdict, reason, 0, predicted, best, worst, _log10(agreement))

    def rounded(self, dtype: str, mse: float) -> "Certificate":
        """The certificate once the weight, which was judged as it is, was rounded to a dtype.

        Args:
            dtype: Its name.
            mse: Mean squared error that this makes; 0 where the dtype holds every entry.
        """
        if not mse or self.verdict not in (Verdict.EXACT, Verdict.FLOOR, Verdict.APPROXIMATE):
            return self
        ends = (self.best_w_error, self.predicted_w_error, self.worst_w_error)
        best, predicted, worst = (math.log10(mse + (0.0 if end is None else 10**end)) for end in ends)
        # No more than rounding.
        close = self.verdict is not Verdict.APPROXIMATE or worst < math.log10(mse) + LITTLE
        return replace(
            self,
            verdict=Verdict.FLOOR if close else Verdict.APPROXIMATE,
            reason=f"{self.reason}; then rounded to {dtype}, which does not hold it",
            predicted_w_error=predicted,
            best_w_error=min(best, predicted - BAND),
            worst_w_error=max(worst, predicted + BAND),
        )

    def times_power_of_two(self, exponent: int) -> "Certificate":
        """The certificate for a weight that is `2^exponent` times as large."""
        if not exponent:
            return self
        by = 2 * exponent * math.log10(2)
        names = ("predicted_w_error", "best_w_error", "worst_w_error", "agreement")
        figures = {name: getattr(self, name) for name in names}
        return replace(self, **{name: value + by for name, value in figures.items() if value is not None})

    def but(self, reason: str, log10_mse: float) -> "Certificate":
        """The certificate with one more doubt, if it may add to the mean squared error.

        Args:
            reason: Why.
            log10_mse: What it may add at most.
        """
        if self.verdict not in (Verdict.EXACT, Verdict.FLOOR, Verdict.APPROXIMATE):
            return replace(self, reason=f"{self.reason}; {reason}")
        most = [log10_mse] if self.worst_w_error is None else [log10_mse, self.worst_w_error]
        worst = max(most) + math.log10(sum(10 ** (each - max(most)) for each in most))
        if self.worst_w_error is not None and worst < self.worst_w_error + LITTLE:
            return self
        return replace(self, verdict=Verdict.APPROXIMATE, reason=f"{self.reason}; {reason}", worst_w_error=worst)


def _log10(value: float) -> float | None:
    return math.log10(value) if value > 0 else None
