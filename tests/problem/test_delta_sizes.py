"""Sizes of deltas, and which are independent, before any is known."""

from itertools import permutations

import pytest
import torch

from detune.problem import Stack
from detune.problem.delta_sizes import beside_rounding, delta_scales, independent_models, scatter
from tests.cases import normal, rms, seeded
from tests.lattice.problems import LatticeProblem


@pytest.mark.parametrize(
    ("n", "delta", "merge"),
    [
        (2, 0.3, torch.float32),
        (3, 0.3, torch.bfloat16),
        (3, 10.0, torch.bfloat16),
        (5, 1.0, torch.float16),
        (3, 0.01, torch.float32),
    ],
    ids=str,
)
def test_sizes_are_right_within_a_tenth(n, delta, merge):
    problem = LatticeProblem((512, 384), n=n, delta=delta, merge=merge)
    scales = delta_scales(problem.stack)
    sizes = [rms(M_i) for M_i in problem.deltas]
    if n == 2:
        # Their difference shows the mean alone.
        sizes = [(sum(size**2 for size in sizes) / 2) ** 0.5] * 2
    for scale, size in zip(scales, sizes, strict=True):
        assert scale.rms == pytest.approx(size, rel=0.1)
        assert scale.at_most > size


def test_a_model_without_a_delta_is_taken_for_a_small_one():
    problem = LatticeProblem((256, 192), n=3, delta=2.0, merge=torch.bfloat16)
    first, _, last = problem.stack.matrices
    sizes = delta_scales(Stack.of([first, problem.W.bfloat16(), last]))
    assert 0 < sizes[1].rms < 0.2 * sizes[0].rms
    assert sizes[1].at_most < 0.4 * sizes[0].rms


@pytest.mark.parametrize("delta", [0.02, 0.1, 0.3])
def test_scatter_about_the_grid_is_a_single_models_size(delta):
    """Entries of a delta of many directions are nearly normal."""
    problem = LatticeProblem((256, 192), rank=32, n=1, delta=delta)
    found = scatter(problem.stack.matrices[0], torch.bfloat16)
    assert found.rms == pytest.approx(rms(problem.deltas[0]), rel=0.1)


SHAPE = (192, 160)
SETS = {
    "independent": lambda a, b, c, d: [a, b, c, d],
    "a copy at another strength": lambda a, b, c, d: [a, b, c, 0.7 * a],
    "a negated copy": lambda a, b, c, d: [a, b, c, -0.5 * a],
    "a later checkpoint": lambda a, b, c, d: [a, b, c, c + 0.3 * d],
    "a merge of two": lambda a, b, c, d: [a, b, c, (a + b) / 2],
    "another on half of one": lambda a, b, c, d: [a, b, c, a / 2 + 0.5 * d],
    "two copies": lambda a, b, c, d: [a, b, c, d, 0.5 * a, 0.6 * b],
    "two merges": lambda a, b, c, d: [a, b, c, (a + b) / 2, (b + c) / 2],
}
# Of two that are alike the one with the larger delta stays.
LEFT_OUT = {"independent": (), "a later checkpoint": (2,), "two copies": (4, 5), "two merges": (3, 4)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [0.3, 3.0])
@pytest.mark.parametrize("kind", SETS)
def test_independent_models_leave_out_what_others_hold(kind, size, dtype):
    """In units in the last place of bf16; in any order of the models."""
    generator = seeded(0)
    W = (normal(generator, *SHAPE) / 20).bfloat16().double()
    ulp = 2.0**-5 / 2**8
    deltas = [normal(generator, SHAPE[0], 8) @ normal(generator, 8, SHAPE[1]) for _ in range(4)]
    deltas = SETS[kind](*(size * ulp * M_i / rms(M_i) for M_i in deltas))
    left_out = LEFT_OUT.get(kind, (3,))
    for order in list(permutations(range(len(deltas))))[::7]:
        models = independent_models(Stack.of([(W + deltas[i]).to(dtype) for i in order]))
        assert {order[i] for i in models} == set(range(len(deltas))) - set(left_out)


@pytest.mark.parametrize("strength", [1.0, 3.0])
@pytest.mark.parametrize("size", [(1, 1, 1, 1, 1), (3, 3, 1, 1, 1), (1, 1, 3, 3, 3)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_two_fine_tunes_of_one_fine_tune_are_not_the_most(size, strength, seed):
    """From that one as the base both are independent of another, and all others are alike."""
    generator = seeded(seed)
    W = (normal(generator, *SHAPE) / 20).bfloat16().double()
    deltas = [normal(generator, SHAPE[0], 8) @ normal(generator, 8, SHAPE[1]) for _ in range(6)]
    first, *others = (2.0**-12 * M_i / rms(M_i) for M_i in deltas)
    of_one = [
        strength * max(size) * first * (i < 2) + s * M_i for i, (s, M_i) in enumerate(zip(size, others, strict=True))
    ]
    found = independent_models(Stack.of([(W + M_i).bfloat16() for M_i in of_one]))
    assert {2, 3, 4} < set(found)
    assert len(found) == 4


def test_a_model_without_a_delta_is_like_none():
    """Deltas that have a tenth in common, as those of one language have."""
    generator = seeded(0)
    W = (normal(generator, *SHAPE) / 20).bfloat16().double()
    common, *deltas = (normal(generator, SHAPE[0], 8) @ normal(generator, 8, SHAPE[1]) for _ in range(4))
    deltas = [2.0**-13 * (0.3 * common + M_i) / rms(M_i) for M_i in deltas]
    assert independent_models(Stack.of([W.bfloat16(), *((W + M_i).bfloat16() for M_i in deltas)])) == (0, 1, 2, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_rows_of_zeros_say_nothing(dtype):
    generator = seeded(0)
    W = (normal(generator, *SHAPE) / 20).to(dtype).double()
    deltas = [2.0**-10 * normal(generator, SHAPE[0], 4) @ normal(generator, 4, SHAPE[1]) for _ in range(3)]
    models = [W + M_i for M_i in (*deltas, 0.7 * deltas[0])]
    for W_i in models:
        W_i[:12] = 0
    stack = Stack.of([W_i.to(dtype) for W_i in models])
    assert independent_models(stack) == (0, 1, 2)
    assert all(scale.rms > 0 for scale in delta_scales(stack))


def test_pairs_of_copies_go_at_once():
    generator = seeded(0)
    W = normal(generator, *SHAPE) / 20
    deltas = [normal(generator, SHAPE[0], 2) @ normal(generator, 2, SHAPE[1]) for _ in range(16)]
    models = [W + size * 1e-3 * M_i for M_i in deltas for size in (1.0, 0.6)]
    assert independent_models(Stack.of(models)) == tuple(range(0, 32, 2))


def test_three_models_are_taken_as_they_are():
    W = normal(seeded(0), 32, 24)
    assert independent_models(Stack.of([W, W + 0.1, W + 0.2])) == (0, 1, 2)


def test_what_is_beside_rounding_shows_where_steps_are_fine():
    generator = seeded(0)
    W = (normal(generator, 256, 192) / 20).bfloat16()
    M = 2e-5 * normal(generator, 256, 192)
    W_i = (W.double() + M).bfloat16()
    assert beside_rounding(W_i.double() - W.double(), W_i) == pytest.approx(rms(M) ** 2, rel=0.2)
    assert beside_rounding(torch.zeros(256, 192), W_i) == 0


def test_many_models_of_two_kinds_are_sorted_out_at_once():
    """Fifteen independent ones, and fifteen that have one delta in common: of these one stays."""
    generator = seeded(5)
    W = normal(generator, 96, 80)
    deltas = [0.01 * normal(generator, 96, 3) @ normal(generator, 3, 80) for _ in range(30)]
    shared = 0.02 * normal(generator, 96, 3) @ normal(generator, 3, 80)
    models = [W + M_i + shared * (i % 2) for i, M_i in enumerate(deltas)]
    found = independent_models(Stack.of(models))
    assert set(range(0, 30, 2)) < set(found)
    assert len(found) == 16
