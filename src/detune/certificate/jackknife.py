"""Do parts of the models give the same answer? What they disagree by is an error that nobody predicted.

From six models on two disjoint halves are compared: their errors are independent and each has twice the variance of the
whole, so that a quarter of their squared distance is its mean squared error. With four or five every model is left out
in turn, and the jackknife `(n - 1) / n sum_i |W_{-i} - mean|^2` (Efron & Stein 1981, doi 10.1214/aos/1176345462)
estimates the same. Both are on the safe side: fewer models are worse conditioned.
"""

from collections.abc import Callable

import torch

from detune.problem.recovery import NotRecoverable, Recovery
from detune.problem.stack import Stack

# The closed form needs three models: halves have them from six on, all but one from four on (derived).
HALVES_FROM = 6
FEWEST = 4

Solve = Callable[[Stack], Recovery]


def disagreement(stack: Stack, solve: Solve) -> float | None:
    """Mean squared error of the whole's answer by the disagreement of its parts.

    Args:
        stack: All models.
        solve: Recovers from a part of them.

    Returns:
        The error per entry; None for three models or fewer, and where a part cannot be solved.
    """
    if stack.n < FEWEST:
        return None
    everyone = range(stack.n)
    halves = stack.n >= HALVES_FROM
    parts = [everyone[::2], everyone[1::2]] if halves else [[j for j in everyone if j != i] for i in everyone]
    try:
        weights = [solve(stack.part(part)) for part in parts]
    except NotRecoverable:
        return None
    found = torch.stack([recovery.weight for recovery in weights])
    squares = float((found - found.mean(dim=0)).double().square().mean(dim=(1, 2)).sum())
    # |W_a - W_b|^2 / 4 is half of the sum of squares about their mean.
    return squares / 2 if halves else squares * (stack.n - 1) / stack.n
