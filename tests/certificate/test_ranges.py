"""The range that a W-Error is said to be in, against the truth."""

import math
import random
from dataclasses import replace

import pytest
import torch

from detune.certificate.certify import Certificate, Verdict, certify
from detune.methods import Auto
from detune.metrics import w_error
from detune.problem import Recovery, Stack
from detune.problem.storage_noise import EXCESS_VARIANCE, storage_variance
from tests.cases import Problem, Regime, make_problem, normal, seeded

SOLVER = Auto(lattice=None)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def holds(certificate: Certificate, true: float) -> bool:
    ends = (-math.inf if end is None else end for end in (certificate.best_w_error, certificate.worst_w_error))
    low, high = ends
    return low <= true <= high


def drawn(seed: int) -> Problem:
    """Adapters whose spectra run into the noise, or whose row spaces nearly coincide; half of the bases on a grid."""
    pick, dtype = random.Random(seed), DTYPES[seed % len(DTYPES)]
    noise = float(storage_variance(normal(seeded(), 1000).to(dtype)).mean().sqrt())
    regime = Regime(
        pick.choice([(48, 32), (32, 56)]),
        tuple(pick.randint(1, 6) for _ in range(pick.randint(3, 5))),
        pick.choice([2.0, 4.0, 7.0]),
        10 ** pick.uniform(0.8, 3) * noise,
        pick.choice([0.5, 0.97, 0.99]),
        dtype,
    )
    given = make_problem(regime, seeded(seed))
    if pick.random() < 0.5:
        return given
    W_star = given.W_star.to(dtype).double()
    return Problem(W_star, given.deltas, torch.stack([W_star + M_i for M_i in given.deltas]).to(dtype))


def test_hold_the_truth():
    """In random problems whose prediction may be wrong; the benchmark has hundreds, of all kinds."""
    inside, near, widths = [], [], []
    for seed in range(44):
        given = drawn(seed)
        stack = Stack.of(given.stack)
        recovery = SOLVER.solve(stack)
        found = certify(stack, recovery, stored=given.stack.dtype)
        if found.verdict is Verdict.APPROXIMATE and found.predicted_w_error is not None:
            true = w_error(recovery.weight.to(given.stack.dtype), given.W_star)
            inside.append(holds(found, true))
            near.append(abs(found.predicted_w_error - true) <= 0.3)
            if found.best_w_error is not None:
                widths.append(found.worst_w_error - found.best_w_error)
    assert len(inside) >= 20
    # Two may be outside by chance.
    assert sum(inside) >= 0.9 * len(inside)
    # The prediction alone would not do, and ranges that hold anything say nothing.
    assert sum(near) < 0.9 * len(near)
    assert sorted(widths)[len(widths) // 2] < 3.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_least_squares_on_a_coarse_grid_is_not_foreseen_to_the_bit(dtype):
    """The mean of the rounding errors alone would bring every entry back; a little more than that does not."""
    noise = float(storage_variance(normal(seeded(), 1000).to(dtype)).mean().sqrt())
    held = []
    for seed in range(1, 9):
        given = make_problem(Regime((128, 96), (1,) * 4, 0.0, 5 * noise, 0.5, dtype), seeded(seed))
        W_star = given.W_star.to(dtype).double()
        stack = Stack.of(torch.stack([W_star + M_i for M_i in given.deltas]).to(dtype))
        recovery = SOLVER.solve(stack)
        found = certify(stack, recovery, stored=dtype)
        held.append(holds(found, w_error(recovery.weight.to(dtype), W_star)))
    # Ranges are to miss one problem in twenty.
    assert sum(held) >= 7


def test_more_than_storage_noise_is_a_doubt_where_spectra_run_into_it():
    """Elsewhere it is noise of another kind: PEFT rounds deltas to float32 before it adds them."""
    drawn = make_problem(Regime((80, 40), (4, 9, 9, 7, 4, 9, 2), 7.0, 1e-13, 0.97), seeded(7))
    stack = Stack.of(drawn.stack)
    found = certify(stack, SOLVER.solve(stack))
    assert found.verdict is Verdict.APPROXIMATE
    assert "more is left than storage noise" in found.reason
    given = make_problem(Regime((80, 40), (3,) * 5, 0.0, 1.0, 0.0, torch.float32), seeded(2))
    W_star = given.W_star.float()
    stack = Stack.of(torch.stack([W_star + M_i.float() for M_i in given.deltas]))
    recovery = SOLVER.solve(stack)
    assert recovery.noise_ratio > EXCESS_VARIANCE**0.5
    found = certify(stack, recovery, stored=torch.float32)
    assert found.verdict is Verdict.FLOOR
    assert holds(found, w_error(recovery.weight.float(), W_star.double()))


def test_a_prediction_without_doubt_has_one_of_its_own():
    given = make_problem(Regime(scale=1e-4, dtype=torch.float32), seeded())
    stack = Stack.of(given.stack)
    found = certify(stack, SOLVER.solve(stack))
    assert found.verdict is Verdict.FLOOR
    assert found.best_w_error == pytest.approx(found.predicted_w_error - 0.3)
    assert found.worst_w_error == pytest.approx(found.predicted_w_error + 0.3)


def test_ends_far_enough_where_the_solver_stopped_short():
    given = make_problem(Regime(scale=1e-4, dtype=torch.float32), seeded())
    stack = Stack.of(given.stack)
    recovery = SOLVER.solve(stack)
    moved = replace(recovery, weight=recovery.weight + 1e-3 * normal(seeded(3), *recovery.weight.shape))
    found = certify(stack, moved)
    assert found.verdict is Verdict.APPROXIMATE
    assert holds(found, w_error(moved.weight, given.W_star))


def test_reach_as_far_as_parts_disagree():
    given = make_problem(Regime(ranks=(3,) * 6, scale=1e-4, dtype=torch.float32), seeded())
    stack = Stack.of(given.stack)
    recovery = SOLVER.solve(stack)

    def worse(part: Stack) -> Recovery:
        found = SOLVER.solve(part)
        return replace(found, weight=found.weight + 1e-4 * torch.equal(part.matrices[0], stack.matrices[0]))

    found = certify(stack, recovery, check=worse)
    assert found.verdict is Verdict.APPROXIMATE
    assert "disagree" in found.reason
    assert found.worst_w_error >= found.agreement > found.predicted_w_error + 0.3
