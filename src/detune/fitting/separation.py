"""Which models have adapters whose spaces are told apart: three of them are enough for the closed form.

The sizes of differences do not always tell which adapters have a part in common: of four models, the distances that two
of them make by such a part could be those of the other two. Their spaces tell. Of W + A, W + B and W + A/2 + D the
closed form takes a part of A for what the base has, and finds spaces that it can hardly tell apart.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, islice

from detune.fitting.differences import Differences
from detune.fitting.subspaces import GOOD_SEPARATION, RowSpaces, find_spaces
from detune.problem.balance import Balance
from detune.problem.recovery import FEWEST_MODELS, NotRecoverable

# Spaces this close (sin^2 of the angle) are doubted: of models that are not independent it was below 0.06, of
# others 0.8 and more, in 180 random sets (any number does between).
CLOSE = 0.1
# Threes that are looked at: of five models all ten (any number does: each takes as long as the closed form).
MOST_LOOKED_AT = 10


@dataclass(frozen=True)
class Chosen:
    """Models that are to be solved by the closed form, and what it begins with.

    Attributes:
        models: Which.
        differences: Theirs; of scaled matrices where there is a balance.
        balance: The scaling.
        rank: The most that any `M_i` can have.
        seed: Seed of the sketches.
    """

    models: tuple[int, ...]
    differences: Differences
    balance: Balance | None = None
    rank: int | None = None
    seed: int = 0

    @cached_property
    def spaces(self) -> RowSpaces:
        """The adapters' spaces; raises what `find_spaces` does."""
        return find_spaces(self.differences, self.rank, self.seed)

    @property
    def separation(self) -> float:
        """How well the spaces are told apart; 0 where the closed form does not apply."""
        try:
            return self.spaces.separation
        except NotRecoverable:
            return 0.0


def well_separated(n: int, models: tuple[int, ...], choose: Callable[[tuple[int, ...]], Chosen]) -> Chosen:
    """Choose the models, or three others where their spaces are told apart and those of the models are not.

    Args:
        n: Number of all models.
        models: Those that seem to be independent of each other.
        choose: Finds the differences of some.
    """
    first = choose(models)
    if n <= FEWEST_MODELS or first.separation >= CLOSE:
        return first
    # Two of a three that share a part may be told apart from the third, with that part in the base.
    threes = sorted(combinations(range(n), FEWEST_MODELS), key=lambda three: not set(three) <= set(models))
    others = (choose(three) for three in threes if three != models)
    # An adapter below the noise shows no space.
    shown = (each for each in islice(others, MOST_LOOKED_AT) if all(each.differences.ranks))
    return next((each for each in shown if each.separation >= GOOD_SEPARATION), first)
