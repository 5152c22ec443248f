"""What storing does to the error, against doing it."""

import pytest
import torch

from detune.certificate.stored_error import StoredError, quantised_error, stored_error
from detune.fitting.normal_operator import NormalOperator
from detune.problem import LowRank, Recovery
from detune.problem.storage_noise import storage_energy
from tests.cases import Regime, make_problem, normal, rms, seeded
from tests.fitting.test_gauss_newton import spaces

N = 4


def answer(on_grid: bool, share: float) -> tuple[Recovery, NormalOperator, torch.Tensor, float]:
    """An answer with an error of known size: mean rounding errors, and normal ones of a share of their variance."""
    problem = make_problem(Regime(shape=(200, 160), ranks=(2,) * N, scale=1.0), seeded())
    W = problem.W_star.bfloat16().double() if on_grid else problem.W_star
    generator = seeded(1)
    stored = torch.stack([(W + M_i).bfloat16().double() - (W + M_i) for M_i in problem.deltas])
    averaged = rms(stored.mean(dim=0)) ** 2
    error = stored.mean(dim=0) + share**0.5 * averaged**0.5 * normal(generator, *W.shape)
    U, V = spaces(problem)
    deltas = [LowRank(U_i @ (U_i.mT @ M_i @ V_i), V_i) for M_i, U_i, V_i in zip(problem.deltas, U, V, strict=True)]
    recovery = Recovery(W + error, "test", "known", tuple(deltas))
    return recovery, NormalOperator.of(U, V), W, averaged


def rounded(
    recovery: Recovery, operator: NormalOperator, mse: float, averaged: float, stored: torch.dtype = torch.bfloat16
) -> StoredError:
    return stored_error(recovery, operator, [torch.bfloat16] * N, stored, mse, averaged)


@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("on_grid", [True, False])
def test_equals_what_rounding_does(on_grid, share):
    recovery, operator, W, averaged = answer(on_grid, share)
    predicted = rounded(recovery, operator, averaged * (1 + share), averaged).mse
    true = rms(recovery.weight.bfloat16().double() - W) ** 2
    assert predicted == pytest.approx(true, rel=0.35)


def test_a_base_off_the_grid_loses_by_rounding_and_one_on_it_gains():
    for on_grid in (True, False):
        recovery, operator, _, averaged = answer(on_grid, 0.3)
        predicted = rounded(recovery, operator, averaged * 1.3, averaged).mse
        assert (predicted < averaged) == on_grid


def test_a_finer_dtype_changes_nothing():
    recovery, operator, _, averaged = answer(False, 0.3)
    assert rounded(recovery, operator, averaged, averaged, torch.float32) == StoredError(averaged, 1.0)


def test_a_smaller_error_is_undone_more_often():
    """On the grid the error that is left falls faster than the error before; off it, rounding adds the same to both."""
    on, operator, _, averaged = answer(True, 1.0)
    assert rounded(on, operator, averaged * 2, averaged).slope > 1.3
    off, operator, _, averaged = answer(False, 1.0)
    assert rounded(off, operator, averaged * 2, averaged).slope < 0.6


def test_no_grid_undoes_what_levels_of_their_own_rounded_off():
    recovery, _, _, averaged = answer(True, 0.3)
    added = storage_energy(recovery.weight.bfloat16()) / recovery.weight.numel()
    assert quantised_error(recovery, torch.bfloat16, averaged) == StoredError(averaged + added)
