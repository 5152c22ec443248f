"""Coarsely stored models beside finely stored ones."""

import pytest
import torch
from torch import Tensor

from detune.certificate.certify import Verdict, certify
from detune.methods import Auto, Lattice
from detune.metrics import w_error
from detune.numerics.float_grid import spacing
from detune.problem import NotRecoverable, Recovery, Stack
from tests.cases import normal, rms, seeded

SHAPE = (96, 80)
STEP = float(spacing(torch.tensor(1.0), torch.bfloat16))
FINE, COARSE = torch.float32, torch.bfloat16


def merges(W_star: Tensor, deltas: list[Tensor], dtypes: list[torch.dtype]) -> Stack:
    return Stack.of([(W_star + M_i).to(dtype) for M_i, dtype in zip(deltas, dtypes, strict=True)])


def lora(seed: int, steps: float, rank: int = 2, rows: Tensor | None = None) -> Tensor:
    generator = seeded(seed)
    right = normal(generator, SHAPE[1], rank) if rows is None else rows
    M_i = normal(generator, SHAPE[0], rank) @ right.mT
    return M_i * (steps * STEP / rms(M_i))


def base(on_grid: bool) -> Tensor:
    W_star = normal(seeded(9), *SHAPE)
    return W_star.to(COARSE).double() if on_grid else W_star


def judged(stack: Stack, recovery: Recovery, W_star: Tensor) -> Verdict:
    """The verdict, whose prediction is right."""
    certificate = certify(stack, recovery, stored=FINE)
    true = w_error(recovery.weight.float(), W_star)
    if certificate.verdict is Verdict.EXACT:
        assert true == float("-inf")
    if certificate.verdict is Verdict.FLOOR:
        assert certificate.predicted_w_error == pytest.approx(true, abs=0.3)
    return certificate.verdict


@pytest.mark.parametrize("place", [0, 2, 3])
@pytest.mark.parametrize("steps", [0.2, 0.5, 3.0])
def test_one_in_bf16_costs_nothing(place, steps):
    """The answer is that of the others, wherever the coarse one stands and however much rounding left of its delta."""
    W_star, deltas = base(on_grid=False), [lora(i, steps) for i in range(4)]
    dtypes = [FINE] * 4
    dtypes[place] = COARSE
    stack = merges(W_star, deltas, dtypes)
    recovery = Auto().solve(stack)
    assert w_error(recovery.weight, W_star) < -14
    assert judged(stack, recovery, W_star) is Verdict.FLOOR
    assert recovery.source_models == tuple(i for i in range(4) if i != place)
    assert len(recovery.deltas) == 4
    if steps > 1:
        assert recovery.ranks == (2, 2, 2, 2)
        assert rms(recovery.deltas[place].dense() - deltas[place]) < 0.2 * STEP


@pytest.mark.parametrize("solver", [Auto(), Lattice()], ids=["auto", "lattice"])
@pytest.mark.parametrize("fine", [2, 3])
def test_the_bits_come_back_beside_one_in_bf16_that_hides_half_a_step(fine, solver):
    W_star, deltas = base(on_grid=True), [lora(i, 0.5) for i in range(fine + 1)]
    stack = merges(W_star, deltas, [COARSE] + [FINE] * fine)
    recovery = solver.solve(stack)
    assert torch.equal(recovery.weight, W_star)
    assert recovery.bits.share > 0.99
    assert judged(stack, recovery, W_star) is not Verdict.NOT_DETERMINED
    assert len(recovery.deltas) == fine + 1


def test_the_rank_that_is_told_holds_for_all():
    W_star, deltas = base(on_grid=False), [lora(i, 30.0, rank=4) for i in range(4)]
    recovery = Auto().solve(merges(W_star, deltas, [FINE, FINE, COARSE, FINE]), rank=3)
    assert max(recovery.ranks) <= 3


def test_all_are_asked_where_the_fine_ones_leave_something_open():
    """Three that share their rows say nothing of W there; a coarse one with rows of its own does."""
    rows = normal(seeded(20), SHAPE[1], 2)
    W_star = base(on_grid=False)
    deltas = [*(lora(i, 20.0, rows=rows) for i in range(3)), lora(4, 20.0)]
    stack = merges(W_star, deltas, [FINE] * 3 + [COARSE])
    assert Auto().solve(stack, rank=2).source_models == ()


def test_one_in_bf16_that_is_no_fine_tune_is_refused_as_before():
    W_star = base(on_grid=False)
    deltas = [*(lora(i, 1.0) for i in range(3)), normal(seeded(5), *SHAPE)]
    with pytest.raises(NotRecoverable, match="models 2 and 3 differ at full rank"):
        Auto().solve(merges(W_star, deltas, [FINE] * 3 + [COARSE]))


def test_half_precision_of_two_kinds_is_one_kind():
    W_star, deltas = base(on_grid=False), [lora(i, 3.0) for i in range(4)]
    assert Auto().solve(merges(W_star, deltas, [torch.float16] * 3 + [COARSE])).source_models == ()


@pytest.mark.parametrize("on_grid", [True, False])
def test_a_coarse_model_that_hides_the_deltas_of_fine_ones_does_not_pass_for_the_base(on_grid):
    """In bf16 nothing shows of two small deltas: a large one seems to be what both models differ by from the base."""
    W_star, deltas = base(on_grid), [lora(0, 20.0), lora(1, 0.05), lora(2, 0.05)]
    recovery = Auto().solve(merges(W_star, deltas, [COARSE, torch.float16, torch.float16]))
    assert recovery.ranks[0] == 2
    if on_grid:
        assert float(recovery.weight.eq(W_star).double().mean()) > 0.995
    else:
        assert rms(recovery.weight - W_star) < 0.3 * STEP
        assert "all in bfloat16, which hides directions of some adapters" in recovery.reason


@pytest.mark.parametrize("steps", [0.5, 5.0])
@pytest.mark.parametrize("fine", [1, 2])
def test_each_entry_says_what_its_own_dtype_holds(fine, steps):
    """One or two in float32 beside bf16 give nearly every bit; three in bf16 give fewer."""
    W_star, deltas = base(on_grid=True), [lora(i, steps) for i in range(3)]
    mixed, coarse = (merges(W_star, deltas, [FINE] * k + [COARSE] * (3 - k)) for k in (fine, 0))
    found, plain = (float(Auto().solve(stack).weight.eq(W_star).double().mean()) for stack in (mixed, coarse))
    assert found > 0.999
    assert found > plain


@pytest.mark.parametrize("steps", [0.3, 0.6, 0.9])
def test_one_fine_model_is_not_enough_where_it_leaves_more_than_noise(steps):
    """Alone it gives 7 to 38 % of the bits wrong; three of three kinds give them all."""
    W_star, deltas = base(on_grid=True), [lora(i, steps, rank=1) for i in range(3)]
    recovery = Auto().solve(merges(W_star, deltas, [COARSE, torch.float16, FINE]))
    assert recovery.source_models == ()
    assert torch.equal(recovery.weight, W_star)


def test_two_that_are_quantised_cost_three_that_are_not_nothing():
    W_star, deltas = base(on_grid=True), [lora(i, 3.0) for i in range(5)]
    matrices = [(W_star + M_i).to(COARSE) for M_i in deltas]
    step = 20 * STEP
    quantised = [((W_star + M_i) / step).round() * step for M_i in deltas[3:]]
    recovery = Auto().solve(Stack.of([*matrices[:3], *quantised], noise=[None] * 3 + [step / 12**0.5] * 2))
    assert recovery.source_models == (0, 1, 2)
    assert len(recovery.deltas) == 5
    assert torch.equal(recovery.weight, Auto().solve(Stack.of(matrices[:3])).weight)


def test_models_of_which_all_make_the_mean_better_are_all_used():
    W_star, deltas = base(on_grid=False), [lora(i, 300.0) for i in range(4)]
    noises = [0.01, 0.012, 0.011, 0.015]
    noisy = [W_star + M_i + noise * normal(seeded(30), *SHAPE) for M_i, noise in zip(deltas, noises, strict=True)]
    assert Auto().solve(Stack.of(noisy, noise=noises)).source_models == ()


@pytest.mark.parametrize(
    "kinds", [[COARSE, COARSE, FINE], [COARSE, torch.float16, FINE], [FINE, COARSE, FINE]], ids=str
)
def test_light_deltas_of_few_fine_models_come_from_all(kinds):
    """Coarse models have their directions too, where few of their entries changed."""
    W_star = base(on_grid=True)
    deltas = [lora(i, 0.15, rank=4) for i in range(3)]
    recovery = Auto().solve(merges(W_star, deltas, kinds))
    assert float(recovery.weight.eq(W_star).double().mean()) > 0.999
    assert recovery.source_models == ()
    assert all(recovery.ranks)
