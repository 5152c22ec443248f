"""The result type."""

import pytest
import torch

from detune.problem import NotLowRank, Recovery, Stack
from detune.problem.low_rank import LowRank
from detune.problem.recovery import PredictedError, left_alone
from tests.cases import normal, seeded


def test_an_answer_scales_with_its_deltas_and_keeps_its_errors_as_exponents():
    generator = seeded()
    M_i = LowRank(normal(generator, 6, 2), normal(generator, 5, 2))
    found = Recovery(normal(generator, 6, 5), "mean", "", (M_i,), (2,), expected=PredictedError(1e-300, 1e-301, 1e-299))
    small = found.times_power_of_two(-600)
    assert small.weight.equal(found.weight * 2.0**-600)
    torch.testing.assert_close(small.deltas[0].dense() * 2.0**600, M_i.dense())
    # As a number it would be zero.
    assert small.expected.mse == 1e-300
    assert small.mse_exponent == -1200
    assert found.times_power_of_two(3).with_plain_errors().expected.mse == pytest.approx(64e-300)
    assert found.times_power_of_two(0) is found
    assert found.with_plain_errors() is found


def test_a_model_that_left_its_matrix_alone_is_copied():
    matrices = [normal(seeded(i), 4, 3) for i in range(2)]
    found = left_alone(Stack.of(matrices), 1, "a sign")
    assert found.weight.equal(matrices[1])
    assert found.weight.data_ptr() != matrices[1].data_ptr()
    assert (found.method, found.noise_ratio, found.left_alone) == ("unchanged", 0.0, True)
    assert found.reason == "a sign: taken to have left it as the base has it"


@pytest.mark.parametrize(("shape", "most"), [((40, 30), 30), ((4096, 4096), 1024)])
def test_full_rank_names_the_models_and_the_rank(shape, most):
    error = NotLowRank(((0, 2), (1, 2)), shape)
    assert str(error).startswith(f"models 0 and 2 differ at full rank in a {shape[0]}x{shape[1]} matrix")
    assert f"add up to {most} or more" in str(error)
    assert error.pairs == ((0, 2), (1, 2))
