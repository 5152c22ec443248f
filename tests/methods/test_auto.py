import math

import pytest
import torch

from detune import recover_matrix
from detune.certificate.certify import Verdict, certify
from detune.fitting.subspaces import RanksTooHigh
from detune.methods import Auto, Intersect, Mean, Spectral
from detune.methods.auto import FEW_DIRECTIONS
from detune.metrics import w_error
from detune.problem import NotLowRank, Stack
from tests.cases import Regime, make_problem, normal, seeded


def lora(generator, out, columns, rank, size):
    B, A = torch.randn(out, rank, generator=generator), torch.randn(rank, columns, generator=generator)
    return size * B @ A / (rank * columns) ** 0.5


def test_a_half_precision_base_left_alone_by_one_model_is_no_coarse_noise():
    generator = seeded(0)
    W = torch.randn(128, 128, generator=generator).bfloat16().float()
    models = [W + lora(generator, 128, 128, 4, 0.03), W + lora(generator, 128, 128, 4, 0.03), W]
    recovery = recover_matrix(models)
    assert recovery.method == "unchanged"
    assert torch.equal(recovery.weight.float(), W)


def test_one_frozen_a_is_never_called_recovered():
    generator = seeded(0)
    W, A = torch.randn(96, 96, generator=generator), torch.randn(4, 96, generator=generator)
    models = [W + 0.01 * torch.randn(96, 4, generator=generator) @ A for _ in range(4)]
    assert recover_matrix(models).noise_ratio > 1000


def test_spectral_names_strangers_too():
    models = torch.randn(3, 80, 80, generator=seeded(0))
    with pytest.raises(NotLowRank, match="differ at full rank"):
        recover_matrix(models, Spectral(iterations=2), rank=4)


class TestDirectionsBelowTheNoise:
    """LoRAs that nearly coincide: their differences have directions that storage noise hides."""

    REGIME = Regime(shape=(96, 80), ranks=(8,) * 5, decay=9.0, scale=0.01, shared_rows=0.999, dtype=torch.float32)

    @pytest.mark.parametrize("rank", [8, None])
    @pytest.mark.parametrize("seed", [0, 1])
    def test_are_found(self, seed, rank):
        problem = make_problem(self.REGIME, seeded(seed))
        answer = recover_matrix(problem.stack, rank=rank)
        assert answer.ranks == (8,) * 5
        assert answer.noise_ratio < 1.1
        closed = recover_matrix(problem.stack, "intersect")
        assert problem.error(answer.weight) < 0.9 * problem.error(closed.weight)

    @pytest.mark.parametrize("seed", [0, 1])
    def test_that_are_missed_make_the_answer_no_worse_than_the_closed_form(self, seed, monkeypatch):
        monkeypatch.setattr("detune.fitting.rank_refinement.SMALL_ENTRIES", 0)
        problem = make_problem(self.REGIME, seeded(seed))
        answer, closed = (recover_matrix(problem.stack, method) for method in ("auto", "intersect"))
        assert problem.error(answer.weight) < 1.1 * problem.error(closed.weight)


def test_does_not_run_off_where_spaces_nearly_coincide(monkeypatch):
    """Deltas a hundred times too large, with a base as far off, fit these models better than the closed form does."""
    monkeypatch.setattr("detune.methods.auto.refine_ranks", lambda spaces, rank: spaces)
    generator = torch.Generator().manual_seed(1235)
    W, common = normal(generator, 256, 128).half().double(), normal(generator, 128, 14)
    models = []
    for r in (12, 14, 7, 4):
        V = torch.linalg.qr(0.97**0.5 * common[:, :r] + 0.03**0.5 * normal(generator, 128, r))[0]
        U = torch.linalg.qr(normal(generator, 256, r))[0]
        sigma = torch.exp(torch.linspace(0, -4, r, dtype=torch.float64))
        models.append((W + 0.027048 * (W.numel() / r) ** 0.5 * (U * sigma) @ V.mT).half())
    mean = Mean().solve(Stack.of(models))
    answer = recover_matrix(models, Auto(lattice=None))
    assert w_error(answer.weight, W) < w_error(mean.weight, W) - 2


def test_noise_just_above_the_storage_noise_is_not_searched_for_ranks(monkeypatch):
    """One model from a source that is hardly another: its noise would be taken for ranks one by one, for minutes."""
    problem = make_problem(Regime(shape=(144, 128), ranks=(4, 4, 4), scale=1e-3, dtype=torch.float32), seeded())
    models = [W_i.float() for W_i in problem.stack]
    noise = float(Stack.of(models).noise[2])
    models[2] = (models[2].double() + 4 * noise * normal(seeded(1), *problem.W_star.shape)).float()
    searched = []
    monkeypatch.setattr("detune.methods.auto.refine_ranks", lambda spaces, _: searched.append(spaces) or spaces)
    recovery = Auto().solve(Stack.of(models))
    assert all(V_i.shape[1] <= 4 + FEW_DIRECTIONS for spaces in searched for V_i in spaces.bases)
    assert recovery.ranks == (4, 4, 4)
    assert w_error(recovery.weight, problem.W_star) < -14


def test_noise_that_looks_like_ranks_too_high_to_split_is_looked_above():
    """Rounded otherwise before it was stored: at ten times the storage noise most of a difference stands over it."""
    problem = make_problem(Regime(shape=(144, 128), ranks=(4, 4, 4), scale=1e-3, dtype=torch.float32), seeded())
    noise = 6 * float(Stack.of(problem.stack).noise.mean())
    models = [(W_i.double() + noise * normal(seeded(i), *W_i.shape)).float() for i, W_i in enumerate(problem.stack)]
    stack = Stack.of(models)
    with pytest.raises(RanksTooHigh):
        Intersect().solve(stack)
    recovery = Auto().solve(stack)
    assert recovery.method.startswith("intersect")
    assert w_error(recovery.weight, problem.W_star) < 2 * math.log10(noise) + 0.5
    assert certify(stack, recovery).verdict is Verdict.APPROXIMATE
