"""One tree: who descends from whom, and by what."""

from collections.abc import Collection, Sequence
from itertools import accumulate, combinations, count, pairwise
from statistics import fmean

import torch

from detune.compatibility.low_rank_test import RelationKind
from detune.lineage.geometry import Geometry, first_share
from detune.lineage.rooting import SURE, find_root
from detune.lineage.topology import TOGETHER, Tree, find_tree
from detune.lineage.tree import EdgeKind, Node
from detune.problem.recovery import FEWEST_MODELS

# The way to a model and on from it is one line where its cosine is below this (measured, with all thresholds of this
# package: 714 of 716 edges right, `benchmarks/lineage.py`).
STRAIGHT = -0.98
# A model lies on an edge where the cosine at it is below this: its ends may be noisy copies of the line's
# (measured with the others).
LINE = -0.9
# Updates go on where the last ones led where the cosine is below this, and ranks say nothing (measured
# with the others).
ONWARD = -0.3
# A copy at another strength has its adapter's rank; a later checkpoint up to twice as much: any number does between.
SAME_RANK = 1.25
# MOST bounds the weight of one piece of evidence, in logarithms of odds: 55 to 1. LEAST_ERROR is that of a model's part
# of the roundings: on LoRAs of a language model it is 0.0 to 0.25 for a parent, 0.75 to 1.0 for a child (measured, see
# docs/lineage.md).
MOST, LEAST_ERROR = 4.0, 0.15
ROUNDED = "the models beyond it were rounded once more than those on its parent's side"
# Tokens are added, and hardly ever taken away: any number does below MOST and above SURE.
ADDED = 3.0


def describe_tree(
    geometry: Geometry, models: Sequence[tuple[str, str]], tokens: Sequence[int], taken: Collection[str]
) -> list[Node]:
    """Find the tree of models that are related, and what its edges are.

    Args:
        geometry: What their weights say.
        models: The spec of each as the user gave it, and its name in the tree.
        tokens: How many tokens each has more than some layout.
        taken: Names that ancestors may not have.

    Returns:
        The nodes, parents before their children.
    """
    return _Family(geometry, models, tokens, taken).nodes()


class _Family:
    def __init__(
        self, geometry: Geometry, models: Sequence[tuple[str, str]], tokens: Sequence[int], taken: Collection[str]
    ) -> None:
        self.geometry, self.tokens = geometry, tokens
        self.specs = [spec for spec, _ in models]
        self.twins = _twins(geometry, tokens)
        self.distances = geometry.distances
        kept = [i for i in range(geometry.n) if i not in self.twins]
        self.merges = self._merges(kept)
        kept = [i for i in kept if i not in self.merges]
        self.tree = self._tree(kept)
        self._put_back()
        self.rooted = find_root(self.tree, self._evidence())
        free = (name for name in map("ancestor-{}".format, count(1)) if name not in taken)
        hidden = sorted(node for node in self.tree.links if node >= self.tree.n)
        self.names = {i: name for i, (_, name) in enumerate(models)} | dict(zip(hidden, free, strict=False))

    def nodes(self) -> list[Node]:
        """All nodes."""
        nodes = [self._node(self.rooted.root)] + [self._node(node) for node in self.rooted.parents]
        for child, parent in self.twins.items():
            more = self.tokens[child] - self.tokens[parent]
            kind = EdgeKind.VOCABULARY if more else EdgeKind.OTHER
            why = "it has more tokens" if more else "too little tells which is older"
            nodes.append(
                Node(self.names[child], self.specs[child], self.names[parent], kind, None, more, bool(more), why)
            )
        for child, (first, second) in self.merges.items():
            d = self.distances
            share = float((d[first, child] / d[first, second]).sqrt())
            near, far, share = (first, second, share) if share <= 1 / 2 else (second, first, 1 - share)
            why = "it lies on the line between them"
            nodes.append(
                Node(
                    self.names[child],
                    self.specs[child],
                    self.names[near],
                    EdgeKind.MERGE,
                    why=why,
                    other_parent=self.names[far],
                    share=share,
                )
            )
        return nodes

    def _tree(self, kept: Sequence[int]) -> Tree:
        """The tree of some models, by their places among all."""
        g = self.geometry
        found = find_tree(
            self.distances[kept][:, kept].numpy(), lambda v, j, k: g.shared_rank(kept[v], kept[j], kept[k])
        )

        def place(node: int) -> int:
            return kept[node] if node < found.n else node - found.n + g.n

        links = {place(u): {place(v): length for v, length in each.items()} for u, each in found.links.items()}
        return Tree(g.n, links)

    def _merges(self, kept: Sequence[int]) -> dict[int, tuple[int, int]]:
        """Models that lie on the line between two others, and these: merges, or copies at another strength."""
        found: dict[int, tuple[int, int]] = {}
        for c in kept:
            pairs = [
                (a, b)
                for a, b in combinations([i for i in kept if i != c], 2)
                if self.geometry.cosine(c, a, b) <= STRAIGHT
            ]
            if pairs:
                found[c] = min(pairs, key=lambda pair: self.geometry.cosine(c, *pair))
        return {c: ends for c, ends in found.items() if not set(ends) & set(found)}

    def _put_back(self) -> None:
        """Put models that lie on an edge of the tree there: only the others are merges."""
        for c, ends in sorted(self.merges.items(), key=lambda item: float(self.distances[item[1][0], item[0]])):
            on = [
                (u, v)
                for u, v in pairwise(self.tree.way(*ends))
                if max(u, v) < self.tree.n and self.geometry.cosine(c, u, v) <= LINE
            ]
            if on:
                u, v = on[0]
                self.tree.part(u, v)
                for end in (u, v):
                    self.tree.join(end, c, float(self.distances[end, c]))
                del self.merges[c]

    def _nearest(self, u: int, v: int) -> int:
        """The model that is nearest to u beyond its neighbour v."""
        found = list(self.tree.beyond(u, v))
        return min(found, key=lambda i: float(self.distances[u, i])) if u < self.tree.n else found[0]

    def _evidence(self) -> dict[tuple[int, int], float]:
        """For each edge from u to v what speaks for v being the younger one."""
        evidence: dict[tuple[int, int], float] = {}
        for u, v in self.tree.edges:
            evidence[u, v] = self._rounded_below(u, v)
            if max(u, v) < self.tree.n:
                evidence[u, v] += MOST * (self._is_coarser(v, u) - self._is_coarser(u, v))
                evidence[u, v] += ADDED * ((self.tokens[v] > self.tokens[u]) - (self.tokens[v] < self.tokens[u]))
        return evidence

    def _rounded_below(self, u: int, v: int) -> float:
        """The log-likelihood ratio of the roundings of merges, with u the older end of an edge against v.

        On the way from a model a to a model c each node was rounded but the oldest one. The steps of a node between are
        those of a or of c, by which of the two it is nearer to: it counts by `w = d_c / (d_a + d_c)` in a's share.
        """
        near, far = self._beside(u, v), self._beside(v, u)
        pairs = [(near[k % len(near)], far[k % len(far)]) for k in range(max(len(near), len(far)))]
        ratio = fmean(self._ratio(u, v, a, c) for a, c in pairs)
        return max(-MOST, min(MOST, ratio))

    def _beside(self, node: int, other: int) -> list[int]:
        """Models on a node's side of an edge, on two ways from it; itself if it is one."""
        if node < self.tree.n:
            return [node]
        return [self._nearest(node, each) for each in self.tree.links[node] if each != other][:2]

    def _ratio(self, u: int, v: int, a: int, c: int) -> float:
        """By the way from a to c over the edge from u to v."""
        way = self.tree.way(a, c)
        seen = first_share(self.geometry.roundings(a, c), len(way) - 1)
        if seen is None:
            return 0.0
        ahead = [0.0, *accumulate(self.tree.links[x][y] for x, y in pairwise(way))]
        weights = [1 - each / ahead[-1] for each in ahead]
        # The share that a would have, were the oldest u, or v.
        older, younger = (sum(weights) - weights[way.index(node)] for node in (u, v))
        return (younger - older) * ((older + younger) / 2 - seen.value) / max(seen.error, LEAST_ERROR) ** 2

    def _is_coarser(self, v: int, u: int) -> bool:
        """Whether v is u on coarser levels, or in a coarser dtype."""
        g = self.geometry
        noisy = [any(noise[each] for noise in g.noise) for each in (v, u)]
        if noisy[0] and not noisy[1] and g.hides(u, v):
            return True
        eps = [max(torch.finfo(block[each].dtype).eps for block in g.blocks) for each in (v, u)]
        return eps[0] > eps[1] and self._is_same(u, v)

    def _is_same(self, u: int, v: int) -> bool:
        return set(self.geometry.kinds(u, v)) == {RelationKind.SAME}

    def _node(self, node: int) -> Node:
        spec = self.specs[node] if node < self.tree.n else None
        sources = () if spec else self._sources(node)
        if node == self.rooted.root:
            return Node(self.names[node], spec, recover_from=sources)
        parent = self.rooted.parents[node]
        kind, rank = self._edge(parent, node)
        margin = self.rooted.margins[node]
        given = max(parent, node) < self.tree.n
        return Node(
            self.names[node],
            spec,
            self.names[parent],
            kind,
            rank,
            self.tokens[node] - self.tokens[parent] if given else 0,
            margin >= SURE,
            self._why(parent, node, margin),
            recover_from=sources,
        )

    def _why(self, parent: int, node: int, margin: float) -> str:
        if margin < SURE:
            return "too little tells which is older: the node with most neighbours is taken for the root"
        given = max(parent, node) < self.tree.n
        if given and self._is_coarser(node, parent):
            return "it is its parent on coarser levels"
        if self._rounded_below(parent, node) >= SURE:
            return "their difference is rounded to its steps, not to its parent's" if given else ROUNDED
        if given and self.tokens[node] > self.tokens[parent]:
            return "it has more tokens"
        return "the other edges lead away from the root"

    def _edge(self, parent: int, node: int) -> tuple[EdgeKind, int | None]:
        """The step that made a node of its parent, and its rank where it shows."""
        g = self.geometry
        near, far = self._beside(parent, node), self._beside(node, parent)
        (a, b), (c, d) = (near[0], near[-1]), (far[0], far[-1])
        rank = g.rank_between(a, b, c, d)
        given = max(parent, node) < self.tree.n
        if given and self._is_coarser(node, parent):
            return EdgeKind.QUANTISED, rank
        onward = self._onward(parent, node) if parent < self.tree.n else None
        if onward is not None:
            return onward, rank
        if g.is_light(a, c):
            return EdgeKind.LIGHT, rank
        return (EdgeKind.FULL, None) if rank is None else (EdgeKind.LORA, rank)

    def _onward(self, parent: int, node: int) -> EdgeKind | None:
        """Whether a child goes on where its parent's own updates led: by the ranks, or else by the angle."""
        g, child = self.geometry, self._beside(node, parent)[0]
        if parent not in self.rooted.parents:
            return None
        before = self._nearest(parent, self.rooted.parents[parent])
        shared = g.shared_rank(parent, before, child)
        cosine = g.cosine(parent, before, child)
        if shared is None:
            if cosine > ONWARD:
                return None
            return EdgeKind.STRENGTH if cosine <= STRAIGHT else EdgeKind.CHECKPOINT
        if shared < TOGETHER:
            return None
        own, onward = (max(g.ranks(parent, each), default=0) for each in (before, child))
        return EdgeKind.STRENGTH if onward <= SAME_RANK * own and cosine <= ONWARD else EdgeKind.CHECKPOINT

    def _sources(self, hidden: int) -> tuple[str, ...]:
        """The models that a hidden node can be recovered from: one on each way from it, all a low rank apart."""
        found: list[int] = []
        for each in self.tree.links[hidden]:
            near = self._nearest(hidden, each)
            if all(RelationKind.FULL_RANK not in self.geometry.kinds(near, other) for other in found):
                found.append(near)
        return tuple(self.specs[i] for i in sorted(found)) if len(found) >= FEWEST_MODELS else ()


def _twins(geometry: Geometry, tokens: Sequence[int]) -> dict[int, int]:
    """Models that differ in nothing that was looked at from another with as few tokens: that one is their parent."""
    found: dict[int, int] = {}
    for i in range(geometry.n):
        same = [j for j in range(geometry.n) if float(geometry.distances[i, j]) == 0]
        first = min(same, key=lambda j: (tokens[j], j))
        if first != i:
            found[i] = first
    return found
