"""Each reason for which a prediction may be wrong: named where it holds, and nowhere else."""

from dataclasses import replace

import pytest
import torch

from detune.certificate import error_model
from detune.certificate.certify import Verdict, certify
from detune.certificate.error_model import ErrorModel
from detune.fitting.normal_operator import NormalOperator
from detune.methods import Auto
from detune.problem import Recovery, Stack
from detune.problem.low_rank import SVDFactors
from detune.problem.storage_noise import storage_variance
from tests.cases import Regime, make_problem, normal, seeded

CLOSED_FORM = Auto(lattice=None)


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
