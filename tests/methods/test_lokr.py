"""Kronecker products, and the order of entries in which they have rank 1."""

import pytest
import torch

from detune.methods.lokr import LoKr, Rearranged, arrange_back, as_solved, rearrange
from detune.problem import NotRecoverable, Stack
from tests.cases import REGIMES, make_problem, normal, seeded


def test_a_rearranged_product_is_the_outer_product_of_its_factors():
    generator = seeded()
    w1, w2 = normal(generator, 3, 4), normal(generator, 5, 2)
    arranged = rearrange(torch.kron(w1, w2), (3, 4))
    assert arranged.equal(torch.outer(w1.flatten(), w2.flatten()))


@pytest.mark.parametrize("blocks", [(1, 1), (3, 4), (15, 8), (15, 1), (1, 8)])
def test_arranging_back_is_the_inverse(blocks):
    matrix = normal(seeded(), 15, 8)
    assert arrange_back(rearrange(matrix, blocks), blocks, (15, 8)).equal(matrix)


def test_blocks_of_one_row_change_nothing():
    matrix = normal(seeded(), 15, 8)
    assert rearrange(matrix, (15, 1)).equal(matrix)


def test_the_shape_is_found_and_the_problem_can_be_had_as_it_was_solved():
    problem = make_problem(REGIMES["Kronecker products"], seeded())
    stack = Stack.of(problem.stack)
    recovery = LoKr().solve(stack)
    assert all(isinstance(M_i, Rearranged) and M_i.blocks == (6, 5) for M_i in recovery.deltas)
    for M_i, expected in zip(recovery.deltas, problem.deltas, strict=True):
        torch.testing.assert_close(M_i.dense(), expected)
    arranged, solved = as_solved(stack, recovery)
    assert arranged.shape == (30, 144)
    assert solved.weight.equal(rearrange(recovery.weight, (6, 5)))
    assert solved.ranks == (1, 1, 1)


def test_a_shape_that_is_told_is_the_only_one_that_is_tried():
    stack = Stack.of(make_problem(REGIMES["Kronecker products"], seeded()).stack)
    with pytest.raises(NotRecoverable, match=r"models 0 and 1 differ at full rank in a 24x180 matrix"):
        LoKr(blocks=(4, 6)).solve(stack)


def test_one_row_a_block_is_loras_problem():
    stack = Stack.of(make_problem(REGIMES["plain"], seeded()).stack)
    recovery = LoKr(blocks=(72, 1)).solve(stack)
    assert recovery.ranks == (4, 4, 4)
    assert as_solved(stack, recovery) is None
