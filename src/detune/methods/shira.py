"""Fine-tunes that change few entries each: an entry that two models share, bit for bit, is the base's.

SHiRA (Bhardwaj et al. 2024, arXiv 2406.13175) trains a random choice of a matrix's entries and leaves the others as
they are. With a share p changed in every model, and choices that are independent, fewer than two of n models have the
base's entry with the probability `p^n + n p^(n-1) (1 - p)`: 3 p² for three models, 5 p⁴ for five. Where all models
train the same entries, which PEFT's choices are if no `random_seed` is given, the base's values are in none of them.
"""

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from detune.problem.recovery import NotRecoverable, Recovery
from detune.problem.stack import Stack

# The changes are not sparse where two models agree in fewer than half of the entries (definition).
LEAST_AGREED = 0.5
# All models changed the same entries if those in which no two agree are twice as many as independent choices leave, and
# ten more. By chance that comes less than once in a million matrices (derived: Poisson's law, 3e-7 at most).
MORE_THAN_CHANCE = 2.0
A_FEW = 10
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class SHiRA:
    """Entry by entry the value that most models have.

    Where no two agree, the median stands in if one model is likely to have the base's value, else the mean.
    """

    min_models: ClassVar[int] = 3
    low_rank: ClassVar[bool] = False
    working_copies: ClassVar[int] = 10

    def solve(self, stack: Stack, rank: int | None = None) -> Recovery:
        """Vote; see `Solver.solve`. `rank` plays no part.

        Raises:
            NotRecoverable: In most entries no two models agree, or fewer than three models.
        """
        stack.require_finite(torch.stack([W_i.sum(dtype=torch.float64) for W_i in stack.matrices]))
        if stack.n < self.min_models:
            raise NotRecoverable(f"{stack.n} models: nothing tells which of two changed an entry", "add a model")
        # Bits are counted in the dtype that most models have; others have no say.
        dtype = Counter(W_i.dtype for W_i in stack.matrices).most_common(1)[0][0]
        alike = [W_i.to(stack.device) for W_i in stack.matrices if W_i.dtype is dtype]
        bits = [W_i.contiguous().view(_INTEGERS[dtype.itemsize]) for W_i in alike]
        ballots = torch.stack(bits)
        votes = torch.stack([(ballots == b).sum(dim=0) for b in bits])
        most, winner = votes.max(dim=0)
        elected = ballots.gather(0, winner[None])[0]
        # Two values with as many votes contradict each other.
        tied = ((votes == most) & (ballots != elected)).any(dim=0)
        agreed = most.ge(2) & ~tied
        share = float(agreed.double().mean())
        if share < LEAST_AGREED:
            raise NotRecoverable(
                f"no two models agree in {100 * (1 - share):.3g} % of the entries of a "
                f"{stack.shape[0]}x{stack.shape[1]} matrix",
                "expected fine-tunes that change few entries each",
                "try another method, or mean",
            )
        models = torch.stack([W_i.to(stack.device, stack.dtype) for W_i in stack.matrices])
        missing = int(agreed.logical_not().count_nonzero())
        changed = float(torch.where(agreed, (ballots != elected).double().mean(dim=0), 1.0).mean())
        by_chance = stack.n * changed ** (stack.n - 1) * agreed.numel()
        alone = missing > MORE_THAN_CHANCE * by_chance + A_FEW
        fallback = models.mean(dim=0) if alone else _median(models)
        weight = torch.where(agreed, elected.view(dtype).to(stack.dtype), fallback)
        return Recovery(
            weight,
            "shira",
            "entry by entry the bits that most models have"
            + (f"; the {'mean' if alone else 'median'} stands in for {missing} without" if missing else ""),
            agreed=agreed,
        )


def _median(models: Tensor) -> Tensor:
    """The median; of an even number, the mean of the two in the middle."""
    middle: Tensor = torch.quantile(models.flatten(1), 0.5, dim=0).view_as(models[0])
    return middle
