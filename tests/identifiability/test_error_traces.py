import pytest
import torch

from detune.fitting.normal_operator import NormalOperator
from detune.identifiability.error_traces import cramer_rao_mse, error_traces
from tests.cases import Regime, make_problem, normal, seeded
from tests.fitting.test_gauss_newton import dense_operator, spaces


@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 3, 2, 2), (1, 0, 2)])
def test_equals_the_trace_of_the_dense_inverse(ranks):
    U, V = spaces(make_problem(Regime(shape=(13, 12), ranks=ranks), seeded()))
    expected = float(torch.linalg.inv(dense_operator(U, V)).trace()) / (13 * 12)
    assert cramer_rao_mse(U, V, 1.0, probes=400) == pytest.approx(expected, rel=0.02)


def test_is_the_average_where_nothing_was_changed():
    U = [torch.zeros(10, 0, dtype=torch.float64)] * 4
    V = [torch.zeros(8, 0, dtype=torch.float64)] * 4
    assert cramer_rao_mse(U, V, 1.0) == pytest.approx(1 / 4)


def test_grows_with_the_noise_and_falls_with_more_models():
    U, V = spaces(make_problem(Regime(shape=(40, 30), ranks=(3,) * 6), seeded()))
    few, many = cramer_rao_mse(U[:3], V[:3], 1.0), cramer_rao_mse(U, V, 1.0)
    assert 1 / 6 < many < few
    assert cramer_rao_mse(U, V, 2.0) == pytest.approx(2 * many)


def test_does_not_depend_on_the_choice_of_bases():
    U, V = spaces(make_problem(Regime(shape=(20, 18), ranks=(3, 3, 3)), seeded()))
    turned = [U_i @ torch.linalg.qr(normal(seeded(5), 3, 3))[0] for U_i in U]
    assert cramer_rao_mse(turned, V, 1.0, probes=200) == pytest.approx(cramer_rao_mse(U, V, 1.0, probes=200), rel=0.02)


def test_traces_are_those_of_an_average_where_nothing_was_changed():
    """Models that differ by rounding alone."""
    U, V = ([torch.zeros(size, 0, dtype=torch.float64)] * 4 for size in (10, 8))
    traces = error_traces(NormalOperator.of(U, V))
    torch.testing.assert_close(traces.weight, torch.full((4,), 80 / 16, dtype=torch.float64))
    torch.testing.assert_close(traces.residual, torch.full((4,), 80 * 3 / 4, dtype=torch.float64))
