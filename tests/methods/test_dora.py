"""Scales of rows or columns beside a low rank."""

import pytest
import torch

from detune.methods.dora import DoRA, Scaled, as_one_scale
from detune.problem import NotRecoverable, Stack
from tests.cases import Regime, make_problem, normal, seeded


def scaled_set(seed: int = 0, columns: bool = False):
    """LoRA's models, each with scales of its own about 1, and these scales."""
    problem = make_problem(Regime(shape=(96, 80), dtype=torch.float32), seeded(seed))
    scales = 1 + 0.03 * normal(seeded(seed + 100), 3, 80 if columns else 96)
    models = problem.stack.double() * (scales[:, None] if columns else scales[:, :, None])
    return problem, models.float(), scales


def test_a_scaled_delta_is_what_the_model_has_more_than_the_base():
    generator = seeded()
    left, right, weight = normal(generator, 6, 2), normal(generator, 5, 2), normal(generator, 6, 5)
    scale = 1 + normal(generator, 6)
    M_i = Scaled(left, right, scale, weight, False)
    torch.testing.assert_close(M_i.dense(), scale[:, None] * (weight + left @ right.mT) - weight)
    torch.testing.assert_close(M_i.times_power_of_two(3).dense(), 8 * M_i.dense())


@pytest.mark.parametrize("columns", [False, True])
def test_directions_of_rows_are_the_bases(columns):
    """Or of columns: their lengths are not in the data."""
    problem, models, scales = scaled_set(columns=columns)
    stack = Stack.of(models)
    recovery = DoRA().solve(stack)
    ratio = recovery.weight / problem.W_star
    along = ratio if columns else ratio.mT
    torch.testing.assert_close(along, along[:1].expand_as(along), rtol=1e-3, atol=0)
    assert recovery.ranks == (4, 4, 4)
    found = torch.stack([M_i.scale for M_i in recovery.deltas])
    torch.testing.assert_close(found / found[0], scales / scales[0], rtol=1e-5, atol=0)
    for M_i, W_i in zip(recovery.deltas, models, strict=True):
        torch.testing.assert_close(recovery.weight + M_i.dense(), W_i.double(), rtol=0, atol=1e-5)


def test_on_one_scale_models_differ_by_low_ranks():
    _, models, _ = scaled_set()
    stack = Stack.of(models)
    one, solved = as_one_scale(stack, DoRA().solve(stack))
    assert int(torch.linalg.matrix_rank(one.matrices[1].double() - one.matrices[0].double(), rtol=1e-3)) == 8
    assert not any(isinstance(M_i, Scaled) for M_i in solved.deltas)


def test_without_scales_it_is_loras_problem():
    stack = Stack.of(make_problem(Regime(), seeded()).stack)
    recovery = DoRA().solve(stack)
    assert recovery.ranks == (4, 4, 4)
    assert as_one_scale(stack, recovery) is None


def test_full_ranks_are_refused():
    models = [normal(seeded(i), 30, 20) for i in range(3)]
    with pytest.raises(NotRecoverable, match=r"3 30x20 matrices do not differ by low ranks and scales of rows or col"):
        DoRA().solve(Stack.of(models))
