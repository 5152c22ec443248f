from itertools import pairwise

import numpy as np
import pytest
import torch

from detune.lineage.topology import Tree, find_tree, spanning_tree
from tests.cases import seeded


def path_distances(tree: Tree, nodes) -> np.ndarray:
    """Distances along a tree of all pairs of some nodes."""
    found = np.zeros((len(nodes), len(nodes)))
    for a, u in enumerate(nodes):
        for b, v in enumerate(nodes):
            way = tree.way(u, v)
            found[a, b] = sum(tree.links[x][y] for x, y in pairwise(way))
    return found


def shape(tree: Tree) -> set[frozenset[int]]:
    """A tree by how its edges split its models: the side without model 0."""
    sides = [frozenset(tree.beyond(u, v)) for u, v in tree.edges]
    return {side if 0 not in side else frozenset(range(tree.n)) - side for side in sides} - {frozenset()}


def says_nothing(v, j, k):
    return None


def random_tree(n: int, hidden: int, seed: int) -> Tree:
    """A random tree: n models and some hidden nodes of three neighbours or more."""
    generator = seeded(seed)
    while True:
        tree = Tree(n, {0: {}})
        for node in range(1, n + hidden):
            parent = int(torch.randint(0, node, (), generator=generator))
            tree.join(parent, node, float(0.5 + torch.rand((), generator=generator)))
        if all(len(tree.links[node]) >= 3 for node in range(n, n + hidden)):
            return tree


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("n", "hidden"), [(2, 0), (6, 0), (6, 1), (9, 2), (12, 0)])
def test_additive_distances_give_their_tree(n, hidden, seed):
    # Hidden nodes come last: the more neighbours, the earlier.
    tree = random_tree(n, 0, seed)
    order = sorted(range(n), key=lambda node: -len(tree.links[node]))
    gone = [node for node in order if len(tree.links[node]) >= 3][:hidden]
    kept = [node for node in range(n) if node not in gone]
    distances = path_distances(tree, kept)
    place = {node: k for k, node in enumerate(kept)}
    renamed = Tree(len(kept), {})
    fresh = {node: len(kept) + k for k, node in enumerate(gone)}
    for u, v in tree.edges:
        renamed.join(*((place | fresh)[node] for node in (u, v)), tree.links[u][v])
    found = find_tree(distances, says_nothing)
    assert shape(found) == shape(renamed)
    assert len(found.links) == n


def test_a_star_of_models_has_a_hidden_middle():
    sizes = np.array([1.0, 1.1, 1.2, 1.3])
    distances = (sizes[:, None] + sizes) * (1 - np.eye(4))
    tree = find_tree(distances, says_nothing)
    assert [len(tree.links[node]) for node in range(5)] == [1, 1, 1, 1, 4]
    assert [tree.links[4][i] for i in range(4)] == pytest.approx(sizes)


def test_ranks_decide_where_distances_hardly_tell():
    """Model 0 is a little off the middle: by an update of its own, or by what the others have in common."""
    sizes = np.array([0.1, 1.0, 1.0, 1.0])
    distances = (sizes[:, None] + sizes) * (1 - np.eye(4))
    assert len(find_tree(distances, lambda v, j, k: 0.5 if v == 0 else 0.0).links) == 5
    assert len(find_tree(distances, lambda v, j, k: 0.0).links) == 4
    assert len(find_tree(distances, says_nothing).links) == 4


def test_what_updates_have_in_common_is_no_node():
    """Siblings whose updates have a cosine of 0.15, beside their parent."""
    gram = np.full((4, 4), 0.15) + 0.85 * np.eye(4)
    gram[0] = gram[:, 0] = 0
    squares = gram.diagonal()
    distances = squares[:, None] + squares - 2 * gram
    tree = find_tree(distances, says_nothing)
    assert tree.edges == [(0, 1), (0, 2), (0, 3)]


def test_spanning_tree():
    distances = np.array([[0, 1, 5, 9], [1, 0, 2, 9], [5, 2, 0, 3], [9, 9, 3, 0]], dtype=float)
    assert spanning_tree(distances) == [(0, 1), (1, 2), (2, 3)]


def test_ways_in_a_tree():
    tree = Tree(4)
    for u, v in ((0, 1), (1, 2), (1, 3)):
        tree.join(u, v, 1.0)
    assert tree.way(0, 3) == [0, 1, 3]
    assert list(tree.beyond(0, 1)) == [1, 2, 3]
    assert list(tree.beyond(1, 0)) == [0]
