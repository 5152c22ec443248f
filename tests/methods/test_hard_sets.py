"""Sets that are hard to recover: each reaches the floor, or the verdict says that it does not."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from detune.certificate.certify import Certificate, Verdict, certify
from detune.methods import Auto
from detune.metrics import w_error
from detune.problem import NotRecoverable, Stack
from tests.cases import normal, rms, seeded

Deltas = list[Tensor]


ALL = (torch.float64, torch.float32, torch.bfloat16)
# In float64 it is mostly the computation's own rounding that limits the answer.
STORED = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class HardSet:
    """One row of the table.

    Attributes:
        deltas: Draws the `M_i`, each with entries of size about 1.
        floor: The dtypes in which the floor is reached. In the others the verdict may say that it is not; if it does
            not say so, the prediction must be right.
        shape: `(out, in)`.
        rank: What the caller says.
        refused: What the refusal says, where there is one.
    """

    deltas: Callable[[torch.Generator, tuple[int, int]], Deltas]
    floor: tuple[torch.dtype, ...] = ()
    shape: tuple[int, int] = (48, 40)
    rank: int | None = None
    refused: str = ""


def lora(generator: torch.Generator, shape: tuple[int, int], rank: int, rows: Tensor | None = None) -> Tensor:
    """A random delta of rms 1, with given row factors or random ones."""
    left = normal(generator, shape[0], rank)
    M_i = left @ (normal(generator, shape[1], rank) if rows is None else rows).mT
    return M_i / rms(M_i)


def free(rank: int, n: int = 3) -> Callable[[torch.Generator, tuple[int, int]], Deltas]:
    return lambda generator, shape: [lora(generator, shape, rank) for _ in range(n)]


def one_seed(overlap: float) -> Callable[[torch.Generator, tuple[int, int]], Deltas]:
    def draw(generator: torch.Generator, shape: tuple[int, int]) -> Deltas:
        start = normal(generator, shape[1], 3)
        own = [normal(generator, shape[1], 3) for _ in range(3)]
        rows = [overlap**0.5 * start + (1 - overlap) ** 0.5 * trained for trained in own]
        return [lora(generator, shape, 3, rows_i) for rows_i in rows]

    return draw


def successive_checkpoints(generator: torch.Generator, shape: tuple[int, int]) -> Deltas:
    """`M_{i+1} = M_i + small`: both factors move by 5 % from one to the next."""
    left, right = normal(generator, shape[0], 3), normal(generator, shape[1], 3)
    deltas = []
    for _ in range(3):
        left, right = left + 0.05 * normal(generator, *left.shape), right + 0.05 * normal(generator, *right.shape)
        deltas.append(left @ right.mT / rms(left @ right.mT))
    return deltas


def shared_row(generator: torch.Generator, shape: tuple[int, int]) -> Deltas:
    """One input direction that every adapter reads, each in its own way, beside others."""
    row = normal(generator, shape[1], 1)
    return [lora(generator, shape, 2) + lora(generator, shape, 1, row) for _ in range(3)]


def frozen_a(generator: torch.Generator, shape: tuple[int, int]) -> Deltas:
    A = normal(generator, shape[1], 3)
    return [lora(generator, shape, 3, A) for _ in range(4)]


def one_weak(generator: torch.Generator, shape: tuple[int, int]) -> Deltas:
    return [lora(generator, shape, 3), lora(generator, shape, 3), 1e-3 * lora(generator, shape, 3)]


SETS = {
    "one seed, rows overlap by 0.97": HardSet(one_seed(0.97), STORED),
    "one seed, rows overlap by 0.999": HardSet(one_seed(0.999), STORED),
    "successive checkpoints": HardSet(successive_checkpoints),
    "a row direction that all share": HardSet(shared_row),
    "a row direction that all share, the rank told": HardSet(shared_row, rank=3),
    "one frozen A": HardSet(frozen_a),
    "one frozen A, the rank told": HardSet(frozen_a, rank=3),
    "one LoRA a thousandth as strong": HardSet(one_weak, STORED),
    "rank 5 where 16 is told": HardSet(free(5), STORED, rank=16),
    "8x3": HardSet(free(1), shape=(8, 3)),
    "5x64": HardSet(free(1), STORED, shape=(5, 64)),
    "64x5": HardSet(free(1), STORED, shape=(64, 5)),
    "2x2": HardSet(free(1), shape=(2, 2), refused="too high for 3 models of a 2x2 matrix"),
    "three ranks fill the larger side": HardSet(free(12), shape=(36, 36)),
    "three ranks are one too many": HardSet(free(13), shape=(36, 36)),
    "two ranks fill the smaller side": HardSet(free(10), shape=(20, 60), refused="differ at full rank"),
    "two ranks are too many": HardSet(free(11), shape=(20, 60), refused="differ at full rank"),
}
STEP = {dtype: torch.finfo(dtype).eps for dtype in STORED}
SIZE = {torch.float64: 0.1, torch.float32: 0.1, torch.bfloat16: 0.5}


@dataclass(frozen=True)
class Solved:
    certificate: Certificate
    w_error: float


def solve(case: HardSet, dtype: torch.dtype, seed: int = 0) -> Solved:
    generator = seeded(seed)
    W_star = normal(generator, *case.shape)
    stack = Stack.of(torch.stack([W_star + SIZE[dtype] * M_i for M_i in case.deltas(generator, case.shape)]).to(dtype))
    recovery = Auto().solve(stack, case.rank)
    return Solved(certify(stack, recovery, stored=dtype), w_error(recovery.weight.to(dtype), W_star))


@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize("name", SETS)
def test_reaches_the_floor_or_says_that_it_does_not(name, dtype):
    case = SETS[name]
    if case.refused:
        with pytest.raises(NotRecoverable, match=case.refused):
            solve(case, dtype)
        return
    solved = solve(case, dtype)
    certificate = solved.certificate
    assert certificate.verdict is not Verdict.EXACT
    if dtype in case.floor and not certificate.reason.startswith("exact, if"):
        assert certificate.verdict is Verdict.FLOOR, certificate.reason
    if certificate.reason.startswith("exact, if"):
        assert solved.w_error <= certificate.worst_w_error
    if certificate.verdict is Verdict.FLOOR:
        assert certificate.predicted_w_error == pytest.approx(solved.w_error, abs=0.3)
    if certificate.verdict is Verdict.NOT_DETERMINED:
        assert certificate.predicted_w_error is None
        assert certificate.undetermined > 0


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("turned", [False, True], ids=["A", "B"])
@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_one_frozen_factor_never_gives_a_confident_answer(dtype, turned, seed):
    """Whatever ranks fit best, the rank not told: part of W is hidden, and either the misfit or the verdict says so."""
    generator, pick = seeded(seed), random.Random(seed)
    W_star, rank = normal(generator, 48, 40), pick.randint(1, 6)
    A, size = normal(generator, 40, rank), STEP[dtype] * 10 ** pick.uniform(0, 3)
    models = [W_star + size * lora(generator, (48, 40), rank, A) for _ in range(pick.randint(3, 7))]
    stack = Stack.of([(W_i.mT if turned else W_i).to(dtype) for W_i in models])
    certificate = certify(stack, Auto().solve(stack))
    assert certificate.verdict in (Verdict.APPROXIMATE, Verdict.NOT_DETERMINED), certificate.reason


def test_what_all_adapters_share_is_taken_for_the_base_and_the_certificate_says_so():
    """`W + N` with lower ranks explains the same data: nobody can tell, so the assumption must be said."""
    generator = seeded()
    W_star, N = normal(generator, 48, 40), lora(generator, (48, 40), 1)
    stack = Stack.of(torch.stack([W_star + N + lora(generator, (48, 40), 3) for _ in range(3)]).float())
    recovery = Auto().solve(stack)
    certificate = certify(stack, recovery)
    assert recovery.ranks == (3, 3, 3)
    assert w_error(recovery.weight, W_star + N) < -13
    assert certificate.verdict is Verdict.FLOOR
    assert "in which no part is common to all adapters" in certificate.reason


@pytest.mark.parametrize(("name", "dimension"), [("a row direction that all share", 1), ("one frozen A", 3)])
def test_counts_what_a_shared_row_space_hides(name, dimension):
    """Whatever W is there, in each of its rows."""
    case = SETS[f"{name}, the rank told"]
    assert solve(case, torch.float32).certificate.undetermined == dimension * case.shape[0]
