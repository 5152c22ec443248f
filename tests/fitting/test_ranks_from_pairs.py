from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from detune.fitting.differences import ring
from detune.fitting.ranks_from_pairs import solve_ranks

ranks_of_models = st.lists(st.integers(0, 64), min_size=3, max_size=9)


@given(ranks=ranks_of_models)
def test_exact_sums_on_the_ring_give_the_ranks(ranks):
    sums = {(i, j): ranks[i] + ranks[j] for i, j in ring(len(ranks))}
    assert solve_ranks(sums, len(ranks)) == tuple(ranks)


@given(ranks=ranks_of_models)
def test_exact_sums_of_all_pairs_give_the_ranks(ranks):
    sums = {(i, j): ranks[i] + ranks[j] for i, j in combinations(range(len(ranks)), 2)}
    assert solve_ranks(sums, len(ranks)) == tuple(ranks)


@given(ranks=st.lists(st.integers(1, 64), min_size=5, max_size=8), data=st.data())
def test_one_wrong_sum_among_all_pairs_is_outvoted(ranks, data):
    pairs = list(combinations(range(len(ranks)), 2))
    sums = {(i, j): ranks[i] + ranks[j] for i, j in pairs}
    sums[data.draw(st.sampled_from(pairs))] += data.draw(st.sampled_from([-1, 1]))
    assert solve_ranks(sums, len(ranks)) == tuple(ranks)


@given(sums=st.lists(st.integers(0, 20), min_size=3, max_size=3))
def test_no_rank_is_negative(sums):
    assert min(solve_ranks(dict(zip(ring(3), sums, strict=True)), 3)) >= 0


@pytest.mark.parametrize("n", range(3, 12))
def test_the_ring_meets_every_model_twice_and_has_an_odd_cycle(n):
    pairs = ring(n)
    assert all(i < j for i, j in pairs)
    assert len(set(pairs)) == len(pairs) == (n if n % 2 else n + 1)
    for i in range(n):
        assert {tuple(sorted((i, (i + step) % n))) for step in (-1, 1)} <= set(pairs)


@pytest.mark.parametrize("n", [1, 2])
def test_two_models_have_one_difference(n):
    assert ring(n) == ((0, 1),) * (n - 1)
