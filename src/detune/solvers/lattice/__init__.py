"""The base's bits: stored entries as intervals, the base as points of a grid."""

from detune.solvers.lattice.refine import HALVES, Lattice, NoGrid

__all__ = ["HALVES", "Lattice", "NoGrid"]
