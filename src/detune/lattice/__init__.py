"""The base's bits: stored entries as intervals, the base as points of a grid."""

from detune.lattice.search import HALVES, UNSETTLED, LatticeSearch, NoGrid

__all__ = ["HALVES", "UNSETTLED", "LatticeSearch", "NoGrid"]
