"""The tree that distances between models make, with nodes for ancestors that none of the models is.

Where all nodes are given, the tree of additive distances is their minimum spanning tree. Where some are not, it links
models that have a hidden ancestor in common, and the ancestor lies in the neighbourhood of one of them. There it shows:
seen from v, `(d_vj + d_vk - d_jk) / 2` is how far the ways to j and k go together. So each neighbourhood of the
spanning tree is resolved by itself, and hidden nodes that turn out to be one are joined: the two steps of CLGrouping
(Choi, Tan, Anandkumar & Willsky 2011, arXiv 1009.2722).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

# Ways that go together for less than a fiftieth of the shorter one part at v, whatever ranks say (measured with
# the others, see `describe`).
APART = 0.02
# From this share on they go together, and so do updates of which ranks say that the other share is one and the same
# (measured with the others).
TOGETHER, TOGETHER_BY_RANK = 0.25, 0.1
# An update that goes on in one run has all of the ranks before it in common with those: that says nothing of a node
# (measured with the others).
ALL = 0.9
# Where ranks say nothing, the cosine at v must be more than updates have in common that were trained on like data: 0.16
# at most (measured: LoRAs of a language model, `benchmarks/llm_models.py`).
IN_COMMON = 0.17
# Hidden nodes that are nearer to each other than 0.15 of the way between the models beside them are one (measured
# with the others).
ONE = 0.15
# Ways that go together about equally far all lead through one node (measured with the others).
ALIKE = 1.3

Shared = Callable[[int, int, int], float | None]
"""For v, j and k: how much of the updates from v to j and to k is one and the same, by ranks; None where none show."""


@dataclass
class Tree:
    """An undirected tree: nodes 0 to n - 1 are models, the others are hidden.

    Attributes:
        n: Number of models.
        links: For each node its neighbours, and the squared distance to each.
    """

    n: int
    links: dict[int, dict[int, float]] = field(default_factory=dict)

    def join(self, u: int, v: int, length: float) -> None:
        """Add an edge."""
        self.links.setdefault(u, {})[v] = length
        self.links.setdefault(v, {})[u] = length

    def part(self, u: int, v: int) -> float:
        """Remove an edge; returns its length."""
        del self.links[u][v]
        return self.links[v].pop(u)

    def add_hidden(self) -> int:
        """A new hidden node."""
        node = max(self.n, *(node + 1 for node in self.links))
        self.links[node] = {}
        return node

    @property
    def edges(self) -> list[tuple[int, int]]:
        """Each edge once."""
        return [(u, v) for u in sorted(self.links) for v in sorted(self.links[u]) if u < v]

    def beyond(self, u: int, v: int) -> Iterator[int]:
        """The models on v's side of the edge from u to v, in the order of their steps from it."""
        ways = [(u, v)]
        for before, node in ways:
            if node < self.n:
                yield node
            ways += [(node, each) for each in self.links[node] if each != before]

    def way(self, u: int, v: int) -> list[int]:
        """The nodes from u to v, with both."""
        ways = [[u]]
        for way in ways:
            if way[-1] == v:
                return way
            ways += [[*way, each] for each in self.links[way[-1]] if each not in way[-2:]]
        return []

    def merge(self, kept: int, gone: int) -> None:
        """Make one node of two neighbours."""
        self.part(kept, gone)
        for other in list(self.links[gone]):
            self.join(kept, other, self.part(gone, other))
        del self.links[gone]


def find_tree(distances: np.ndarray, shared: Shared) -> Tree:
    """Find the tree of some models.

    Args:
        distances: Squared distances, `(n, n)`, no two models equal.
        shared: What ranks say.
    """
    n = len(distances)
    tree = Tree(n, {i: {} for i in range(n)})
    spanning = spanning_tree(distances)
    resolved = Tree(n, {i: {} for i in range(n)})
    # The node that each end of an edge of the spanning tree is attached to, and its distance from its model.
    ends: dict[tuple[int, int], tuple[int, float]] = {}
    for u, v in spanning:
        tree.join(u, v, float(distances[u, v]))
    for v in range(n):
        _Neighbourhood(v, distances, shared, resolved, ends).resolve(v, list(tree.links[v]), 0.0)
    for u, v in spanning:
        (at_u, from_u), (at_v, from_v) = ends[u, v], ends[v, u]
        resolved.join(at_u, at_v, max(float(distances[u, v]) - from_u - from_v, 0.0))
    _unite(resolved, distances)
    return resolved


def spanning_tree(distances: np.ndarray) -> list[tuple[int, int]]:
    """The edges of the minimum spanning tree (Prim's algorithm)."""
    n = len(distances)
    nearest, found = distances[0].astype(float).copy(), []
    parent, left = np.zeros(n, dtype=int), np.arange(n) > 0
    for _ in range(n - 1):
        v = int(np.where(left, nearest, np.inf).argmin())
        found.append((int(parent[v]), v))
        left[v] = False
        closer = left & (distances[v] < nearest)
        nearest[closer], parent[closer] = distances[v][closer], v
    return found


@dataclass
class _Neighbourhood:
    """A model and its neighbours in the spanning tree, being resolved into hidden nodes."""

    v: int
    distances: np.ndarray
    shared: Shared
    tree: Tree
    ends: dict[tuple[int, int], tuple[int, float]]

    def resolve(self, anchor: int, members: Sequence[int], depth: float) -> None:
        """Attach members to a node at some depth from v, by way of hidden nodes where some go on together."""
        for group, ways in self._groups(members, depth):
            if len(group) == 1 or (len(group) == len(members) and anchor != self.v):
                for j in group:
                    self.ends[self.v, j] = anchor, depth
                continue
            below = float(np.mean([way for way in ways if way <= ALIKE * min(ways)]))
            hidden = self.tree.add_hidden()
            self.tree.join(anchor, hidden, below - depth)
            self.resolve(hidden, group, below)

    def _groups(self, members: Sequence[int], depth: float) -> list[tuple[list[int], list[float]]]:
        """The members whose ways go on together, and how far those go that tell."""
        groups: list[tuple[list[int], list[float]]] = []
        for j in members:
            apart, own = [], [j]
            ways: list[float] = []
            for group, before in groups:
                # One of each group is enough.
                link = next((k for k in group if self._joined(j, k, depth)), None)
                if link is None:
                    apart.append((group, before))
                else:
                    own, ways = own + group, [*ways, *before, self._together(j, link)]
            groups = [*apart, (own, ways)]
        return groups

    def _together(self, j: int, k: int) -> float:
        d, v = self.distances, self.v
        return float(d[v, j] + d[v, k] - d[j, k]) / 2

    def _joined(self, j: int, k: int, depth: float) -> bool:
        """Whether the ways from v to two models go on together beyond some depth."""
        legs = [float(self.distances[self.v, each]) - depth for each in (j, k)]
        if min(legs) <= 0:
            return False
        together = self._together(j, k) - depth
        share, cosine = together / min(legs), together / (legs[0] * legs[1]) ** 0.5
        by_rank = None if depth or share < APART or share > 1 - TOGETHER else self.shared(self.v, j, k)
        if by_rank is None or by_rank > ALL:
            return share >= TOGETHER and cosine >= IN_COMMON
        return by_rank >= TOGETHER_BY_RANK


def _unite(tree: Tree, distances: np.ndarray) -> None:
    """Make one of hidden nodes that lie at one place, and leave out those that nothing branches at."""
    while True:
        for u, v in tree.edges:
            if v < tree.n:
                continue
            if len(tree.links[v]) == 2:
                a, b = tree.links[v]
                tree.join(a, b, tree.part(v, a) + tree.part(v, b))
                del tree.links[v]
                break
            beside = [float(distances[i, j]) for i in _nearest(tree, v, u) for j in _nearest(tree, u, v)]
            if tree.links[u][v] <= (ONE if u >= tree.n else APART) * min(beside, default=0.0):
                tree.merge(u, v)
                break
        else:
            return


def _nearest(tree: Tree, u: int, v: int) -> list[int]:
    """The models next to an edge, beyond v: the first on each way from it, v itself if it is one."""
    if v < tree.n:
        return [v]
    return [next(tree.beyond(v, each)) for each in tree.links[v] if each != u]
