"""One model's adapter against a base that is known."""

import pytest
import torch
from torch import Tensor

from detune.adapters.fit import fit_adapter
from detune.numerics.float_grid import spacing
from detune.problem import LowRank, NonFinite, NotLowRank
from tests.cases import normal, rms, seeded

SHAPE = (160, 96)


def problem(
    dtype: torch.dtype, ulps: float, rank: int = 4, shape: tuple[int, int] = SHAPE
) -> tuple[Tensor, Tensor, Tensor]:
    """`W`, `W_i = round(W + M)`, and M whose root mean square is given in units in the last place of W."""
    generator = seeded(5)
    W = normal(generator, *shape).to(dtype)
    M = normal(generator, shape[0], rank) @ normal(generator, rank, shape[1])
    M *= ulps * rms(spacing(W, dtype)) / rms(M)
    return W, (W.double() + M).to(dtype), M


def identical(W: Tensor, W_i: Tensor, M: Tensor) -> float:
    return float(((W.double() + M).to(W_i.dtype) == W_i).double().mean())


def least_squares(W: Tensor, W_i: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(W_i.double() - W.double(), full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


@pytest.mark.parametrize("shape", [SHAPE, SHAPE[::-1]], ids=["tall", "wide"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_rank_is_found_and_the_intervals_are_met(dtype, shape):
    """Least squares leaves a part of the entries on the wrong side of a tie; the intervals win most of them back."""
    W, W_i, M = problem(dtype, ulps=20, shape=shape)
    fit = fit_adapter(W, W_i)
    assert fit.rank == 4
    squares = identical(W, W_i, least_squares(W, W_i, 4))
    found = identical(W, W_i, fit.dense().double())
    assert squares < 0.93
    assert 1 - found < (1 - squares) / 3
    # And so M itself is closer to the truth.
    assert rms(fit.dense().double() - M) < 0.8 * rms(least_squares(W, W_i, 4) - M)


def test_factors_have_equal_columns():
    W, W_i, _ = problem(torch.float32, ulps=1e4)
    fit = fit_adapter(W, W_i)
    left, right = fit.left.norm(dim=0), fit.right.norm(dim=0)
    torch.testing.assert_close(left, right)
    assert left.tolist() == sorted(left.tolist(), reverse=True)


@pytest.mark.parametrize("rank", [1, 3, 4, 9])
def test_a_told_rank_is_the_most(rank):
    W, W_i, _ = problem(torch.float32, ulps=1e4)
    assert fit_adapter(W, W_i, rank).rank == min(rank, 4)


def test_storage_noise_alone_has_no_rank():
    W = normal(seeded(1), *SHAPE)
    noisy = (W + 1e-9 * W).bfloat16()
    assert fit_adapter(W.float(), noisy).rank == 0
    fit = fit_adapter(W.float(), W.float())
    assert (fit.left.shape, fit.right.shape) == ((160, 0), (96, 0))


def test_a_base_off_by_its_own_rounding_adds_no_rank():
    """As a recovered base is: W is real, and was rounded apart from `W + M`."""
    _, _, M = problem(torch.bfloat16, ulps=20)
    W = normal(seeded(5), *SHAPE)
    assert fit_adapter(W.bfloat16(), (W + M).bfloat16()).rank == 4


def test_another_matrix_is_refused():
    with pytest.raises(NotLowRank, match="differ at full rank in a 160x96 matrix"):
        fit_adapter(normal(seeded(1), *SHAPE), normal(seeded(2), *SHAPE))


@pytest.mark.parametrize("model", [0, 1])
def test_nan_is_refused(model):
    pair = [normal(seeded(1), *SHAPE), normal(seeded(1), *SHAPE)]
    pair[model][3, 5] = float("nan")
    with pytest.raises(NonFinite, match=f"matrix {model} holds NaN") as caught:
        fit_adapter(*pair)
    assert caught.value.model == model


def test_the_answer_is_low_rank_factors():
    W, W_i, _ = problem(torch.bfloat16, ulps=3)
    fit = fit_adapter(W, W_i)
    assert isinstance(fit, LowRank)
    assert fit.left.dtype is fit.right.dtype
