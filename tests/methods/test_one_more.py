"""One model more never hurts: copies, later checkpoints and merges of others beside three independent adapters."""

import pytest
import torch

from detune.methods import Auto
from detune.metrics import w_error
from detune.problem import Stack
from tests.cases import normal, rms, seeded

SHAPE = (128, 112)


def lora(generator: torch.Generator, rank: int) -> torch.Tensor:
    return 1e-3 * normal(generator, SHAPE[0], rank) @ normal(generator, rank, SHAPE[1])


MORE = {
    "a copy of the first at another strength": lambda a, b, c, d: 0.7 * a,
    "a copy of the last": lambda a, b, c, d: 0.7 * c,
    "a later checkpoint": lambda a, b, c, d: c + 0.3 * d,
    "a merge of two": lambda a, b, c, d: (a + b) / 2,
    "an independent one": lambda a, b, c, d: d,
}


@pytest.mark.parametrize("more", MORE)
@pytest.mark.parametrize("first", [False, True], ids=["last", "first"])
@pytest.mark.parametrize("seed", range(2))
def test_one_model_more_never_hurts(more, first, seed):
    generator = seeded(seed)
    W_star = normal(generator, *SHAPE) / 20
    a, b, c, d = (lora(generator, rank) for rank in (8, 4, 8, 2))
    three = [a, b, c]
    four = [MORE[more](a, b, c, d), *three] if first else [*three, MORE[more](a, b, c, d)]
    alone, together = (Auto().solve(Stack.of([(W_star + M_i).float() for M_i in models])) for models in (three, four))
    assert w_error(together.weight, W_star) <= w_error(alone.weight, W_star) + 0.1
    assert len(together.deltas) == 4


@pytest.mark.parametrize("more", MORE)
@pytest.mark.parametrize("size", [0.3, 3.0], ids=["light", "ordinary"])
def test_nor_does_one_in_half_precision(more, size):
    """Deltas in units in the last place; bits that the three leave open are known better with the fourth."""
    generator = seeded(1)
    W_star = (normal(generator, *SHAPE) / 20).bfloat16()
    deltas = [lora(generator, rank) for rank in (8, 4, 8, 2)]
    a, b, c, d = (size * 2.0**-13 * M_i / rms(M_i) for M_i in deltas)
    three = [a, b, c]
    alone, together = (
        Auto().solve(Stack.of([(W_star.double() + M_i).bfloat16() for M_i in models]))
        for models in (three, [*three, MORE[more](a, b, c, d)])
    )
    wrong = [float((found.weight.bfloat16() != W_star).double().mean()) for found in (alone, together)]
    assert wrong[1] <= 1.1 * wrong[0] + 1e-3
    assert len(together.deltas) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_nor_does_one_on_half_of_another(dtype, seed):
    """By the sizes of differences alone it could be the other two that have a part in common."""
    generator = seeded(seed)
    W_star = (normal(generator, *SHAPE) / 20).to(dtype)
    sizes = (4 + 12 * torch.rand(4, generator=generator)).tolist()
    deltas = [lora(generator, rank) for rank in (4, 1 + seed % 4, 2, 3)]
    a, b, c, d = (size * 2.0**-13 * M_i / rms(M_i) for size, M_i in zip(sizes, deltas, strict=True))
    three = [a, b, c]
    alone, together = (
        Auto().solve(Stack.of([(W_star.double() + M_i).to(dtype) for M_i in models]))
        for models in (three, [*three, a / 2 + d])
    )
    assert w_error(together.weight, W_star) <= w_error(alone.weight, W_star) + 0.1
