"""Adapters' spaces by intersection, and where that ends."""

import pytest
import torch

from detune.fitting.differences import find_differences
from detune.fitting.subspaces import RanksTooHigh, find_spaces, intersect
from detune.methods import Intersect
from detune.problem import Stack
from tests.cases import Regime, make_problem, rms, seeded


@pytest.mark.parametrize(
    ("shape", "ranks", "found"),
    [
        ((52, 44), (19, 18, 19), "two sum to 38 of at most 44, three to 56 of at most 52"),
        ((44, 52), (18, 19, 19), "three to 56 of at most 52"),
        ((50, 50), (17, 17, 17), "two sum to 34 of at most 50, three to 51 of at most 50"),
    ],
)
def test_says_which_condition_fails(shape, ranks, found):
    problem = make_problem(Regime(shape=shape, ranks=ranks), seeded())
    differences = find_differences(Stack.of(problem.stack))
    with pytest.raises(RanksTooHigh, match=rf"too high for a {shape[0]}x{shape[1]} matrix; .*{found}.*more models"):
        find_spaces(differences)


@pytest.mark.parametrize(("shape", "transposed"), [((40, 200), False), ((200, 40), True)])
def test_takes_the_side_that_is_wide_enough(shape, transposed):
    problem = make_problem(Regime(shape=shape, ranks=(15, 15, 15)), seeded())
    spaces = find_spaces(find_differences(Stack.of(problem.stack)))
    assert spaces.transposed is transposed
    assert str(spaces).startswith("column" if transposed else "row")


def test_spaces_are_the_adapters_own():
    problem = make_problem(Regime(ranks=(4, 2, 6, 3)), seeded())
    spaces = find_spaces(find_differences(Stack.of(problem.stack)))
    for V_i, M_i in zip(spaces.bases, problem.deltas, strict=True):
        M_i = M_i.mT if spaces.transposed else M_i
        torch.testing.assert_close(V_i.mT @ V_i, torch.eye(V_i.shape[1], dtype=V_i.dtype))
        assert rms(M_i - M_i @ V_i @ V_i.mT) <= 1e-12


@pytest.mark.parametrize("shared", [0.5, 0.9, 0.97, 0.999])
def test_one_seed_is_told_apart(shared):
    """LoRAs of one seed keep their A near the shared start, so that their row spaces nearly coincide."""
    problem = make_problem(Regime(shape=(90, 80), ranks=(5, 5, 5), shared_rows=shared), seeded())
    stack = Stack.of(problem.stack)
    differences = find_differences(stack)
    rows = intersect(differences, differences.ranks)
    spaces = find_spaces(differences)
    assert spaces.separation >= rows.separation
    assert problem.error(Intersect().solve(stack).weight) <= 1e-10


def test_separation_is_the_sine_of_the_closest_angle():
    """Orthogonal spaces are as far apart as can be."""
    generator = seeded()
    basis = torch.linalg.qr(torch.randn(60, 60, generator=generator, dtype=torch.float64))[0]
    W = torch.randn(60, 60, generator=generator, dtype=torch.float64)
    stack = [W + basis[:, 4 * i : 4 * i + 4] @ basis[:, 4 * i : 4 * i + 4].mT for i in range(3)]
    assert find_spaces(find_differences(Stack.of(stack))).separation == pytest.approx(1, abs=1e-6)
