"""The core's equations where they are large: solved in float32 first, and no worse for it."""

import math

import pytest
import torch

from detune.fitting import normal_operator
from detune.fitting.normal_operator import NormalOperator
from detune.identifiability.null_space import dense_core
from detune.numerics.linalg import orthonormal
from tests.cases import Regime, make_problem, normal, seeded
from tests.fitting.test_gauss_newton import spaces


def large_core(n: int, shared_rows: float = 0.0) -> NormalOperator:
    operator = NormalOperator.of(
        *spaces(make_problem(Regime(shape=(320, 300), ranks=(48,) * n, shared_rows=shared_rows), seeded()))
    )
    assert operator.Q.shape[1] * operator.P.shape[1] >= normal_operator.LARGE_CORE or n < 3
    return operator


def test_it_is_the_sum_over_models_where_sides_differ_in_width() -> None:
    """As where a direction that all share was taken off one side."""
    wide = [orthonormal(normal(seeded(i), 12, r)) for i, r in enumerate((3, 1, 2))]
    narrow = [orthonormal(normal(seeded(10 + i), 9, r)) for i, r in enumerate((1, 2, 2))]
    for operator in (NormalOperator.of(wide, narrow), NormalOperator.of(narrow, wide)):
        X = normal(seeded(1), operator.Q.shape[1], operator.P.shape[1])
        torch.testing.assert_close(operator.apply(X), (dense_core(operator) @ X.reshape(-1)).reshape(X.shape))


@pytest.mark.parametrize("shared_rows", [0.0, 0.9, 0.999])
@pytest.mark.parametrize("precision", [1e-3, 1e-10])
def test_what_is_left_is_no_more_than_asked_for(shared_rows: float, precision: float) -> None:
    operator = large_core(3, shared_rows)
    rhs = normal(seeded(1), operator.Q.shape[1], operator.P.shape[1])
    X = operator.solve(rhs, precision * float(rhs.norm()))
    assert float((rhs - operator.apply(X)).norm()) <= precision * float(rhs.norm()) * (1 + 1e-6)


def test_most_steps_are_taken_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = large_core(3)
    rhs = normal(seeded(1), operator.Q.shape[1], operator.P.shape[1])
    steps = {torch.float32: 0, torch.float64: 0}
    apply = NormalOperator.apply

    def count(self: NormalOperator, X: torch.Tensor) -> torch.Tensor:
        steps[X.dtype] += 1
        return apply(self, X)

    monkeypatch.setattr(NormalOperator, "apply", count)
    operator.solve(rhs, 1e-4 * float(rhs.norm()))
    assert steps[torch.float32] > steps[torch.float64] == 1


def test_a_null_space_leaves_what_it_leaves_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models, whose core is small; any core is taken for large."""
    operator = large_core(2)
    rhs = normal(seeded(1), operator.Q.shape[1], operator.P.shape[1])

    def left(large: float) -> float:
        monkeypatch.setattr(normal_operator, "LARGE_CORE", large)
        return float((rhs - operator.apply(operator.solve(rhs))).norm())

    assert left(0) == pytest.approx(left(math.inf), rel=1e-9)
    assert left(0) > 0.1 * float(rhs.norm())
