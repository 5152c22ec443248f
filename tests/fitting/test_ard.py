"""Deltas that least squares blew up where they nearly coincide are brought back, and no others."""

import pytest
import torch

from detune.certificate.certify import certify
from detune.fitting.ard import fit_ard, shrink_where_run_off
from detune.fitting.least_squares import w_step
from detune.methods import Auto, Mean
from detune.metrics import w_error
from detune.problem import Recovery, Stack
from detune.problem.low_rank import LowRank
from tests.cases import REGIMES, make_problem, normal, seeded

SHAPE, RANK, N = (96, 80), 3, 4


def one_seed(apart: float):
    """A bf16 base, deltas with orthonormal right factors that are so far apart, and the merges."""
    generator = seeded(7)
    out, columns = SHAPE
    W = (normal(generator, out, columns) / columns**0.5).bfloat16().double()
    shared = torch.linalg.qr(normal(generator, columns, RANK))[0]
    right = [torch.linalg.qr(shared + apart * normal(generator, columns, RANK))[0] for _ in range(N)]
    deltas = [LowRank(0.002 * normal(generator, out, RANK), R) for R in right]
    return W, deltas, [(W + M_i.dense()).bfloat16() for M_i in deltas]


def answer(stack: Stack, deltas: list[LowRank]) -> Recovery:
    step = w_step(stack, deltas)
    ranks = tuple(M_i.rank for M_i in deltas)
    return Recovery(step.weight, "intersect", "given", step.deltas, ranks, step.relative_residual, step.noise_ratio)


def test_a_part_that_all_share_is_no_larger_than_it_shows():
    W, deltas, models = one_seed(1e-5)
    stack = Stack.of(models)
    blown_up = normal(seeded(8), SHAPE[0], 1)
    run_off = answer(stack, [LowRank(M_i.left + blown_up @ M_i.right[:1], M_i.right) for M_i in deltas])
    assert run_off.noise_ratio is not None
    assert run_off.noise_ratio < 1.05
    held = shrink_where_run_off(stack, run_off)
    assert held.method == "intersect+relevance"
    assert held.noise_ratio is not None
    assert held.noise_ratio < 1.05
    assert w_error(held.weight, W) < w_error(run_off.weight, W) - 1


def test_sizes_are_about_right_from_the_first_turns_on():
    """Where least squares knows the least of the shared part, turns that start from it come back too slowly."""
    W, deltas, models = one_seed(1e-4)
    split = fit_ard(Stack.of(models), [M_i.right for M_i in deltas], turns=2)
    true = sum(M_i.energy for M_i in deltas)
    assert true / 1.5 < sum(M_i.energy for M_i in split.deltas) < 1.5 * true
    assert w_error(split.weight, W) < -7


def test_deltas_that_have_not_run_off_stay():
    _, deltas, models = one_seed(0.3)
    stack = Stack.of(models)
    right = answer(stack, deltas)
    assert shrink_where_run_off(stack, right) is right


def test_deltas_that_are_clear_of_the_noise_are_not_looked_at(monkeypatch):
    monkeypatch.setattr("detune.fitting.ard.fit_ard", None)
    stack = Stack.of(make_problem(REGIMES["tall"], seeded()).stack)
    found = Auto(lattice=None).solve(stack)
    assert shrink_where_run_off(stack, found) is found


def noisy(seed: int, size: float, shared: float, turned: bool = False, n: int = 3) -> tuple[torch.Tensor, Stack]:
    """A base, and models with noise that is told, and deltas with like rows, larger by a factor."""
    generator = seeded(seed)
    out, columns, rank, noise = 192, 160, 6, 1e-3
    W = 0.05 * normal(generator, out, columns)
    common = normal(generator, rank, columns)
    models = []
    for _ in range(n):
        A = shared * common + (1 - shared**2) ** 0.5 * normal(generator, rank, columns)
        M = normal(generator, out, rank) @ A
        models.append(W + M * (size * noise / M.square().mean().sqrt()) + noise * normal(generator, out, columns))
    if turned:
        W, models = W.mT.contiguous(), [W_i.mT.contiguous() for W_i in models]
    return W, Stack.of(models, noise=[noise] * n)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("size", "shared", "gain"), [(2, 0.0, 0.55), (3, 0.8, 0.5), (3, 0.95, 0.15), (40, 0.9, 2.0)])
def test_deltas_near_told_noise_are_split_off(size, shared, gain, turned):
    W, stack = noisy(1, size, shared, turned)
    found = Auto().solve(stack)
    assert w_error(found.weight, W) < w_error(Mean().solve(stack).weight, W) - gain


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("size", "shared"), [(0.5, 0.0), (0.7, 0.9), (1.0, 0.97), (1.5, 0.99), (2.0, 0.995)])
def test_the_answer_is_no_worse_than_the_mean_and_as_far_off_as_said(seed, size, shared):
    W, stack = noisy(seed, size, shared)
    found = Auto().solve(stack)
    error = w_error(found.weight, W)
    assert error < w_error(Mean().solve(stack).weight, W) + 0.02
    assert found.expected is not None
    assert found.expected.least < 10**error < found.expected.most


def test_what_adapters_have_in_common_stays_in_the_mean_where_it_does_not_show():
    _, stack = noisy(2, 1.0, 1.0)
    found = Auto().solve(stack)
    assert torch.equal(found.weight, Mean().solve(stack).weight)
    assert "stays in the mean of the models" in found.reason
    assert all(found.ranks)


def test_parts_of_the_models_are_asked_too():
    W, stack = noisy(4, 2.0, 0.8, n=5)
    found = Auto().solve(stack)
    assert certify(stack, found).agreement is None
    checked = certify(stack, found, check=Auto().solve)
    assert checked.agreement == pytest.approx(w_error(found.weight, W), abs=0.3)
    assert checked.best_w_error < w_error(found.weight, W) < checked.worst_w_error


def test_a_coarse_model_beside_fine_ones_has_no_directions_of_noise():
    W_star = normal(seeded(40), 96, 64)
    noises = [0.01, 0.1, 0.01]
    models = [W_star + noise * normal(seeded(41 + i), 96, 64) for i, noise in enumerate(noises)]
    assert [M_i.rank for M_i in fit_ard(Stack.of(models, noise=noises)).deltas] == [0, 0, 0]
