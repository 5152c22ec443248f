"""What is said of an answer."""

from dataclasses import dataclass
from enum import StrEnum


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
        agreement: The same figure from the disagreement of recoveries from parts of the models; None where they were
            not made.
    """

    verdict: Verdict
    reason: str
    undetermined: int | None = None
    predicted_w_error: float | None = None
    agreement: float | None = None
