"""The answer of some of the models, with the deltas of all: the others' are their differences from it."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from detune.fitting.differences import find_differences
from detune.fitting.normal_operator import NormalOperator
from detune.identifiability.null_space import basis_error_variances, undetermined
from detune.numerics.linalg import thin_svd
from detune.problem.low_rank import LowRank, SVDFactors
from detune.problem.recovery import NotLowRank, NotRecoverable, Recovery
from detune.problem.stack import Stack
from detune.problem.storage_noise import FLOOR_RATIO

# A base in float32 may have been rounded to bf16 before its merge was: the variance is twice that of one rounding
# (derived).
ROUNDED_TWICE = 2**0.5

# The models that a sentence names, by their numbers in the stack.
NUMBERED = re.compile(r"(?<=\bmodel )\d+|(?<=\bmodels )\d+(?:, \d+)*(?: and \d+)?")

Solve = Callable[[Stack, int | None], Recovery]


def renumbered(reason: str, models: Sequence[int]) -> str:
    """A sentence about a part of some models, with the numbers that these have among all.

    Args:
        reason: What is said of the part.
        models: The number of each of its models.

    Example:
        >>> renumbered("models 0 and 2 agree, model 1 does not", (1, 3, 4))
        'models 1 and 4 agree, model 3 does not'
    """
    return NUMBERED.sub(lambda listed: re.sub(r"\d+", lambda each: str(models[int(each[0])]), listed[0]), reason)


def solve_from(
    stack: Stack, models: tuple[int, ...], solve: Solve, rank: int | None, why_not_all: str
) -> Recovery | None:
    """The answer of some models, with the deltas of all.

    Args:
        stack: The models.
        models: Those that the answer is from.
        solve: What recovers from them.
        rank: The most that any `M_i` can have.
        why_not_all: What is said of the others.

    Returns:
        The recovery; None where these are not enough, and where another model does not differ from their answer by a
        low rank.
    """
    part = stack.part(models)
    try:
        found = solve(part, rank)
        if not _is_enough(part, found):
            return None
        deltas = {i: _left_over(stack, i, found, rank) for i in range(stack.n) if i not in models}
    except NotRecoverable:
        return None
    deltas = {**deltas, **dict(zip(models, found.deltas, strict=True))} if found.deltas else {}
    names = ", ".join(map(str, models))
    return replace(
        found,
        reason=f"{renumbered(found.reason, models)}; from model{'s' * (len(models) > 1)} {names}: {why_not_all}",
        deltas=tuple(deltas[i] for i in sorted(deltas)),
        ranks=tuple(deltas[i].rank for i in sorted(deltas)),
        residuals=None,
        source_models=tuple(models[i] for i in found.source_models) or models,
    )


def source_part(stack: Stack, recovery: Recovery) -> tuple[Stack, Recovery]:
    """The models that an answer of `solve_from` is from, and that answer with no others' deltas."""
    chosen = recovery.source_models if recovery.deltas else ()
    deltas = tuple(recovery.deltas[i] for i in chosen)
    ranks = tuple(recovery.ranks[i] for i in chosen)
    return stack.part(recovery.source_models), replace(recovery, deltas=deltas, ranks=ranks, source_models=())


def _is_enough(part: Stack, found: Recovery) -> bool:
    """Whether the others have nothing to add: the answer is at the noise, and the only one."""
    if not found.deltas:
        return True
    if found.noise_ratio is None or found.noise_ratio > FLOOR_RATIO:
        return False
    if found.bits is not None:
        return True
    spaces = [SVDFactors.of(M_i) for M_i in found.deltas]
    operator = NormalOperator.of([space.U for space in spaces], [space.V for space in spaces])
    return not undetermined(operator, *basis_error_variances(part, spaces))


def _left_over(stack: Stack, model: int, found: Recovery, rank: int | None) -> LowRank:
    """The difference of a model from the answer that stands over the model's noise."""
    W_i = stack.matrices[model]
    noise = ROUNDED_TWICE * float(stack.noise[model])
    pair = Stack((found.weight.to(W_i.device), W_i), stack.dtype, stack.device, noise_override=(0.0, noise))
    difference = find_differences(pair).of(0, 1)
    if difference.full_rank:
        raise NotLowRank((difference.pair,), stack.shape)
    if not difference.rank:
        return LowRank(stack.zeros(stack.shape[0], 0), stack.zeros(stack.shape[1], 0))
    right = difference.basis.to(stack.dtype)
    left = (W_i.to(stack.device, stack.dtype) - found.weight) @ right
    U, S, V = thin_svd(left)
    return LowRank((U * S)[:, :rank], (right @ V.to(right))[:, :rank])
