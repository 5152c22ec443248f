import pytest
import torch
from torch import Tensor

from detune.certificate.certify import Verdict, certify
from detune.methods import Auto
from detune.metrics import w_error
from detune.numerics.float_grid import nearest
from detune.problem import Recovery, Stack
from detune.problem.recovery import left_alone
from detune.source_models.identical import solve_versions
from tests.cases import normal, seeded

SHAPE = (64, 48)
W = normal(seeded(), *SHAPE).float()


def lora(seed: int, rank: int = 2) -> Tensor:
    generator = seeded(100 + seed)
    return 1e-3 * normal(generator, SHAPE[0], rank) @ normal(generator, rank, SHAPE[1])


def merged(*deltas: Tensor | None) -> Stack:
    return Stack.of([W if M_i is None else (W.double() + M_i).float() for M_i in deltas])


def in_range(stack: Stack, recovery: Recovery, truth: Tensor) -> bool:
    """Whether the certificate's range holds the error of the stored weight."""
    certificate = certify(stack, recovery, torch.float32)
    error = w_error(recovery.weight.float(), truth)
    if certificate.verdict is Verdict.EXACT:
        return error == float("-inf")
    best, worst = certificate.best_w_error, certificate.worst_w_error
    return (best is None or best <= error) and error <= worst + 1e-9


class TestTwoVersions:
    """Nobody can tell which side is the base's."""

    @pytest.mark.parametrize(
        ("deltas", "agreeing"),
        [
            ((None, 0, None), "0 and 2"),
            ((0, 0, None), "0 and 1"),
            ((1, 0, 0), "1 and 2"),
            ((0, 1, 0, 0), "0, 2 and 3"),
        ],
        ids=["left alone", "share an adapter", "share one beside another's", "three share one"],
    )
    @pytest.mark.parametrize("solver", [Auto(), Auto(lattice=None)], ids=["bits", "no bits"])
    def test_agreement_is_an_assumption_with_a_range_that_holds(self, deltas, agreeing, solver):
        stack = merged(*(None if seed is None else lora(seed) for seed in deltas))
        recovery = solver.solve(stack)
        certificate = certify(stack, recovery, torch.float32)
        assert recovery.method == "unchanged"
        assert certificate.verdict is Verdict.APPROXIMATE
        assert certificate.reason == (
            f"exact, if models {agreeing} agree in every bit because the matrix was left alone"
        )
        assert in_range(stack, recovery, W)

    @pytest.mark.parametrize("alone", [(0, 1), (2,)], ids=["those that agree", "the third"])
    def test_the_grid_of_the_base_decides(self, alone):
        base = nearest(W, torch.bfloat16).float()
        stack = Stack.of([base if i in alone else (base.double() + lora(0)).float() for i in range(3)])
        recovery = Auto().solve(stack)
        assert certify(stack, recovery, torch.float32).verdict is Verdict.EXACT
        assert torch.equal(recovery.weight.float(), base)

    def test_two_groups_prove_nothing(self):
        assert Auto().solve(merged(lora(0), lora(0), None, None)).method != "unchanged"


class TestThreeVersions:
    """The ranks of the differences tell whether those that agree have a delta."""

    def test_an_adapter_that_two_models_share_is_taken_off(self):
        stack = merged(lora(0), lora(0), lora(1), lora(2))
        recovery = Auto().solve(stack)
        certificate = certify(stack, recovery, torch.float32)
        assert certificate.verdict in (Verdict.FLOOR, Verdict.APPROXIMATE), certificate.reason
        assert recovery.ranks == (2, 2, 2, 2)
        assert w_error(recovery.weight, W) < -14
        assert in_range(stack, recovery, W)

    @pytest.mark.parametrize("order", [(None, None, 1, 2), (1, None, 2, None)])
    def test_what_they_left_alone_is_exact(self, order):
        stack = merged(*(None if seed is None else lora(seed) for seed in order))
        recovery = Auto().solve(stack)
        certificate = certify(stack, recovery, torch.float32)
        assert certificate.verdict is Verdict.EXACT
        assert "and the others show that base" in certificate.reason
        assert torch.equal(recovery.weight.float(), W)
        assert [rank > 0 for rank in recovery.ranks] == [seed is not None for seed in order]

    @pytest.mark.parametrize(("size", "hides"), [(1e-5, True), (1.0, False)])
    def test_deltas_below_a_step_of_float32_hide_too(self, size, hides):
        stack = merged(None, None, size * lora(1), size * lora(2))
        kept = solve_versions(stack, lambda part, rank: left_alone(part, 0, "sign"), None)
        assert kept.left_alone
        assert (certify(stack, kept, torch.float32).verdict is Verdict.EXACT) != hides

    def test_a_light_adapter_that_half_precision_hides_is_not_called_exact(self):
        base = W.bfloat16()
        sizes = (0.1, 0.01, 0.01, 0.1)
        stack = Stack.of(
            [(base.double() + size * lora(seed)).bfloat16() for size, seed in zip(sizes, (0, 1, 1, 2), strict=True)]
        )
        recovery = Auto().solve(stack)
        certificate = certify(stack, recovery, torch.bfloat16)
        assert recovery.method == "unchanged"
        assert certificate.verdict is Verdict.APPROXIMATE
        assert certificate.reason == (
            "exact, if models 1 and 2 agree in every bit (the others allow it) because the matrix was left alone"
        )
        assert float("-inf") < w_error(recovery.weight, base) <= certificate.worst_w_error

    def test_what_most_leave_alone_is_not_taken_from_one_that_hardly_changed_it(self):
        base = W.bfloat16()
        sizes = (0.0, 0.1, 0.0, 0.01, 0.0)
        stack = Stack.of([(base.double() + size * lora(seed)).bfloat16() for seed, size in enumerate(sizes)])

        def take_the_lightest(versions: Stack, rank: int | None) -> Recovery:
            return left_alone(versions, 2, "model 2 shows no change of its own", 1e-9)

        recovery = solve_versions(stack, take_the_lightest, None)
        certificate = certify(stack, recovery, torch.bfloat16)
        assert torch.equal(recovery.weight.bfloat16(), base)
        assert certificate.verdict is Verdict.APPROXIMATE
        assert certificate.reason == (
            "exact, if models 0, 2 and 4, most of all, agree in every bit because the matrix was left alone"
        )
        assert certificate.worst_w_error == pytest.approx(w_error(stack.matrices[3], base), abs=1e-6)

    def test_an_adapter_that_most_share_is_taken_off_where_it_shows(self):
        base = W.bfloat16()
        stack = Stack.of([(base.double() + 20 * lora(seed)).bfloat16() for seed in (0, 0, 0, 1, 2)])
        recovery = Auto().solve(stack)
        assert recovery.ranks == (2, 2, 2, 2, 2)
        assert in_range(stack, recovery, base)

    def test_two_pairs_and_another(self):
        stack = merged(lora(0), lora(1), lora(0), lora(1), lora(2))
        recovery = Auto().solve(stack)
        assert recovery.ranks == (2, 2, 2, 2, 2)
        assert in_range(stack, recovery, W)

    def test_others_that_are_not_low_rank_confirm_nothing(self):
        others = [normal(seeded(seed), *SHAPE) for seed in (7, 8)]
        stack = merged(lora(0), lora(0), *others)
        recovery = Auto().solve(stack)
        assert certify(stack, recovery, torch.float32).verdict is Verdict.APPROXIMATE
        assert in_range(stack, recovery, W)
