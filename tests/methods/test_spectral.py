"""Spectral DeTuning against the paper: its scheduler by hand, its algorithm word for word."""

import pytest
import torch

from detune.methods import Spectral
from detune.methods.spectral import RankSchedule, ScheduleState
from detune.problem import NotRecoverable, Stack
from tests.cases import Regime, make_problem, rms, seeded

FIVE = Regime(shape=(60, 48), ranks=(4,) * 5, scale=0.3)

# (loss, rank that the next M-step uses, bad steps so far): patience 2, rank at most 6, 40 iterations.
HAND_WORKED = [
    (9.0, 1, 0),
    (8.0, 1, 0),
    (8.0, 1, 1),  # as low as the best is not lower
    (8.5, 1, 2),  # two bad steps are put up with
    (8.1, 2, 0),  # the third is one too many: q doubles
    (7.0, 2, 0),
    (7.5, 2, 1),
    (6.0, 2, 0),  # a better one starts the count afresh
    (6.0, 2, 1),
    (6.0, 2, 2),
    (6.0, 4, 0),
    (6.1, 4, 1),
    (6.1, 4, 2),
    (6.1, 6, 0),  # never above r
    (6.1, 6, 1),
    (5.0, 6, 0),
    (5.0, 6, 1),
    (5.0, 6, 2),
    (5.0, 6, 0),
    (4.0, 6, 0),  # half of the iterations: q = r
    (4.0, 6, 0),
]


def test_scheduler_follows_the_table():
    schedule = RankSchedule(rank=6, iterations=40, patience=2)
    state = ScheduleState()
    for iteration, (loss, rank, bad_steps) in enumerate(HAND_WORKED):
        state = schedule.step(state, loss, iteration)
        assert (state.rank, state.bad_steps) == (rank, bad_steps), f"iteration {iteration}"
        assert state.best == min(row[0] for row in HAND_WORKED[: iteration + 1])


def test_scheduler_takes_the_full_rank_from_half_of_the_iterations_on():
    schedule = RankSchedule(rank=32, iterations=10)
    state = ScheduleState()
    ranks = []
    for iteration in range(10):
        ranks.append(state.rank)
        state = schedule.step(state, 1.0 / (iteration + 1), iteration)
    assert ranks == [1] * 5 + [32] * 5


def naive(models: torch.Tensor, r: int, iterations: int, patience: int = 15) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Algorithm 1 of the paper on full matrices, with its rank scheduler as reduce-on-plateau."""
    W = sum(models) / len(models)
    q, best, bad_steps = 1, float("inf"), 0
    M = []
    for t in range(iterations):
        if t >= iterations // 2:
            q = r
        M = []
        for W_i in models:
            U, S, Vh = torch.linalg.svd(W_i - W)
            M.append(sum(S[j] * torch.outer(U[:, j], Vh[j]) for j in range(q)))
        W = sum(W_i - M_i for W_i, M_i in zip(models, M, strict=True)) / len(models)
        loss = float(sum((W_i - W - M_i).square().sum() for W_i, M_i in zip(models, M, strict=True))) / models.numel()
        if loss < best:
            best, bad_steps = loss, 0
        else:
            bad_steps += 1
        if bad_steps > patience:
            q, bad_steps = min(2 * q, r), 0
    return W, M


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("iterations", "patience"), [(2, 15), (3, 15), (30, 15), (60, 1)])
def test_equals_the_papers_algorithm(seed, iterations, patience):
    problem = make_problem(Regime(shape=(24, 20), ranks=(3,) * 4, scale=0.3), seeded(seed))
    solver = Spectral(iterations=iterations, svd="exact", on_core=False, patience=patience)
    recovery = solver.solve(Stack.of(problem.stack), 3)
    W, M = naive(problem.stack, 3, iterations, patience)
    torch.testing.assert_close(recovery.weight, W, rtol=0, atol=1e-12)
    for M_i, expected in zip(recovery.deltas, M, strict=True):
        torch.testing.assert_close(M_i.dense(), expected, rtol=0, atol=1e-12)
    assert recovery.steps == iterations


@pytest.mark.parametrize("schedule", [True, False])
@pytest.mark.parametrize("iterations", [1, 2, 7, 40, 120])
def test_core_gives_the_same_iterates_as_the_full_matrices(iterations, schedule):
    problem = make_problem(FIVE, seeded())
    on_core, full = (
        Spectral(iterations=iterations, svd="exact", on_core=on_core, schedule=schedule).solve(
            Stack.of(problem.stack), 4
        )
        for on_core in (True, False)
    )
    assert rms(on_core.weight - full.weight) <= 1e-13
    for ours, theirs in zip(on_core.deltas, full.deltas, strict=True):
        assert rms(ours.dense() - theirs.dense()) <= 1e-13
    assert "joint core" in on_core.reason
    assert "full matrices" in full.reason


def test_iterates_on_the_full_matrices_where_a_core_would_save_nothing():
    recovery = Spectral(iterations=3).solve(Stack.of(make_problem(FIVE, seeded()).stack), 9)
    assert "full matrices" in recovery.reason


@pytest.mark.parametrize("on_core", [True, False])
def test_randomised_svd_is_close_to_the_exact_one(on_core):
    problem = make_problem(FIVE, seeded())
    errors = [
        problem.error(Spectral(svd=svd, on_core=on_core).solve(Stack.of(problem.stack), 4).weight)
        for svd in ("exact", "lowrank")
    ]
    assert max(errors) < 1e-6
    early = [
        Spectral(iterations=20, svd=svd, on_core=on_core).solve(Stack.of(problem.stack), 4).weight
        for svd in ("exact", "lowrank")
    ]
    assert rms(early[0] - early[1]) < 0.05 * problem.delta_rms


def test_leaves_the_global_generator_alone():
    problem = make_problem(FIVE, seeded())
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Spectral(iterations=5).solve(Stack.of(problem.stack), 4)
    assert torch.rand(3).equal(expected)


def test_loss_never_rises_at_a_fixed_rank():
    problem = make_problem(FIVE, seeded())
    residuals = [
        Spectral(iterations=k, svd="exact", schedule=False).solve(Stack.of(problem.stack), 4).relative_residual
        for k in (1, 2, 4, 8, 16, 32)
    ]
    assert residuals == sorted(residuals, reverse=True)


def test_finds_its_rank_in_the_data():
    problem = make_problem(Regime(shape=(60, 48), ranks=(2, 4, 3, 4, 1)), seeded())
    assert Spectral(iterations=2).solve(Stack.of(problem.stack)).ranks == (4,) * 5


def test_needs_two_models():
    with pytest.raises(NotRecoverable, match="needs at least two, and three to be right; add models"):
        Spectral().solve(Stack.of(make_problem(FIVE, seeded()).stack[:1]))
