"""The origin of a weight."""

from enum import StrEnum

__all__ = ["Origin"]


class Origin(StrEnum):
    """The origin of a weight, whichever method gave it.

    Attributes:
        SOLVED: A method took the deltas out.
        DENOISED: The deltas were split off as far as they stand over noise that somebody added.
        UNCHANGED: It is the matrix of a model that is taken to have left it alone.
        MEAN: It is the mean of the models, deltas and all.
        SINGLE: It is one model's, as it is.
        COPY: It was copied, as there was nothing to compute.
        NONE: Nobody has computed it.
    """

    SOLVED = "solved"
    DENOISED = "denoised"
    UNCHANGED = "unchanged"
    MEAN = "mean"
    SINGLE = "single"
    COPY = "copy"
    NONE = "none"

    @property
    def is_base(self) -> bool:
        """Whether it is meant to be the base's: its deltas were taken out, or there were none."""
        return self in (Origin.SOLVED, Origin.DENOISED, Origin.UNCHANGED)
