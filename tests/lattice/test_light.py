"""Light fine-tunes: which models are too coarse for least squares, and which of them has the base's own bits."""

import torch

from detune.lattice import all_half, is_coarse
from detune.lattice.estimate import Estimate
from detune.lattice.fit import Sweeps
from detune.lattice.light import are_alike, left_alone_by_fit, left_alone_by_sizes
from detune.problem import LowRank, Stack
from detune.problem.delta_sizes import delta_scales
from tests.lattice.problems import LatticeProblem

SWEEPS = Sweeps(most=16, least_gain=0.97, patience=2, seed=0)


def test_deltas_that_all_miss_one_are_alike():
    """Beside a copy of itself at 0.7 a model may pass for the base: then the others are 0.3 a, b - 0.7 a, c - 0.7 a."""
    factors = LatticeProblem().factors
    a, b, c = (LowRank(L, R) for L, R in factors)
    less = [LowRank(torch.cat([L, -0.7 * a.left], dim=1), torch.cat([R, a.right], dim=1)) for L, R in factors[1:]]
    assert not are_alike([a, b, c])
    assert are_alike([LowRank(0.3 * a.left, a.right), *less])


class TestLeftAloneBySizes:
    def test_the_one_model_without_a_delta_is_the_base(self):
        problem = LatticeProblem((96, 80), rank=2, n=3, delta=2.0, merge=torch.bfloat16)
        first, _, last = problem.stack.matrices
        stack = Stack.of([first, problem.W.bfloat16(), last])
        found = left_alone_by_sizes(stack, SWEEPS, delta_scales(stack))
        assert found is not None
        assert torch.equal(found.weight.double(), problem.W)
        assert "model 1 shows no change of its own" in found.reason

    def test_none_where_all_have_one(self):
        problem = LatticeProblem((96, 80), rank=2, n=3, delta=2.0, merge=torch.bfloat16)
        assert left_alone_by_sizes(problem.stack, SWEEPS, delta_scales(problem.stack)) is None


def test_models_are_coarse_where_deltas_are_rounded_away():
    assert is_coarse(LatticeProblem(delta=0.1, merge=torch.bfloat16).stack)
    assert not is_coarse(LatticeProblem(delta=2.0, merge=torch.bfloat16).stack)
    assert not is_coarse(LatticeProblem(delta=0.1, merge=torch.float32).stack)


def test_half_precision_is_that_of_all_models():
    assert all_half(LatticeProblem((32, 24), merge=(torch.bfloat16, torch.float16, torch.bfloat16)).stack)
    assert not all_half(LatticeProblem((32, 24), merge=(torch.bfloat16, torch.float32, torch.bfloat16)).stack)


class TestLeftAloneByFit:
    """Two models have directions, the last has none."""

    problem = LatticeProblem((96, 80), rank=2, n=3, delta=2.0, merge=torch.bfloat16)
    stack = Stack.of([*problem.stack.matrices[:2], problem.W.bfloat16()])

    def found(self, lack: float):
        nothing = Estimate.nothing((96, 80), (lack * self.problem.step) ** 2)
        found = [*self.problem.estimates(0.0)[:2], nothing]
        return left_alone_by_fit(self.stack, found, delta_scales(self.stack))

    def test_the_model_of_which_nothing_is_left_is_the_base(self):
        found = self.found(lack=0.1)
        assert found is not None
        assert torch.equal(found.weight.double(), self.problem.W)

    def test_one_with_more_than_its_directions_is_not(self):
        assert self.found(lack=1.0) is None
