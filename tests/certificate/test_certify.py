"""The certificate against the truth, which it does not know."""

import math
import random
from dataclasses import replace

import pytest
import torch

from detune.certificate.certify import Certificate, Verdict, certify
from detune.certificate.verdict import BAND
from detune.methods import Auto, Intersect, Mean, Single, Spectral
from detune.metrics import w_error
from detune.problem import DecodedBits, LowRank, PredictedError, Recovery, Stack
from detune.problem.storage_noise import storage_variance
from tests.cases import Problem, Regime, make_problem, normal, rms, seeded

NO_GRID = Auto(lattice=None)
EXPECTED = PredictedError(1e-8, 3e-9, 4e-8)


def problem(times: float = 300.0, **changes: object) -> Problem:
    """A problem in float32 whose deltas are `times` as large as the storage noise."""
    regime = replace(Regime(shape=(64, 48), ranks=(3, 3, 3), dtype=torch.float32), **changes)
    noise = float(storage_variance(normal(seeded(), 1000).to(regime.dtype)).mean().sqrt())
    return make_problem(replace(regime, scale=times * noise), seeded())


def on_grid(given: Problem, grid: torch.dtype, dtype: torch.dtype) -> Problem:
    """A problem with its base in one dtype and its merges in another."""
    W_star = given.W_star.to(grid).double()
    return Problem(W_star, given.deltas, torch.stack([W_star + M_i for M_i in given.deltas]).to(dtype))


def certificate_of(given: Problem, solver: object = NO_GRID) -> tuple[Certificate, Recovery]:
    stack = Stack.of(given.stack)
    recovery = solver.solve(stack)
    return certify(stack, recovery, stored=given.stack.dtype), recovery


def true_error(given: Problem, recovery: Recovery) -> float:
    return w_error(recovery.weight.to(given.stack.dtype), given.W_star)


REGIMES = {
    "flat": {},
    "wide": {"shape": (40, 120)},
    "many": {"ranks": (3,) * 7},
    "mixed ranks": {"ranks": (7, 2, 5, 3)},
    "decaying": {"ranks": (6, 6, 6, 6), "decay": 4.0, "times": 3000.0},
    "one seed": {"shared_rows": 0.97, "times": 3000.0},
    "one seed, closer": {"shared_rows": 0.99, "times": 3000.0},
    "high ranks": {"ranks": (15, 15, 15)},
    "one unchanged": {"ranks": (3, 0, 3)},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", REGIMES)
def test_predicts_the_error_of_what_is_written(name, dtype):
    given = problem(dtype=dtype, **REGIMES[name])
    certificate, recovery = certificate_of(given)
    if dtype is torch.float64:
        # W lies on the grid, and the computation is hardly finer: the last figures are a matter of rare entries.
        assert certificate.best_w_error <= true_error(given, recovery) <= certificate.worst_w_error
        return
    assert certificate.verdict is Verdict.FLOOR, certificate.reason
    assert certificate.undetermined == 0
    assert certificate.predicted_w_error == pytest.approx(true_error(given, recovery), abs=0.3)


def test_is_calibrated_on_random_problems():
    """Within 0.3 wherever the verdict says "to the storage floor"; the benchmark has hundreds."""
    pick = random.Random(1)
    right = floor = 0
    for seed in range(24):
        side = pick.choice([40, 64])
        shape = pick.choice([(side, side), (side, 80), (80, side)])
        regime = Regime(
            shape,
            tuple(pick.randint(1, 8) for _ in range(pick.randint(3, 6))),
            pick.choice([0.0, 3.0]),
            10 ** pick.uniform(-5, -1),
            pick.choice([0.0, 0.9]),
            torch.float32,
        )
        given = make_problem(regime, seeded(seed))
        certificate, recovery = certificate_of(given)
        if certificate.verdict is Verdict.FLOOR:
            floor += 1
            right += abs(certificate.predicted_w_error - true_error(given, recovery)) <= 0.3
    assert floor >= 12
    assert right >= 0.95 * floor


def test_exact_is_never_wrong():
    """Random bases in half precision, merged in float32: with one seed's row spaces, weak directions, large deltas."""
    pick = random.Random(2)
    exact = 0
    for seed in range(24):
        step = pick.choice([2.0**-8, 2.0**-11])
        regime = Regime(
            pick.choice([(48, 40), (40, 64)]),
            tuple(pick.randint(1, 10) for _ in range(pick.randint(3, 6))),
            pick.choice([0.0, 4.0, 7.0]),
            step * 10 ** pick.uniform(-1, 3),
            pick.choice([0.0, 0.9, 0.99]),
            torch.float32,
        )
        grid = torch.bfloat16 if step == 2.0**-8 else torch.float16
        given = on_grid(make_problem(regime, seeded(seed)), grid, torch.float32)
        certificate, recovery = certificate_of(given, Auto())
        if certificate.verdict is Verdict.EXACT:
            exact += 1
            assert true_error(given, recovery) == -math.inf, seed
    assert exact >= 11


@pytest.mark.parametrize("seed", [2, 5, 6])
def test_directions_that_do_not_show_make_what_storing_undoes_unforeseeable(seed):
    """Spectra that go on below the noise: the error may be a few times what it seems."""
    drawn = make_problem(Regime((40, 40), (10,) * 6, 7.0, 1e-14, 0.5), seeded(seed))
    given = on_grid(drawn, torch.float64, torch.float64)
    certificate, recovery = certificate_of(given)
    assert certificate.best_w_error < true_error(given, recovery) < certificate.worst_w_error
    assert certificate.worst_w_error > certificate.predicted_w_error + BAND
    assert "cannot be predicted closely" in certificate.reason


@pytest.mark.parametrize("solver", [NO_GRID, Intersect()], ids=["auto", "intersect"])
@pytest.mark.parametrize("decay", [0.0, 4.0])
def test_what_storing_undoes_of_large_float32_matrices_is_foreseen(decay, solver):
    """Most entries become the base's own numbers: after float32 products twice as many would not."""
    drawn = make_problem(Regime((1100, 1000), (16,) * 3, decay, 0.03, 0.0), seeded())
    given = on_grid(drawn, torch.float32, torch.float32)
    certificate, recovery = certificate_of(given, solver)
    assert certificate.predicted_w_error == pytest.approx(true_error(given, recovery), abs=0.15)


def test_a_base_on_the_grid_is_hit_more_often_than_chance_allows():
    """Where the base was stored in the models' dtype, rounding the answer undoes small errors."""
    given = problem(dtype=torch.float32, ranks=(3,) * 5)
    W_star = given.W_star.float().double()
    stack = torch.stack([W_star + M_i for M_i in given.deltas]).float()
    on_grid = Problem(W_star, given.deltas, stack)
    certificate, recovery = certificate_of(on_grid)
    off_grid, _ = certificate_of(given)
    assert certificate.predicted_w_error < off_grid.predicted_w_error - 0.5
    assert certificate.predicted_w_error == pytest.approx(true_error(on_grid, recovery), abs=0.3)


def test_an_answer_short_of_the_best_is_not_taken_for_it():
    """Spectral DeTuning after too few steps: its distance to the best answer is measured, not believed."""
    given = problem()
    few = Spectral(iterations=12)
    certificate, recovery = certificate_of(given, few)
    assert certificate.verdict is Verdict.APPROXIMATE
    assert certificate.predicted_w_error > certificate_of(given)[0].predicted_w_error + 1
    assert true_error(given, recovery) > certificate_of(given)[0].predicted_w_error + 1


def test_a_wrong_answer_that_claims_to_be_right():
    given = problem()
    stack = Stack.of(given.stack)
    recovery = NO_GRID.solve(stack)
    moved = replace(
        recovery, weight=recovery.weight + 1e-3 * normal(seeded(3), *recovery.weight.shape), noise_ratio=1.0
    )
    certificate = certify(stack, moved)
    assert certificate.verdict is Verdict.APPROXIMATE
    assert certificate.best_w_error < w_error(moved.weight, given.W_star) < certificate.worst_w_error


def test_ranks_that_do_not_explain_the_data():
    given = problem(ranks=(4, 4, 4))
    stack = Stack.of(given.stack)
    certificate = certify(stack, Intersect().solve(stack, rank=2))
    assert certificate.verdict in (Verdict.APPROXIMATE, Verdict.NOT_DETERMINED)
    assert "do not explain the data" in certificate.reason or certificate.undetermined


@pytest.mark.parametrize("solver", [Mean(), Single()], ids=["mean", "single"])
def test_an_average_knows_nothing_of_the_deltas(solver):
    certificate, _ = certificate_of(problem(), solver)
    assert certificate.verdict is Verdict.NOT_DETERMINED
    assert certificate.undetermined is certificate.predicted_w_error is None
    assert "no model of the deltas" in certificate.reason


def test_two_models_leave_what_theory_says():
    """`W_1 - W_2` splits in a family of `2 r_1 r_2` dimensions."""
    given = problem(ranks=(3, 2))
    deltas = []
    for M_i, r in zip(given.deltas, (3, 2), strict=True):
        U, S, Vh = torch.linalg.svd(M_i)
        deltas.append(LowRank(U[:, :r] * S[:r], Vh[:r].mT))
    truth = Recovery(given.W_star, "truth", "told", tuple(deltas), (3, 2))
    certificate = certify(Stack.of(given.stack), truth)
    assert certificate.verdict is Verdict.NOT_DETERMINED
    assert certificate.undetermined == 2 * 3 * 2


@pytest.mark.parametrize(("certain", "verdict"), [(1.0, Verdict.EXACT), (0.9, Verdict.APPROXIMATE)])
def test_bits_that_are_certain_are_exact(certain, verdict):
    given = problem()
    stack = Stack.of(given.stack)
    mask = torch.zeros(given.W_star.shape, dtype=torch.bool).flatten()
    mask[: int(certain * mask.numel())] = True
    bits = DecodedBits(torch.bfloat16, -30.0, mask.reshape(given.W_star.shape), EXPECTED, 0.6)
    certificate = certify(stack, replace(NO_GRID.solve(stack), bits=bits))
    assert certificate.verdict is verdict
    assert certificate.undetermined == 0
    assert (certificate.worst_w_error is None) == (verdict is Verdict.EXACT)
    assert "1e-30" in certificate.reason


def test_more_noise_than_storage_explains_is_seen():
    given = problem()
    stack = Stack.of(given.stack)
    shaken = Stack.of((given.stack + 1e-6 * normal(seeded(4), *given.stack.shape)).float())
    certificate = certify(shaken, NO_GRID.solve(stack))
    assert certificate.verdict is Verdict.APPROXIMATE
    assert "times the storage noise is left" in certificate.reason


def test_asks_neither_for_truth_nor_for_order():
    given = problem(ranks=(3, 3, 3, 3))
    order = [2, 0, 3, 1]
    turned = Problem(given.W_star, given.deltas, given.stack[order])
    one, other = certificate_of(given)[0], certificate_of(turned)[0]
    assert one.verdict is other.verdict
    assert one.predicted_w_error == pytest.approx(other.predicted_w_error, abs=0.02)


def test_floor_is_what_the_storage_noise_leaves():
    """Many models in general position: little more than the mean of n rounding errors, and the final rounding."""
    given = problem(ranks=(1,) * 8, shape=(96, 96))
    variance = float(storage_variance(given.stack[0]).mean())
    certificate, recovery = certificate_of(given)
    assert certificate.predicted_w_error == pytest.approx(math.log10(variance / 8 + variance), abs=0.1)
    assert rms(recovery.weight - given.W_star) ** 2 == pytest.approx(variance / 8, rel=0.2)


def test_bits_that_the_stored_dtype_does_not_hold_are_not_exact():
    # Next to zero the grid is finer than any merge shows.
    W = (1 + normal(seeded(), 96, 80).square()).half().double()
    changes = [0.01 * normal(seeded(seed), 96, 4) @ normal(seeded(9 + seed), 4, 80) for seed in range(3)]
    stack = Stack.of([(W + M_i).float() for M_i in changes])
    found = Auto().solve(stack)
    assert certify(stack, found, torch.float16).verdict is Verdict.EXACT
    rounded = certify(stack, found, torch.bfloat16)
    assert rounded.verdict is Verdict.FLOOR
    assert rounded.predicted_w_error == pytest.approx(w_error(found.weight.bfloat16(), W), abs=1e-6)
