"""The base's bits: stored entries as intervals, the base as points of a grid."""

from detune.lattice.search import HALVES, UNSETTLED, Lattice, NoGrid

__all__ = ["HALVES", "UNSETTLED", "Lattice", "NoGrid"]
