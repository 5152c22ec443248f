"""Adapters that hold a part of the base are told from others by the hole that they leave in the weight."""

from dataclasses import replace

import pytest
import torch

from detune.identifiability.principal_part import lacks_principal_part, require_own_adapters
from detune.problem import LowRank, NotRecoverable, Recovery
from tests.cases import normal, seeded


def recovery(hole: bool, moved: float = 0.02, noise_ratio: float = 1.0) -> Recovery:
    """An answer with adapters that are nearly one low-rank matrix, which the weight lacks or not."""
    generator = seeded()
    W = normal(generator, 60, 50)
    U, S, Vh = torch.linalg.svd(W)
    left, right = U[:, :4] * S[:4], Vh[:4].mT
    if hole:
        W = W - left @ right.mT
    deltas = tuple(
        LowRank(left + moved * normal(generator, 60, 4), right + moved * normal(generator, 50, 4)) for _ in range(3)
    )
    return Recovery(W, "intersect", "for the test", deltas, (4,) * 3, noise_ratio=noise_ratio)


def test_a_weight_that_is_empty_where_the_adapters_are_lacks_a_part():
    assert lacks_principal_part(recovery(hole=True))
    assert not lacks_principal_part(recovery(hole=False))


def test_adapters_of_their_own_are_no_part_of_the_base():
    assert not lacks_principal_part(recovery(hole=True, moved=1.0))
    require_own_adapters(recovery(hole=True, moved=1.0))


def test_answers_of_other_kinds_are_let_through():
    require_own_adapters(recovery(hole=False))
    require_own_adapters(replace(recovery(hole=True), deltas=(), ranks=()))


def test_a_part_of_the_base_is_refused():
    with pytest.raises(NotRecoverable, match=r"start from a part of the base, as PiSSA's do; .* empty .*; average"):
        require_own_adapters(recovery(hole=True))


def test_adapters_alike_that_explain_nothing_are_refused():
    with pytest.raises(NotRecoverable, match=r"do not explain the data; 30 times the storage noise .* 2 at most; aver"):
        require_own_adapters(recovery(hole=False, noise_ratio=30.0))
