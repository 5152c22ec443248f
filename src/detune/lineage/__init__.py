"""The family's tree: who descends from whom, by what, and which ancestors none of the models is."""

from detune.lineage.family import Family
from detune.lineage.find import find_lineage
from detune.lineage.tree import EdgeKind, Lineage, Node

__all__ = ["EdgeKind", "Family", "Lineage", "Node", "find_lineage"]
