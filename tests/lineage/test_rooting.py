import pytest

from detune.lineage.rooting import find_root, parents_from
from detune.lineage.topology import Tree


@pytest.fixture
def path() -> Tree:
    """0 - 1 - 2, and 3 beside 1."""
    tree = Tree(4)
    for u, v in ((0, 1), (1, 2), (1, 3)):
        tree.join(u, v, 1.0)
    return tree


def test_evidence_on_one_edge_decides_where_the_root_is(path):
    found = find_root(path, {(0, 1): 4.0, (1, 0): -4.0})
    assert found.root == 0
    assert found.parents == {1: 0, 2: 1, 3: 1}
    assert found.margins[1] == pytest.approx(16 - 0.2)


def test_without_evidence_the_node_with_most_neighbours_is_the_root_and_no_direction_is_sure(path):
    found = find_root(path, {})
    assert found.root == 1
    assert all(margin == pytest.approx(0.2) for margin in found.margins.values())


def test_contradictions_are_outvoted(path):
    found = find_root(path, {(1, 0): 3.0, (1, 2): 3.0, (3, 1): 2.0})
    assert found.root == 3
    assert find_root(path, {(1, 0): 3.0, (1, 2): 3.0, (1, 3): 2.0}).root == 1


def test_parents_come_before_their_children(path):
    assert list(parents_from(path, 2)) == [1, 0, 3]
