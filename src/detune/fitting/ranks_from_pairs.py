"""Each model's rank from the ranks of differences."""

from collections.abc import Mapping

import numpy as np


def solve_ranks(pair_ranks: Mapping[tuple[int, int], int], n: int) -> tuple[int, ...]:
    """Integer least squares for `rank(W_i - W_j) = r_i + r_j`.

    The real solution is rounded, then single steps up and down are taken while they lower the misfit.

    Args:
        pair_ranks: `{(i, j): rank(W_i - W_j)}`. The pairs must determine the ranks: connected, with an odd cycle.
        n: Number of models.

    Returns:
        `r_i >= 0` for every model.

    Example:
        >>> solve_ranks({(0, 1): 24, (1, 2): 12, (0, 2): 20}, n=3)
        (16, 8, 4)
    """
    pairs = list(pair_ranks)
    incidence = np.zeros((len(pairs), n))
    for row, pair in enumerate(pairs):
        incidence[row, list(pair)] = 1
    observed = np.array([pair_ranks[pair] for pair in pairs], dtype=float)
    ranks = np.maximum(np.rint(np.linalg.lstsq(incidence, observed, rcond=None)[0]), 0)

    def misfit(candidate: np.ndarray) -> float:
        return float(np.square(incidence @ candidate - observed).sum())

    steps = np.vstack([np.eye(n), -np.eye(n)])
    while True:
        candidates = [c for c in ranks + steps if c.min() >= 0]
        best = min(candidates, key=misfit)
        if misfit(best) >= misfit(ranks):
            return tuple(int(r) for r in ranks)
        ranks = best
