"""What docs/peft.md says of every fine-tuning method, on merges made by PEFT itself."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import detune
from benchmarks.peft_sets import METHODS, tiny_set
from detune.certificate.verdict import Verdict
from detune.checkpoints import open_checkpoint
from detune.compatibility.model_set import Held
from detune.methods import SOLVERS
from detune.metrics import w_error
from detune.problem import NotRecoverable, Recovery, Stack
from detune.recovery.report import TensorResult
from detune.recovery.tensor import solve_tensor
from tests.cases import rms

# Float32 weights of this size leave about 1e-18; what is recovered but for ill-conditioned directions is above that.
FLOOR = -15.5

# Directions near the noise are searched for in these, which takes many seconds; told the rank, it is quick.
RANKS = {"DeLoRA": 8, "PiSSA": 8, "HRA": 8, "VeRA": 32}

CONFIDENT = (Verdict.EXACT, Verdict.FLOOR)


@cache
def fine_tunes(name: str) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    method = METHODS[name]
    # At PiSSA's own rate the adapters hardly move in so few steps.
    return tiny_set(replace(method, lr=1e-3) if name in ("PiSSA", "OLoRA") else method, 5)


def stack_of(name: str, n: int, key: str = "query.weight") -> tuple[Tensor, tuple[Tensor, ...]]:
    truth, models = fine_tunes(name)
    return truth[key], tuple(model[key] for model in models[:n])


def solved(stack: tuple[Tensor, ...], method: str, rank: int | None = None) -> tuple[TensorResult, Tensor]:
    found = solve_tensor("weight", Held.of(stack), SOLVERS[method](), rank, None, torch.float64)
    return found.result, found.weight


def error_of_mean(W_star: Tensor, stack: tuple[Tensor, ...]) -> float:
    return w_error(torch.stack(stack).double().mean(dim=0), W_star)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("n", [3, 5])
def test_auto_is_never_sure_of_a_wrong_answer(name, n):
    W_star, stack = stack_of(name, n)
    answer, weight = solved(stack, "auto", RANKS.get(name))
    if answer.verdict in CONFIDENT:
        assert w_error(weight, W_star) < error_of_mean(W_star, stack) - 6
        predicted = answer.predicted_w_error
        assert predicted is None or w_error(weight, W_star) <= predicted + 0.5
    else:
        assert answer.verdict in (Verdict.APPROXIMATE, Verdict.NOT_DETERMINED)


LOW_RANK = ["LoRA", "rsLoRA", "AdaLoRA", "GraLoRA", "VB-LoRA", "LoHa"]


@pytest.mark.parametrize("name", LOW_RANK)
@pytest.mark.parametrize("n", [3, 5])
def test_low_ranks_are_recovered_as_they_are(name, n):
    W_star, stack = stack_of(name, n)
    _, weight = solved(stack, "auto")
    assert w_error(weight, W_star) <= FLOOR


def test_the_ranks_are_those_of_the_method():
    ranks = {name: solved(stack_of(name, 3)[1], "auto")[0].ranks for name in ("LoRA", "GraLoRA", "VB-LoRA", "LoHa")}
    assert ranks == {"LoRA": (8,) * 3, "GraLoRA": (16,) * 3, "VB-LoRA": (4,) * 3, "LoHa": (9,) * 3}


class TestPrincipalPart:
    """PiSSA and OLoRA start from a part of the base, and the rest of it is the base of lowest-rank adapters."""

    @pytest.mark.parametrize("name", ["PiSSA", "OLoRA"])
    @pytest.mark.parametrize("n", [3, 5])
    def test_is_found_out_and_the_average_stands_in(self, name, n):
        W_star, stack = stack_of(name, n)
        answer, weight = solved(stack, "auto", 8)
        assert answer.verdict is Verdict.NOT_DETERMINED
        assert answer.method == "mean"
        assert "the adapters start from a part of the base, as PiSSA's do" in answer.reason
        assert w_error(weight, W_star) == pytest.approx(error_of_mean(W_star, stack), abs=1e-6)

    def test_the_closed_form_alone_is_not_believed(self):
        _, stack = stack_of("OLoRA", 3)
        answer, _ = solved(stack, "intersect")
        assert answer.verdict is Verdict.NOT_DETERMINED
        assert "a part of the base is in them" in answer.reason

    def test_checkpoints_of_one_run_are_another_matter(self):
        """Adapters that are nearly the same, on a base that has nothing less where they are."""
        generator = torch.Generator().manual_seed(0)
        W, B, A = (torch.randn(size, generator=generator).double() for size in ((96, 80), (96, 4), (4, 80)))
        stack = []
        for _ in range(3):
            moved = torch.randn(96, 4, generator=generator), torch.randn(4, 80, generator=generator)
            stack.append((W + 0.1 * (B + 0.1 * moved[0]) @ (A + 0.1 * moved[1])).float())
        answer, weight = solved(tuple(stack), "auto", 4)
        assert answer.method == "intersect+polish"
        assert w_error(weight, W) < -11


class TestKronecker:
    @pytest.mark.parametrize("n", [3, 5])
    def test_lokr_is_of_rank_one_rearranged(self, n):
        W_star, stack = stack_of("LoKr", n)
        answer, weight = solved(stack, "lokr")
        assert answer.ranks == (1,) * n
        assert answer.reason.startswith("factors of 8x8 and 12x12: rearranged, closed form")
        assert w_error(weight, W_star) <= -17.5
        assert answer.undetermined == 0

    def test_parts_of_the_models_agree(self):
        _, stack = stack_of("LoKr", 5)
        answer = solve_tensor("weight", Held.of(stack), SOLVERS["lokr"](), None, None, torch.float64, check=True).result
        assert answer.agreement == pytest.approx(answer.predicted_w_error, abs=0.7)

    def test_factors_of_full_rank_too(self):
        W_star, stack = stack_of("LoKr, full factors", 3)
        answer, weight = solved(stack, "lokr")
        assert answer.ranks == (1,) * 3
        assert w_error(weight, W_star) <= -17.5
        assert solved(stack, "auto")[0].verdict is Verdict.NOT_DETERMINED


class TestScaled:
    @staticmethod
    def up_to_scale(weight: Tensor, W_star: Tensor, dim: int) -> float:
        weight, W_star = weight.double(), W_star.double()
        scale = (weight * W_star).sum(dim, keepdim=True) / (weight * weight).sum(dim, keepdim=True)
        return w_error(weight * scale, W_star)

    @pytest.mark.parametrize("n", [3, 5])
    def test_dora_is_recovered_up_to_the_lengths_of_rows(self, n):
        W_star, stack = stack_of("DoRA", n)
        answer, weight = solved(stack, "dora")
        assert answer.verdict is Verdict.NOT_DETERMINED
        assert answer.undetermined == 96
        assert "but for them:" in answer.reason
        assert self.up_to_scale(weight, W_star, 1) <= FLOOR
        assert w_error(weight, W_star) < error_of_mean(W_star, stack) - 0.3

    @pytest.mark.parametrize(("key", "dim"), [("query.weight", 1), ("value.weight", 0)])
    def test_ia3_is_recovered_up_to_the_lengths_of_rows_or_columns(self, key, dim):
        W_star, stack = stack_of("IA3", 3, key)
        answer, weight = solved(stack, "dora")
        assert answer.verdict is Verdict.NOT_DETERMINED
        assert answer.undetermined == 96
        assert self.up_to_scale(weight, W_star, dim) <= FLOOR

    def test_the_deltas_are_those_of_the_models(self):
        _, stack = stack_of("DoRA", 3)
        recovery = SOLVERS["dora"]().solve(Stack.of(stack))
        for W_i, M_i in zip(stack, recovery.deltas, strict=True):
            assert rms(recovery.weight + M_i.dense() - W_i) < 1e-8

    def test_rotations_are_refused(self):
        _, stack = stack_of("OFT", 3)
        with pytest.raises(NotRecoverable, match="do not differ by low ranks and scales of rows or columns; expected"):
            SOLVERS["dora"]().solve(Stack.of(stack))


class TestFrozenFactors:
    @pytest.mark.parametrize("n", [3, 5])
    def test_vera_is_recovered_by_who_knows_the_seed(self, n):
        W_star, stack = stack_of("VeRA", n)
        answer, weight = solved(stack, "vera")
        assert answer.verdict is Verdict.FLOOR
        assert answer.predicted_w_error == pytest.approx(w_error(weight, W_star), abs=0.3)
        assert w_error(weight, W_star) <= -17.5

    def test_another_seed_is_refused(self):
        _, stack = stack_of("VeRA", 3)
        with pytest.raises(NotRecoverable, match="differ outside of the row space of VeRA's A; of seed 1, rank 32"):
            detune.recover_matrix(stack, type(SOLVERS["vera"]())(seed=1))

    def test_weights_held_the_other_way_round(self):
        W_star, stack = stack_of("VeRA", 3)
        turned = tuple(W_i.mT.contiguous() for W_i in stack)
        assert w_error(detune.recover_matrix(turned, "vera").weight, W_star.mT) <= -17.5


class TestSparse:
    def test_shira_gives_the_bits_where_two_models_agree(self):
        W_star, stack = stack_of("SHiRA", 5)
        recovery: Recovery = SOLVERS["shira"]().solve(Stack.of(stack))
        assert recovery.weight[recovery.agreed].float().equal(W_star[recovery.agreed])
        assert recovery.agreed.double().mean() > 0.999

    def test_one_mask_for_all_is_lost_where_it_is(self):
        W_star, stack = stack_of("SHiRA, one mask", 5)
        answer, weight = solved(stack, "shira")
        assert answer.verdict is Verdict.NOT_DETERMINED
        # r (out + in) entries are trained.
        assert answer.undetermined == 4 * (96 + 96)
        assert w_error(weight, W_star) == pytest.approx(error_of_mean(W_star, stack), abs=0.01)

    def test_changes_everywhere_are_refused(self):
        with pytest.raises(NotRecoverable, match="no two models agree in 100 % of the entries of a 96x96"):
            SOLVERS["shira"]().solve(Stack.of(stack_of("LoRA", 3)[1]))


@pytest.mark.parametrize("name", ["OFT", "BOFT", "RoAd", "C3A", "MiSS", "HiRA", "RandLoRA", "FourierFT", "full"])
def test_what_cannot_be_had_is_said_not_to_be(name):
    W_star, stack = stack_of(name, 5)
    answer, weight = solved(stack, "auto")
    assert answer.verdict not in CONFIDENT
    assert w_error(weight, W_star) > -12


def test_rotations_leave_what_they_do_not_change():
    """OFT rotates blocks of columns: their Gram matrices are the base's."""
    W_star, stack = stack_of("OFT", 3)
    blocks, rotated = (W.double().view(96, 6, 16).transpose(0, 1) for W in (W_star, stack[0]))
    error = blocks @ blocks.mT - rotated @ rotated.mT
    assert rms(error) < 1e-4 * rms(blocks @ blocks.mT)


@pytest.mark.parametrize("name", ["LoKr", "DoRA", "SHiRA", "VeRA"])
def test_whole_checkpoints(name, tmp_path):
    """The methods take models that the question for low ranks would turn away."""
    truth, models = fine_tunes(name)
    files = []
    for i, model in enumerate(models[:3]):
        files.append(tmp_path / f"{i}.safetensors")
        save_file(model, files[-1])
    report = detune.recover(files, tmp_path / "base", METHODS[name].solver)
    assert {row.method.partition("+")[0] for row in report.tensors} == {METHODS[name].solver}
    errors = [w_error(open_checkpoint(tmp_path / "base").read(key), truth[key]) for key in truth]
    means = [error_of_mean(truth[key], stack_of(name, 3, key)[1]) for key in truth]
    assert all(error < mean for error, mean in zip(errors, means, strict=True))
