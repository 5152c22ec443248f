"""Models that agree in every bit of a matrix: they left it alone, or share what they made of it.

Of two that agree and a third nobody can tell: either side may be the base's. What can be said is what the third differs
by, which is how far the base may be off. A third version decides: where the ranks of the differences add up without
those that agree having one, or where the base's grid shows. In half precision it confirms no more than that: a light
delta changes few entries there, and those are the ones of which nothing is certain. Nor does it refute there what most
models say: which of two matrices is the base's and which one lightly changed is seen in no difference.
"""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from detune.numerics.float_grid import HALVES
from detune.problem.recovery import FEWEST_MODELS, Recovery, left_alone
from detune.problem.stack import Stack
from detune.source_models.solve_from import solve_from

# Where an entry is not certain it says nothing, and too few of them say too little (any number does:
# `benchmarks/constants.py`).
MOST = 0.5
# Deltas of some steps show in every entry: a step is the square root of twelve times the noise (derived).
HIDING = 12.0


def unchanged(stack: Stack) -> Recovery | None:
    """The matrix of models that agree in every bit, taken for the base's.

    None where no two agree, and where two groups do, which contradict each other.

    Raises:
        NonFinite: A model holds NaN or Inf.
    """
    groups = stack.versions
    agreeing = [group for group in groups if len(group) > 1]
    if len(agreeing) != 1:
        return None
    model = agreeing[0][0]
    # If these share an adapter, another's matrix may be the base's.
    hidden = [stack.distance(model, group[0]) for group in groups if group[0] != model]
    return left_alone(stack, model, _agree(agreeing[0]), max(hidden, default=0.0))


def solve_versions(stack: Stack, solve: Callable[[Stack, int | None], Recovery], rank: int | None) -> Recovery | None:
    """The answer of one model of each version, where some models agree and there are three versions or more.

    Args:
        stack: The models.
        solve: What recovers from models of which no two agree.
        rank: The most that any `M_i` can have.

    Returns:
        The answer; with the bits of models that agree, where the others confirm them: in half precision as far as
        another version is off. There the bits that most models agree in need no more than that the others do not speak
        clearly against them. None where no two agree, there are too few versions, or they do not have an answer.
    """
    groups = stack.versions
    if not FEWEST_MODELS <= len(groups) < stack.n:
        return None
    firsts = tuple(group[0] for group in groups)
    found = solve_from(stack, firsts, solve, rank, "the others agree with one of these in every bit")
    if found is None:
        return None
    for group in groups:
        if len(group) > 1 and _confirms(found, stack.matrices[group[0]]):
            unseen = _unseen(stack, group, groups)
            how = " (the others allow it)" if unseen else ", and the others show that base"
            kept = left_alone(stack, group[0], f"{_agree(group)}{how}", unseen)
            return replace(kept, deltas=found.deltas, ranks=found.ranks)
    most = max(groups, key=len)
    if 2 * len(most) > stack.n and stack.rounded_dtypes[most[0]] in HALVES and not _is_clear(found):
        return left_alone(stack, most[0], _agree(most, ", most of all,"), _unseen(stack, most, groups))
    return found


def _agree(group: tuple[int, ...], how_many: str = "") -> str:
    *most, last = map(str, group)
    return f"models {', '.join(most)} and {last}{how_many} agree in every bit"


def _confirms(found: Recovery, own: Tensor) -> bool:
    """Whether an answer has a model's own bits, wherever it is certain of them."""
    if not found.left_alone and (found.bits is None or found.bits.share < MOST):
        return False
    same = found.weight.eq(own.to(found.weight))
    return bool((same if found.bits is None else same[found.bits.certain]).all())


def _is_clear(found: Recovery) -> bool:
    """Whether an answer shows a delta of every model, and most of the base's bits where it is about these."""
    return all(found.ranks) and bool(found.deltas) and (found.bits is None or found.bits.share >= MOST)


def _unseen(stack: Stack, agreeing: tuple[int, ...], groups: tuple[tuple[int, ...], ...]) -> float:
    """Mean square of the delta that models which agree may share: an independent one is no larger than a difference.

    Nothing where differences are so far over the models' rounding that no delta hides in it.
    """
    model = agreeing[0]
    nearest = min(stack.distance(model, group[0]) for group in groups if group != agreeing)
    hides = stack.rounded_dtypes[model] in HALVES or nearest < (HIDING * float(stack.noise.max())) ** 2
    return nearest if hides else 0.0
