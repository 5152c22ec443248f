"""Which entries of an answer on a grid are believed, and what speaks against the rest."""

import math
from dataclasses import replace

import pytest
import torch

from detune.certificate.certify import certify
from detune.certificate.grid_error import are_certain, assess_bits, is_exact
from detune.methods import Auto, Intersect
from detune.problem import DecodedBits, LowRank, PredictedError, Recovery, Stack
from tests.cases import Regime, make_problem, normal, rms, seeded

CLOSED_FORM = Auto(lattice=None)
EXPECTED = PredictedError(1e-8, 3e-9, 4e-8)


def plain(**changes: object) -> torch.Tensor:
    """Float32 models of a base off the grid, with deltas well over the noise."""
    regime = replace(Regime(shape=(64, 48), ranks=(3, 3, 3), scale=1e-3, dtype=torch.float32), **changes)
    return make_problem(regime, seeded()).stack


@pytest.mark.parametrize(
    ("certain", "foreseeable", "expected"),
    [
        (0.96, 0.99, []),
        (0.96, 0.6, ["which of the others with long steps are wrong is chance"]),
        (0.5, 0.99, ["how far the others can be trusted"]),
        (0.0, 0.6, ["which of the others with long steps are wrong is chance", "how far the others can be trusted"]),
    ],
)
def test_entries_that_are_not_certain(certain, foreseeable, expected):
    stack = Stack.of(plain())
    mask = torch.zeros(stack.shape[0] * stack.shape[1], dtype=torch.bool)
    mask[: int(certain * len(mask))] = True
    bits = DecodedBits(torch.bfloat16, -30.0, mask.reshape(stack.shape), EXPECTED, foreseeable)
    found = assess_bits(stack, replace(CLOSED_FORM.solve(stack), bits=bits))
    assert [why.startswith(begun) for why, begun in zip(found.doubts, expected, strict=True)] == [True] * len(expected)
    assert found.mse == EXPECTED.mse
    assert "1e-30" in found.reason


def test_spaces_that_cannot_be_told_apart():
    """What all entries of a direction share shows in none of them, and least squares cannot say how much it is."""
    stack = Stack.of(plain())
    recovery = Intersect().solve(stack)
    certain = torch.rand(stack.shape, generator=seeded()) < 0.99
    bits = DecodedBits(torch.bfloat16, -30.0, certain, EXPECTED, 0.99)
    shared = tuple(LowRank(M_i.left, recovery.deltas[0].right) for M_i in recovery.deltas)
    (why,) = assess_bits(stack, replace(recovery, bits=bits, deltas=shared)).doubts
    assert why.startswith("but for the grid, nothing tells the weight from the adapters")


def test_certain_entries_beside_spaces_that_cannot_be_told_apart_are_not_exact():
    """Models as coarse as the base: what all adapters share may be wrong in many entries together."""
    given = make_problem(Regime(shape=(64, 48), ranks=(3, 3, 3), scale=0.1), seeded())
    W = given.W_star.bfloat16()
    stack = Stack.of(torch.stack([(W + M_i).bfloat16() for M_i in given.deltas]))
    recovery = Intersect().solve(stack)
    bits = DecodedBits(torch.bfloat16, -30.0, torch.ones(stack.shape, dtype=torch.bool), EXPECTED, 0.99)
    shared = tuple(LowRank(M_i.left, recovery.deltas[0].right) for M_i in recovery.deltas)
    assert is_exact(stack, replace(recovery, bits=bits))
    assert not is_exact(stack, replace(recovery, bits=bits, deltas=shared))
    finer = Stack.of(stack.matrices[0].float() + torch.stack([M_i.float() for M_i in given.deltas]))
    assert is_exact(finer, replace(recovery, bits=bits, deltas=shared))


def test_certain_entries_of_a_start_that_is_one_of_many_are_not_believed():
    """Models as coarse as the base; least squares began the fit, and has no answer."""
    given = make_problem(Regime(shape=(128, 64), ranks=(3, 3, 3), scale=0.1), seeded())
    W = given.W_star.bfloat16()
    stack = Stack.of(torch.stack([(W + M_i).bfloat16() for M_i in given.deltas]))
    recovery = Intersect().solve(stack)
    bits = DecodedBits(torch.bfloat16, -30.0, torch.rand(stack.shape, generator=seeded()) < 0.99, EXPECTED, 0.99)
    shared = tuple(LowRank(M_i.left, recovery.deltas[0].right) for M_i in recovery.deltas)
    began = replace(recovery, bits=bits, deltas=shared, method="intersect+lattice")
    found = assess_bits(stack, began)
    assert not found.certain
    assert found.reason.startswith("no entry is certain")
    assert found.basis == "grid, adapters alike"
    assert not certify(stack, began, torch.bfloat16).certain
    assert assess_bits(stack, replace(began, deltas=recovery.deltas)).certain
    # Where half of the entries are open, adapters of many directions may explain a base that is on no grid.
    open_half = replace(bits, certain=torch.rand(stack.shape, generator=seeded()) < 0.45)
    assert not assess_bits(stack, replace(began, deltas=recovery.deltas, bits=open_half)).certain
    # From the grid alone, what all adapters share begins at zero; but this matrix is small.
    assert not are_certain(stack, replace(began, method="lattice"), math.inf)
    large = replace(began, method="lattice", weight=torch.zeros(256, 256))
    assert are_certain(stack, large, math.inf)
    # What a model without any direction holds is in the weight, or in the others.
    assert not are_certain(stack, replace(large, ranks=(3, 0, 3)), math.inf)
    finer = Stack.of(stack.matrices[0].float() + torch.stack([M_i.float() for M_i in given.deltas]))
    assert assess_bits(finer, began).certain


@pytest.mark.parametrize(("share", "believed"), [(0.9, False), (0.97, True)])
def test_certain_entries_of_one_model_are_believed_if_next_to_all_are(share, believed):
    stack = Stack.of(plain()[:1])
    bits = DecodedBits(torch.bfloat16, -30.0, torch.rand(stack.shape, generator=seeded()) < share, EXPECTED, 0.99)
    recovery = Recovery(stack.matrices[0].double(), "lattice", "", bits=bits)
    assert are_certain(stack, recovery, math.inf) is believed


def test_no_entry_is_certain_on_a_grid_that_is_assumed():
    stack = Stack.of(plain())
    bits = DecodedBits(torch.bfloat16, -1.0, torch.ones(stack.shape, dtype=torch.bool), EXPECTED, 0.99)
    found = assess_bits(stack, replace(CLOSED_FORM.solve(stack), bits=bits))
    assert not found.certain
    assert "which the base is taken to be on" in found.reason


def test_where_none_should_be_wrong_one_may_be():
    stack = Stack.of(plain())
    certain = torch.rand(stack.shape, generator=seeded()) < 0.99
    bits = DecodedBits(torch.bfloat16, -30.0, certain, PredictedError(0.0, 0.0, 0.0), 1.0)
    recovery = CLOSED_FORM.solve(stack)
    found = assess_bits(stack, replace(recovery, bits=bits))
    one = rms(recovery.weight) ** 2 * 2.0**-14 / recovery.weight.numel()
    assert one / 4 < found.mse < one


def test_copies_of_two_models_make_nothing_certain():
    """Either of the two may be the base's."""
    generator = seeded(3)
    W = (normal(generator, 128, 96) / 20).half()
    other = (W.double() + normal(generator, 128, 2) @ normal(generator, 2, 96) / 1000).half()
    for models in ([other, W, other, W], [W, other, W]):
        stack = Stack.of(models)
        bits = DecodedBits(torch.float16, -30.0, torch.ones(stack.shape, dtype=torch.bool), EXPECTED, 0.99)
        recovery = replace(CLOSED_FORM.solve(Stack.of([W, other, W + 1])), bits=bits, noise_ratio=1.0)
        assert not is_exact(stack, recovery)
        assert not are_certain(stack, recovery, 1.0)
