"""The dimension of what the data cannot see, against the dense operator's rank."""

import pytest
import torch
from torch import Tensor

from detune.fitting.normal_operator import NormalOperator
from detune.identifiability import null_space as nullspace
from detune.identifiability.null_space import undetermined
from tests.cases import normal, seeded
from tests.fitting.test_gauss_newton import dense_operator

Spaces = list[Tensor]


def basis(*columns: Tensor) -> Tensor:
    return torch.linalg.qr(torch.cat(columns, dim=1))[0]


def random_spaces(size: int, ranks: tuple[int, ...], shared: int = 0, seed: int = 0) -> Spaces:
    """Random spaces of which all contain the same `shared` directions."""
    generator = seeded(seed)
    common = normal(generator, size, shared)
    return [basis(common, normal(generator, size, r - shared)) for r in ranks]


def none(spaces: Spaces) -> list[Tensor]:
    return [torch.zeros(space.shape[1], dtype=space.dtype) for space in spaces]


CASES = {
    "three in general position": (random_spaces(12, (2, 2, 2)), random_spaces(10, (2, 2, 2), seed=1)),
    "two": (random_spaces(12, (2, 3)), random_spaces(10, (2, 3), seed=1)),
    "two that share a row direction": (random_spaces(12, (2, 3)), random_spaces(10, (2, 3), 1, seed=1)),
    "a shared row direction": (random_spaces(12, (2, 3, 2)), random_spaces(10, (2, 3, 2), 1, seed=1)),
    "shared on both sides": (random_spaces(12, (3, 3, 3), 1), random_spaces(10, (3, 3, 3), 2, seed=1)),
    "one frozen A": (random_spaces(12, (2, 2, 2, 2)), random_spaces(10, (2, 2, 2, 2), 2, seed=1)),
    "ranks too high for rows and columns": (random_spaces(9, (4, 4, 4)), random_spaces(10, (4, 4, 4), seed=1)),
    "rows dependent, columns free": (random_spaces(12, (3, 3, 3)), random_spaces(7, (3, 3, 3), seed=1)),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_nullity_of_the_dense_operator(name):
    U, V = CASES[name]
    dense = dense_operator(U, V)
    expected = len(dense) - int(torch.linalg.matrix_rank(dense, hermitian=True, rtol=1e-9))
    assert undetermined(NormalOperator.of(U, V), none(U), none(V)) == expected


def test_two_models_split_in_twice_the_product_of_their_ranks():
    U, V = CASES["two"]
    assert undetermined(NormalOperator.of(U, V), none(U), none(V)) == 2 * 2 * 3


def test_one_frozen_a_hides_its_row_space_in_every_row():
    U, V = CASES["one frozen A"]
    assert undetermined(NormalOperator.of(U, V), none(U), none(V)) == 2 * 12


def test_a_core_too_large_to_decompose_is_probed(monkeypatch):
    U, V = CASES["ranks too high for rows and columns"]
    exact = undetermined(NormalOperator.of(U, V), none(U), none(V))
    monkeypatch.setattr(nullspace, "COUNTED", 0)
    probed = undetermined(NormalOperator.of(U, V), none(U), none(V))
    assert exact > 0
    assert probed == pytest.approx(exact, rel=0.5, abs=3)


def test_spaces_that_coincide_within_their_noise_coincide():
    U, V = CASES["a shared row direction"]
    generator, angle = seeded(5), 1e-3
    shaken = [torch.linalg.qr(V_i + angle / 10**0.5 * normal(generator, *V_i.shape))[0] for V_i in V]
    blur = [torch.full((V_i.shape[1],), angle**2, dtype=V_i.dtype) for V_i in V]
    operator = NormalOperator.of(U, shaken)
    assert undetermined(operator, none(U), none(V)) == 0
    assert undetermined(operator, none(U), blur) == 12
