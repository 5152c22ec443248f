"""Distances of a recovered matrix from the truth, and of a recovered model from the original."""

from detune.metrics.activation import activation_distance
from detune.metrics.images import largest_level_difference, lpips_distance
from detune.metrics.sbert import TextDistance, sbert_distance
from detune.metrics.ulps import from_ordered_bits, ordered_bits, ulps
from detune.metrics.w_error import bit_identical, squared_error, w_error

__all__ = [
    "TextDistance",
    "activation_distance",
    "bit_identical",
    "from_ordered_bits",
    "largest_level_difference",
    "lpips_distance",
    "ordered_bits",
    "sbert_distance",
    "squared_error",
    "ulps",
    "w_error",
]
