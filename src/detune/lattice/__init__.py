"""The base's bits: stored entries as intervals, the base as points of a grid."""

from detune.lattice.light import all_half, is_coarse
from detune.lattice.search import LatticeSearch, NoGrid, stays
from detune.numerics.float_grid import HALVES

__all__ = ["HALVES", "LatticeSearch", "NoGrid", "all_half", "is_coarse", "stays"]
