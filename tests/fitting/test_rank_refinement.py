"""Ranks that pairs of models hide and all models together show."""

import math

import pytest
import torch

from detune.fitting.differences import find_differences
from detune.fitting.rank_refinement import drawn_spectrum, refine_ranks, weakest_directions
from detune.fitting.subspaces import find_spaces
from detune.problem import Stack
from tests.cases import Regime, make_problem, normal, orthogonal, seeded

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OVERLAPS = (0.0, 0.5, 0.9)


def uniform(generator, *shape):
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def merge(W, M, dtype, ratio=3.0):
    """`round(W + size M)` with M's smallest singular value, 1, at `ratio` times the norm of what rounding did."""
    size = 0.5 * ratio * float(W.abs().mean()) * torch.finfo(dtype).eps
    while True:
        W_i = (W + size * M).to(dtype)
        if size >= ratio * float(torch.linalg.matrix_norm(W_i.double() - W - size * M, 2)):
            return W_i
        size *= 1.03


def hard_set(seed, shape, n, most, overlap, dtype):
    """Models with mixed ranks, the weakest direction of each at three times the noise floor."""
    generator = seeded(seed)
    out, columns = shape
    W = (normal(generator, out, columns) / columns**0.5).to(dtype).double()
    shared = normal(generator, columns, most)
    ranks = tuple(int(r) for r in torch.randint(1, most + 1, (n,), generator=generator))
    models = []
    for r in ranks:
        A = overlap**0.5 * shared[:, :r] + (1 - overlap) ** 0.5 * normal(generator, columns, r)
        U, V = torch.linalg.qr(normal(generator, out, r))[0], torch.linalg.qr(A)[0]
        sigma = torch.exp(uniform(generator, r) * math.log(100))
        models.append(merge(W, (U * (sigma / sigma.min())) @ orthogonal(generator, r) @ V.mT, dtype))
    return Stack.of(models), ranks


def selected(stack, rank=None):
    spaces = refine_ranks(find_spaces(find_differences(stack)), rank)
    return tuple(V_i.shape[1] for V_i in spaces.bases)


@pytest.mark.parametrize("seed", range(30))
def test_ranks_are_exact_three_times_over_the_noise(seed):
    shape = [(80, 64), (64, 80), (72, 72)][seed % 4 % 3]
    stack, ranks = hard_set(seed, shape, 4 + seed % 2, 4, OVERLAPS[seed // 3 % 3], DTYPES[seed % 3])
    assert selected(stack) == ranks


def test_pairs_alone_miss_what_overlapping_rows_hide():
    """Else the test above would show nothing of the selection."""
    stack, ranks = hard_set(7, (80, 64), 5, 4, 0.9, torch.bfloat16)
    assert sum(find_differences(stack).ranks) < sum(ranks)
    assert selected(stack) == ranks


def test_a_pattern_of_rounding_is_no_direction():
    """Two steps of rank 2, nearly all of it of rank 1: rounding answers with a third direction, over the noise."""
    generator = seeded(3)
    shape, dtype = (192, 256), torch.float16
    W = (normal(generator, *shape) / shape[1] ** 0.5).to(dtype).double()
    step = float(W.abs().median()) * torch.finfo(dtype).eps

    def delta(size, r):
        return size * step / r**0.5 * normal(generator, shape[0], r) @ normal(generator, r, shape[1])

    U, V = (torch.linalg.qr(normal(generator, side, 2))[0] for side in shape)
    small = (U * torch.tensor([20.0, 1.0])) @ V.mT
    deltas = [small * (2 * step / small.square().mean().sqrt()), delta(10, 3), delta(12, 2)]
    stack = Stack.of([(W + M_i).to(dtype) for M_i in deltas])
    error = stack.matrices[0].double() - W - deltas[0]
    pattern = (error - U @ (U.mT @ error)) @ (torch.eye(shape[1]) - V @ V.mT)
    assert float(torch.linalg.matrix_norm(pattern, 2)) > 1.2 * float(drawn_spectrum(stack)[0])
    assert selected(stack) == (2, 3, 2)


def test_no_model_gets_more_than_the_rank_that_is_told():
    stack, ranks = hard_set(7, (80, 64), 5, 4, 0.9, torch.bfloat16)
    assert max(selected(stack, rank=max(ranks) - 1)) < max(ranks)


def test_ranks_do_not_depend_on_the_scale():
    """Powers of two change no rounding."""
    stack, ranks = hard_set(8, (72, 72), 4, 4, 0.5, torch.float32)
    assert selected(Stack.of([64 * W_i for W_i in stack.matrices])) == ranks


def test_float64_is_left_alone():
    """It is computed no more finely than it is stored."""
    spaces = find_spaces(find_differences(Stack.of(make_problem(Regime(ranks=(3, 4, 5)), seeded()).stack)))
    assert refine_ranks(spaces) is spaces


def test_models_of_different_precision_are_left_alone():
    problem = make_problem(Regime(ranks=(3, 4, 5), dtype=torch.float32, scale=0.3), seeded())
    stack = Stack.of([W_i.bfloat16() if i else W_i for i, W_i in enumerate(problem.stack)])
    spaces = find_spaces(find_differences(stack))
    assert refine_ranks(spaces) is spaces


def test_large_stacks_are_left_alone(monkeypatch):
    monkeypatch.setattr("detune.fitting.rank_refinement.SMALL_ENTRIES", 80 * 64 - 1)
    stack, _ = hard_set(7, (80, 64), 5, 4, 0.9, torch.bfloat16)
    spaces = find_spaces(find_differences(stack))
    assert refine_ranks(spaces) is spaces


def test_one_frozen_a_is_left_alone():
    """Lower ranks than the true ones fit it perfectly: a search would call it solved."""
    generator = seeded()
    W, A = torch.randn(96, 96, generator=generator), torch.randn(4, 96, generator=generator)
    stack = Stack.of([W + 0.01 * torch.randn(96, 4, generator=generator) @ A for _ in range(4)])
    spaces = find_spaces(find_differences(stack))
    assert refine_ranks(spaces) is spaces


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_drawn_noise_is_as_large_as_the_true(dtype):
    W = normal(seeded(5), 128, 96)
    stored = W.to(dtype)
    true = torch.linalg.svdvals(stored.double() - W)
    drawn = drawn_spectrum(Stack.of([stored] * 3))
    # Two draws of such a size differ by some percent.
    torch.testing.assert_close(drawn[:64], true[:64], rtol=0.08, atol=0)


def test_the_weakest_direction_costs_what_leaving_it_out_costs():
    """Wald's test against the least squares that it stands for: every row of W and every factor free."""
    generator = seeded()
    n, out, columns, r = 3, 20, 15, 2
    V = [torch.linalg.qr(normal(generator, columns, r))[0] for _ in range(n)]
    F = [normal(generator, out, r) for _ in range(n)]
    weakest = weakest_directions(V, F)
    data = torch.cat([F_i @ V_i.mT for F_i, V_i in zip(F, V, strict=True)], dim=1)  # (out, n * columns)
    for i in range(n):
        kept = [weakest[i].others(1) if j == i else V_j for j, V_j in enumerate(V)]
        design = torch.cat([torch.eye(columns, dtype=data.dtype).repeat(1, n), torch.block_diag(*[v.mT for v in kept])])
        left = data.mT - design.mT @ torch.linalg.lstsq(design.mT, data.mT, driver="gelsd").solution
        assert weakest[i].rise == pytest.approx(float(torch.linalg.matrix_norm(left, "fro")), rel=1e-6)
