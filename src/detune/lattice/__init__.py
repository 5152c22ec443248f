"""The base's bits: stored entries as intervals, the base as points of a grid."""

from detune.lattice.search import HALVES, LatticeSearch, NoGrid, all_half, is_coarse

__all__ = ["HALVES", "LatticeSearch", "NoGrid", "all_half", "is_coarse"]
