"""Each reason for which a prediction may be wrong: named where it holds, and nowhere else."""

import math
from dataclasses import replace

import pytest
import torch

from detune.certificate import error_model
from detune.certificate.certify import Verdict, certify
from detune.certificate.error_model import ErrorModel
from detune.certificate.grid_error import are_certain, assess_bits, is_exact
from detune.fitting.normal_operator import NormalOperator
from detune.methods import Auto, Intersect
from detune.problem import DecodedBits, LowRank, PredictedError, Recovery, Stack
from detune.problem.low_rank import SVDFactors
from detune.problem.storage_noise import storage_variance
from tests.cases import Regime, make_problem, normal, rms, seeded

CLOSED_FORM = Auto(lattice=None)
EXPECTED = PredictedError(1e-8, 3e-9, 4e-8)


def model_of(models: torch.Tensor, recovery: Recovery | None = None, noise: tuple[float, ...] = ()) -> ErrorModel:
    stack = Stack.of(models, noise=noise)
    recovery = recovery or CLOSED_FORM.solve(stack)
    spaces = tuple(SVDFactors.of(M_i) for M_i in recovery.deltas)
    operator = NormalOperator.of([space.U for space in spaces], [space.V for space in spaces])
    return ErrorModel.of(stack, recovery, operator, spaces, models.dtype)


def plain(**changes: object) -> torch.Tensor:
    """Float32 models of a base off the grid, with deltas well over the noise."""
    regime = replace(Regime(shape=(64, 48), ranks=(3, 3, 3), scale=1e-3, dtype=torch.float32), **changes)
    return make_problem(regime, seeded()).stack


def doubts(model: ErrorModel, disagreed: float = 0.0) -> list[str]:
    return list(model.assessment(disagreed).doubts)


def test_none_where_nothing_speaks_against_the_prediction():
    found = model_of(plain()).assessment()
    assert found.doubts == ()
    assert found.at_floor


def test_deltas_below_a_step():
    models = plain().bfloat16()
    tiny = models[0].float() + 1e-4 * (plain()[1:] - plain()[0])
    given = torch.cat([models[:1], tiny.bfloat16()])
    given[1] = models[0].float().mul(1 + 2.0**-9).bfloat16()
    model = model_of(given, replace(CLOSED_FORM.solve(Stack.of(plain())), residuals=None))
    assert any("deltas are below a step" in why for why in doubts(model))


def test_levels_round_the_models_alike():
    """Deltas that are small beside the levels: a residual far below the noise that was told."""
    model = model_of(plain(), noise=(1e-3,) * 3)
    alike = replace(model, misfit=replace(model.misfit, energy=1e-3 * model.misfit.energy))
    assert any("rounded alike" in why and "quantisation" in why for why in doubts(alike))


def test_more_is_left_than_the_noise():
    model = model_of(plain())
    found = replace(model, misfit=replace(model.misfit, energy=9 * model.misfit.energy)).assessment()
    assert len(found.doubts) == 1
    assert "3 times the storage noise is left: adapters of these ranks do not explain the data" in found.doubts[0]
    assert not found.at_floor


def test_the_rounding_of_the_computation():
    """Deltas so large that float64 does not tell their rounding from the models'."""
    models = plain(dtype=torch.float64, scale=1e3)
    model = model_of(models)
    left = replace(model, misfit=replace(model.misfit, energy=2 * model.misfit.energy))
    assert any("rounding of the computation" in why for why in doubts(left))
    assert not any("rounding of the computation" in why for why in doubts(model_of(plain(dtype=torch.float64))))


@pytest.mark.parametrize(("shared", "hides"), [(0.0, False), (0.97, True)])
def test_directions_hide_where_spaces_are_close(shared, hides):
    found = doubts(model_of(plain(shared_rows=shared, ranks=(4,) * 4, decay=3.0 * bool(shared), scale=1e-6)))
    assert any("would not show" in why for why in found) == hides


def test_a_solver_that_stopped_short():
    stack = Stack.of(plain())
    recovery = CLOSED_FORM.solve(stack)
    moved = replace(recovery, weight=recovery.weight + 1e-3 * normal(seeded(3), *recovery.weight.shape))
    found = model_of(plain(), moved).assessment()
    assert found.doubts == ("the solver stopped short of the most likely answer",)
    assert not found.at_floor


def test_storing_undoes_most_of_the_error():
    given = make_problem(Regime((64, 48), (3,) * 6, 0.0, 1e-3, dtype=torch.float32), seeded())
    W = given.W_star.float().double()
    on_grid = torch.stack([W + M_i for M_i in given.deltas]).float()
    assert any("brings many entries to the base's own numbers" in why for why in doubts(model_of(on_grid)))


def test_deltas_of_a_few_units_in_the_last_place():
    """In float64, where rounding cannot be simulated."""
    noise = float(storage_variance(normal(seeded(), 1000)).mean().sqrt())
    near, far = (plain(dtype=torch.float64, ranks=(3,) * 4, scale=times * noise) for times in (8, 300))
    assert any("models round alike" in why for why in doubts(model_of(near)))
    assert not any("models round alike" in why for why in doubts(model_of(far)))


def test_an_excess_of_noise_where_spectra_run_into_it():
    model = model_of(plain(decay=7.0, ranks=(6,) * 4, scale=1e-5))
    more = replace(model, misfit=replace(model.misfit, energy=1.5 * model.misfit.energy))
    assert model.weakest_direction < 3
    assert any("directions of the adapters that were not found" in why for why in doubts(more))
    clear = model_of(plain())
    merged_twice = replace(clear, misfit=replace(clear.misfit, energy=1.5 * clear.misfit.energy))
    assert doubts(merged_twice) == []


def test_equations_that_cannot_be_solved_determine_nothing(monkeypatch):
    stack = Stack.of(plain())
    recovery = CLOSED_FORM.solve(stack)
    traces = replace(model_of(plain()).traces, solved=False)
    monkeypatch.setattr(error_model, "error_traces", lambda operator: traces)
    found = certify(stack, recovery)
    assert found.verdict is Verdict.NOT_DETERMINED
    assert found.worst_w_error is None
    assert "too ill-conditioned" in found.reason


def test_an_error_in_few_directions():
    model = model_of(plain())
    few = replace(model, traces=replace(model.traces, directions=5.0))
    assert doubts(few) == ["the error lies in some 5 directions: its size is known to a factor only"]


def test_parts_that_disagree():
    model = model_of(plain())
    assert doubts(model, 9 * model.mse) == []
    (why,) = doubts(model, 16 * model.mse)
    assert "disagree 4 times as much as predicted" in why


def test_all_that_hold_are_named():
    model = model_of(plain())
    both = replace(
        model,
        traces=replace(model.traces, directions=5.0),
        misfit=replace(model.misfit, energy=9 * model.misfit.energy),
    )
    assert len(doubts(both)) == 2


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
