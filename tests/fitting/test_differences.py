"""Ranks and row spaces of the differences, found over the storage noise."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from detune.fitting.differences import find_differences, ring
from detune.problem import NonFinite, Stack
from detune.problem.rank_rule import SIGNAL
from tests.cases import Regime, make_problem, normal, rms, seeded

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(96, 96), (300, 80), (80, 300), (1500, 64)], ids=str)
@pytest.mark.parametrize("ranks", [(4, 4, 4), (1, 6, 3), (8, 2, 5, 1), (3,) * 5])
def test_ranks_are_found_exactly(dtype, shape, ranks):
    problem = make_problem(Regime(shape=shape, ranks=ranks, scale=0.3, dtype=dtype), seeded())
    differences = find_differences(Stack.of(problem.stack))
    assert differences.ranks == ranks
    assert set(differences.by_pair) == set(ring(len(ranks)))
    assert differences.full_rank_pairs == ()


@pytest.mark.parametrize("scale", [1e-3, 1e-1, 10.0])
def test_ranks_do_not_depend_on_the_deltas_size(scale):
    problem = make_problem(Regime(ranks=(5, 3, 4), scale=scale, dtype=torch.float32), seeded())
    assert find_differences(Stack.of(problem.stack)).ranks == (5, 3, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_base_with_rows_and_columns_of_very_different_size(dtype):
    """The noise follows the weights: one threshold from the average would miss it."""
    generator = seeded(2)
    problem = make_problem(Regime(shape=(128, 96), ranks=(4, 4, 4), scale=1.0), generator)
    sizes = torch.exp(1.5 * normal(generator, 128, 1)) * torch.exp(0.5 * normal(generator, 96))
    stack = torch.stack([problem.W_star * sizes + M_i for M_i in problem.deltas]).to(dtype)
    assert find_differences(Stack.of(stack)).ranks == (4, 4, 4)


@pytest.mark.parametrize("fold", [True, False])
def test_row_spaces_are_those_of_the_differences(fold):
    problem = make_problem(Regime(shape=(1100, 70), ranks=(3, 5, 2)), seeded())
    differences = find_differences(Stack.of(problem.stack), fold=fold)
    for (i, j), difference in differences.by_pair.items():
        V = difference.basis
        torch.testing.assert_close(V.mT @ V, torch.eye(difference.rank, dtype=V.dtype))
        D = problem.deltas[i] - problem.deltas[j]
        assert rms(D - D @ V @ V.mT) <= 1e-12
        assert differences.of(j, i) is difference


def test_without_folding_singular_values_are_those_of_the_differences():
    problem = make_problem(Regime(ranks=(3, 5, 2), decay=3), seeded())
    for (i, j), difference in find_differences(Stack.of(problem.stack), fold=False).by_pair.items():
        expected = torch.linalg.svdvals(problem.deltas[i] - problem.deltas[j])[: difference.rank]
        torch.testing.assert_close(difference.singular_values, expected, rtol=1e-8, atol=0)


@given(rank=st.integers(1, 8))
def test_a_given_rank_cuts_the_spaces(rank):
    problem = make_problem(Regime(ranks=(4, 4, 4), decay=2), seeded())
    differences = find_differences(Stack.of(problem.stack), rank)
    assert {difference.rank for difference in differences.by_pair.values()} == {min(8, 2 * rank)}


def test_a_rank_beyond_the_first_sketch_is_found_too():
    problem = make_problem(Regime(shape=(400, 300), ranks=(60, 45, 50)), seeded())
    assert find_differences(Stack.of(problem.stack)).ranks == (60, 45, 50)


def test_full_rank_is_told_from_high_rank():
    generator = seeded()
    stack = torch.stack([normal(generator, 64, 80) for _ in range(3)])
    assert find_differences(Stack.of(stack)).full_rank_pairs == ((0, 1), (1, 2), (0, 2))
    high = make_problem(Regime(shape=(64, 80), ranks=(28, 27, 28)), seeded())
    assert find_differences(Stack.of(high.stack)).full_rank_pairs == ()


def test_equal_models_have_no_difference():
    problem = make_problem(Regime(ranks=(0, 0, 3), dtype=torch.bfloat16), seeded())
    assert find_differences(Stack.of(problem.stack)).ranks == (0, 0, 3)


@pytest.mark.parametrize("place", [(0, 0, 0), (2, 71, 59), (1, 40, 3)])
def test_nan_is_found_wherever_it_is(place):
    stack = make_problem(Regime(), seeded()).stack
    stack[place] = float("nan")
    with pytest.raises(NonFinite, match=f"matrix {place[0]} holds NaN or Inf"):
        find_differences(Stack.of(stack))


@pytest.mark.parametrize("fold", [True, False])
def test_large_matrices_show_directions_hardly_above_the_noise(fold):
    """A direction 1.4 times as strong as the noise of a difference lies mostly outside the images of test vectors."""
    generator, shape = seeded(), (1100, 1000)
    W = (normal(generator, *shape) / shape[1] ** 0.5).bfloat16().double()
    noise = SIGNAL * 2**0.5 * float(Stack.of([W.bfloat16()]).noise_norm(0, shape[0]))
    sizes = torch.tensor([30.0, 10.0, 3.0, 1.4, 1.4]).double() * noise
    models = []
    for i in range(3):
        U, V = (torch.linalg.qr(normal(seeded(10 * i + j + 1), side, 5))[0] for j, side in enumerate(shape))
        models.append((W + (U * sizes) @ V.mT).bfloat16())
    assert find_differences(Stack.of(models), fold=fold).ranks == (5, 5, 5)
