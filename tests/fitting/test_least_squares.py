"""Passes over the matrices, however these lie in memory."""

import pytest
import torch

from detune.fitting.differences import _fold
from detune.fitting.least_squares import project_left, project_right, w_step, w_step_given_rows
from detune.numerics.linalg import orthonormal
from detune.problem.low_rank import LowRank
from detune.problem.stack import Stack
from tests.cases import normal, seeded

N, OUT, IN, RANKS = 3, 700, 500, (4, 2, 3)


@pytest.fixture
def layouts() -> tuple[Stack, Stack]:
    """One set of matrices, stored row by row and column by column."""
    matrices = normal(seeded(), N, OUT, IN)
    turned = [W_i.mT.contiguous().mT for W_i in matrices]
    return Stack.of(matrices, torch.float64), Stack.of(turned, torch.float64)


def spaces(size: int) -> list[torch.Tensor]:
    return [orthonormal(normal(seeded(i), size, r)) for i, r in enumerate(RANKS)]


def test_a_stack_knows_how_it_lies(layouts):
    by_rows, by_columns = layouts
    assert not by_rows.by_columns
    assert by_columns.by_columns
    assert by_rows.transposed.by_columns
    assert not by_columns.transposed.by_columns


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (1, 1)])
def test_a_single_row_or_column_lies_either_way(shape):
    stack = Stack.of(normal(seeded(), 3, *shape))
    assert not (stack.by_columns and stack.transposed.by_columns)


def test_projections_do_not_depend_on_the_layout(layouts):
    for project, bases in ((project_right, spaces(IN)), (project_left, spaces(OUT))):
        for one, other in zip(*(project(stack, bases) for stack in layouts), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("buckets", [128, 300, OUT])
def test_folding_does_not_depend_on_the_layout(buckets, layouts, monkeypatch):
    monkeypatch.setattr("detune.problem.stack.BLOCK_ENTRIES", 64 * IN)
    one, other = (_fold(stack, buckets, seed=0) for stack in layouts)
    assert one.shape[1] >= buckets
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_the_last_step_does_not_depend_on_the_layout(layouts):
    V = spaces(IN)
    deltas = [LowRank(normal(seeded(9 + i), OUT, r), V_i) for i, (r, V_i) in enumerate(zip(RANKS, V, strict=True))]
    for solve in (lambda stack: w_step_given_rows(stack, V), lambda stack: w_step(stack, deltas)):
        one, other = (solve(stack) for stack in layouts)
        torch.testing.assert_close(one.weight, other.weight, rtol=0, atol=1e-12)
        assert one.relative_residual == pytest.approx(other.relative_residual, rel=1e-12)
        for M_i, M_j in zip(one.deltas, other.deltas, strict=True):
            torch.testing.assert_close(M_i.dense(), M_j.dense(), rtol=0, atol=1e-12)
        if one.residuals is None or other.residuals is None:
            assert one.residuals is other.residuals
            continue
        assert one.residuals.transposed == other.residuals.transposed
        assert one.residuals.energy == pytest.approx(other.residuals.energy, rel=1e-12)
        for product_i, product_j in zip(one.residuals.products, other.residuals.products, strict=True):
            torch.testing.assert_close(product_i, product_j, rtol=0, atol=1e-11)


def test_a_fit_for_given_columns_is_that_of_the_transposed_stack(layouts):
    """By hand: `[G_i] (I - blocks(U_i^T U_j) / n) = [(W_i - mean)^T U_i]`, and the average of what that leaves."""
    stack, U = layouts[0], spaces(OUT)
    step = w_step_given_rows(stack.transposed, U).transposed
    W = torch.stack(stack.matrices)
    joint = torch.cat(U, dim=1)
    projected = torch.cat([(W_i - W.mean(dim=0)).mT @ U_i for W_i, U_i in zip(W, U, strict=True)], dim=1)
    G = torch.linalg.solve(torch.eye(joint.shape[1]).double() - joint.mT @ joint / N, projected, left=False)
    deltas = [U_i @ G_i.mT for U_i, G_i in zip(U, torch.split(G, RANKS, dim=1), strict=True)]
    torch.testing.assert_close(step.weight, (W - torch.stack(deltas)).mean(dim=0), rtol=0, atol=1e-12)
    assert step.residuals is not None
    assert step.residuals.transposed
    for M_i, e_i, products in zip(
        step.deltas, W - step.weight - torch.stack(deltas), step.residuals.products, strict=True
    ):
        torch.testing.assert_close(products, M_i.right.mT @ e_i.mT, rtol=0, atol=1e-11)
