"""The fit that never gets worse."""

import pytest
import torch

from detune.fitting.descent import Fit, centred, damped_gauss_newton, descend
from detune.problem import Stack
from detune.problem.low_rank import LowRank
from tests.cases import Regime, make_problem, normal, seeded


def bases(ranks, columns, seed=0):
    generator = seeded(seed)
    return [torch.linalg.qr(normal(generator, columns, r))[0] for r in ranks]


def test_centred_models_sum_to_zero():
    stack = make_problem(Regime(dtype=torch.float32), seeded()).stack
    differences = centred(Stack.of(stack))
    torch.testing.assert_close(differences.sum(dim=0), torch.zeros(72, 60, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(differences[1] - differences[0], stack[1].double() - stack[0].double())


def test_the_misfit_is_that_of_the_best_base():
    problem = make_problem(Regime(), seeded())
    deltas = [LowRank(M_i[:, :2], torch.eye(60, dtype=torch.float64)[:, :2]) for M_i in problem.deltas]
    fit = Fit.of(centred(Stack.of(problem.stack)), deltas)
    left = problem.stack - torch.stack([M_i.dense() for M_i in deltas])
    assert fit.misfit == pytest.approx(float((left - left.mean(dim=0)).square().sum()))


@pytest.mark.parametrize("ranks", [(4, 4, 4), (3, 4, 5), (2, 2, 2), (6, 6, 6)])
def test_every_step_more_fits_better(ranks):
    """From random spaces, of the right ranks and of wrong ones."""
    differences = centred(Stack.of(make_problem(Regime(dtype=torch.float32), seeded()).stack))
    misfits = [descend(differences, bases(ranks, 60), 1e-8, 0.0, steps).misfit for steps in range(5)]
    assert misfits == sorted(misfits, reverse=True)
    assert misfits[-1] < 0.9 * misfits[0]


def test_reaches_the_noise_at_the_true_ranks():
    problem = make_problem(Regime(dtype=torch.float32), seeded())
    stack = Stack.of(problem.stack)
    V = [torch.linalg.svd(M_i)[2][:4].mT for M_i in problem.deltas]
    moved = [torch.linalg.qr(V_i + 0.05 * normal(seeded(i), *V_i.shape))[0] for i, V_i in enumerate(V)]
    deltas = damped_gauss_newton(stack, moved)
    fit = Fit.of(centred(stack), deltas)
    degrees = 2 * 72 * 60 - sum(4 * (72 + 60 - 4) for _ in range(3))
    assert fit.misfit == pytest.approx(float(stack.noise.square().mean()) * degrees, rel=0.1)
