"""The answer of some of the models, with the deltas of all."""

from dataclasses import replace

from torch import Tensor

from detune.methods import Intersect, Mean
from detune.metrics import w_error
from detune.problem import Stack
from detune.source_models.solve_from import solve_from, source_part
from tests.cases import normal, rms, seeded

SHAPE, RANKS = (48, 40), (2, 3, 2, 1)


def lora(seed: int, rank: int) -> Tensor:
    generator = seeded(seed)
    return normal(generator, SHAPE[0], rank) @ normal(generator, rank, SHAPE[1])


W_STAR = normal(seeded(9), *SHAPE)
DELTAS = [lora(i, rank) for i, rank in enumerate(RANKS)]
STACK = Stack.of([W_STAR + M_i for M_i in DELTAS])


def test_the_others_differ_from_the_answer_by_their_deltas():
    recovery = solve_from(STACK, (0, 2, 3), Intersect().solve, None, "for the test")
    assert recovery.source_models == (0, 2, 3)
    assert w_error(recovery.weight, W_STAR) < -25
    assert recovery.ranks == RANKS
    assert all(rms(found.dense() - M_i) < 1e-12 for found, M_i in zip(recovery.deltas, DELTAS, strict=True))
    assert recovery.reason.endswith("; from models 0, 2, 3: for the test")


def test_the_part_has_the_source_models_and_their_deltas_alone():
    recovery = solve_from(STACK, (0, 2, 3), Intersect().solve, None, "for the test")
    part, answer = source_part(STACK, recovery)
    assert [id(W_i) for W_i in part.matrices] == [id(STACK.matrices[i]) for i in (0, 2, 3)]
    assert answer.ranks == (2, 2, 1)
    assert answer.weight is recovery.weight


def test_models_are_said_by_their_numbers_among_all():
    def solve(part: Stack, rank: int | None):
        return replace(
            Intersect().solve(part, rank), reason="model 1 is as rank 2 says, from models 0 and 2 of 3 models"
        )

    recovery = solve_from(STACK, (0, 2, 3), solve, None, "for the test")
    assert recovery.reason.startswith("model 2 is as rank 2 says, from models 0 and 3 of 3 models; from models 0, 2, 3")


def test_no_answer_that_is_not_at_the_noise():
    def solve(part: Stack, rank: int | None):
        return replace(Intersect().solve(part, rank), noise_ratio=3.0)

    assert solve_from(STACK, (0, 2, 3), solve, None, "for the test") is None


def test_no_answer_that_another_model_differs_from_at_full_rank():
    stranger = normal(seeded(30), *SHAPE)
    assert solve_from(Stack.of([*STACK.matrices, stranger]), (0, 1, 2), Intersect().solve, None, "for the test") is None


def test_the_rank_that_is_told_holds_for_the_others():
    recovery = solve_from(STACK, (0, 2, 3), Intersect().solve, 2, "for the test")
    assert recovery.ranks == (2, 2, 2, 1)


def test_an_answer_without_deltas_stays_so():
    def solve(part: Stack, rank: int | None):
        return replace(Mean().solve(part), weight=W_STAR)

    recovery = solve_from(STACK, (0, 1), solve, None, "for the test")
    assert recovery.deltas == recovery.ranks == ()
