"""How far a recovered matrix is from the truth. Ground truth enters detune here and nowhere else."""

from detune.metrics.w_error import bit_identical, squared_error, w_error

__all__ = ["bit_identical", "squared_error", "w_error"]
