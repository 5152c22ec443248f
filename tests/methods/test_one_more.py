"""One model more never hurts: copies, later checkpoints and merges of others beside three independent adapters."""

import pytest
import torch

from detune.methods import Auto
from detune.metrics import w_error
from detune.problem import Stack
from tests.cases import normal, seeded

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
