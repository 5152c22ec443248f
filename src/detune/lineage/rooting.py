"""The root of a tree: the node from which most of the directions that show point away."""

from collections.abc import Mapping
from dataclasses import dataclass

from detune.lineage.topology import Tree

# Where nothing else tells, the node with most neighbours: most publishers fine-tune one base several times.
# Any number does that all its neighbours together keep below a piece of evidence.
HUB = 0.1
# A direction is known where the best root that gives it is ahead of the best that gives the other by this: odds of 7
# (definition).
SURE = 2.0


@dataclass(frozen=True)
class Rooted:
    """A tree with a root.

    Attributes:
        root: The node.
        parents: The parent of each other node, parents before their children.
        margins: How far the best root is ahead of the best on the other side of the edge to its parent, for each node.
    """

    root: int
    parents: dict[int, int]
    margins: dict[int, float]


def find_root(tree: Tree, evidence: Mapping[tuple[int, int], float]) -> Rooted:
    """Choose the root.

    Args:
        tree: Undirected.
        evidence: For a pair `(u, v)` of neighbours how much speaks for v descending from u, the logarithm of the odds;
            less than nothing speaks for the other way. Pairs that are not there say nothing.
    """

    def toward(u: int, v: int) -> float:
        return evidence.get((u, v), 0.0) - evidence.get((v, u), 0.0)

    scores = {
        node: HUB * len(tree.links[node])
        + sum(toward(parent, child) for child, parent in parents_from(tree, node).items())
        for node in tree.links
    }
    root = max(scores, key=lambda node: (scores[node], -node))
    parents = parents_from(tree, root)
    margins = {}
    for child in parents:
        below = {child, *(node for node in parents if _descends(node, child, parents))}
        margins[child] = scores[root] - max(scores[node] for node in below)
    return Rooted(root, parents, margins)


def parents_from(tree: Tree, root: int) -> dict[int, int]:
    """The parent of each node but the root, parents before their children."""
    parents: dict[int, int] = {}
    queue = [root]
    for node in queue:
        children = [each for each in tree.links[node] if each != parents.get(node)]
        parents |= dict.fromkeys(children, node)
        queue += children
    return parents


def _descends(node: int, ancestor: int, parents: Mapping[int, int]) -> bool:
    while node in parents:
        node = parents[node]
        if node == ancestor:
            return True
    return False
