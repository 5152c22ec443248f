"""Rows and columns scaled until rounding is as large everywhere."""

import pytest
import torch

from detune.fitting.differences import find_differences
from detune.methods import Auto
from detune.problem import LowRank, Stack
from detune.problem.recovery import Recovery
from tests.cases import normal, rms, seeded

SHAPE = (192, 160)


def uneven(dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, list[torch.Tensor], Stack]:
    """A base whose first rows and columns are far larger than the others, with deltas that do not care."""
    generator = seeded(0)
    W = normal(generator, *SHAPE) / 20
    W[:24] *= 16
    W[:, :10] *= 8
    W = W.to(dtype)
    deltas = [normal(generator, SHAPE[0], 6) @ normal(generator, 6, SHAPE[1]) for _ in range(3)]
    deltas = [2.0**-10 * M_i / rms(M_i) for M_i in deltas]
    return W, deltas, Stack.of([(W.double() + M_i).to(dtype) for M_i in deltas])


def test_rounding_is_as_large_in_all_rows_and_columns():
    W, _, _ = uneven(torch.float64)
    W_i = W.bfloat16()
    stack = Stack.of([W_i] * 3)
    balance = stack.balance
    assert balance is not None
    rounding = (W_i.double() - W) * balance.rows[:, None] * balance.columns
    assert stack.scaled(balance).noise_override == pytest.approx([rms(rounding)] * 3, rel=0.05)
    for size in (rounding.square().mean(dim=0).sqrt(), rounding.square().mean(dim=1).sqrt()):
        assert size.max() < 1.6 * size.min()


def test_even_matrices_stay_as_they_are():
    W = normal(seeded(0), 300, 280).bfloat16()
    balance = Stack.of([W, W, W]).balance
    assert balance is not None
    assert balance.rows.max() < 1.4 * balance.rows.min()
    assert balance.columns.max() < 1.4 * balance.columns.min()


def test_answers_come_back():
    _, deltas, stack = uneven()
    balance = stack.balance
    assert balance is not None
    M = LowRank(deltas[0][:, :2].clone(), torch.eye(SHAPE[1], 2, dtype=torch.float64))
    scaled = M.scaled(balance.rows, balance.columns)
    weight = stack.scaled(balance).matrices[0].double()
    answer = Recovery(weight, "intersect", "", (scaled,), (2,))
    found = answer.scaled(1 / balance.rows, 1 / balance.columns)
    assert torch.allclose(found.deltas[0].dense(), M.dense())
    assert torch.allclose(found.weight, stack.matrices[0].double(), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_large_rows_do_not_hide_what_the_others_show(dtype):
    W, _, stack = uneven(dtype)
    first = find_differences(stack)
    found = Auto().solve(stack)
    if dtype == torch.bfloat16:
        assert first.ranks != (6, 6, 6)
    assert found.ranks == (6, 6, 6)
    assert found.bits is not None
    right = found.weight.eq(W.double())
    assert right.double().mean() > 0.97
    assert bool(right[found.bits.certain].all())


def test_a_row_of_zeros_in_one_model_is_not_multiplied_beyond_all_numbers():
    W, _, stack = uneven()
    first, *others = stack.matrices
    first = first.clone()
    first[40] = 0
    W[40] = 0
    others = [W_i.clone() for W_i in others]
    for W_i in others:
        W_i[40] = 2.0**-10 * W_i[40]
    given = Stack.of([first, *others])
    assert given.balance is not None
    balanced = given.scaled(given.balance)
    assert all(bool(torch.isfinite(W_i).all()) for W_i in balanced.matrices)
    assert max(balanced.noise_override) < 2 * min(balanced.noise_override)
    assert torch.isfinite(Auto().solve(given).weight).all()


def test_only_half_precision_is_balanced():
    W, deltas, stack = uneven()
    assert Stack.of([*stack.matrices[:2], (W.double() + deltas[2]).float()]).balance is None
    assert Stack.of([W_i.float() for W_i in stack.matrices]).balance is not None
