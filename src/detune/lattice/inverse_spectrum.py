"""The inverse of many small matrices on average, from random matrix theory: compiled, a row at a time."""

import numpy as np
from numpy.typing import NDArray

from detune.lattice.truncated_normal import compiled

Singles = NDArray[np.float32]

# Numbers that are added up side by side, in vector instructions (any number does).
WIDE = 16
# The fixed point of the spectrum is known well enough to one per cent; it is approached from below (any number does).
MOST_TURNS, NEAR = 16, 0.01


@compiled
def inverse_spectrum(
    precision: Singles, energy: Singles, prior: Singles, variance: Singles, curvature: Singles
) -> None:
    """Fill in the mean of the inverse's eigenvalues of each row's `N = diag(prior) + sum_b p_b x_b x_b^T`.

    In r dimensions, with x of any directions, it is close to the m of

        m = (1/r) sum_j 1 / (prior_j + e),    e = sum_b p_b q_b / (1 + r m p_b q_b),

    where q is the mean square of the numbers in x: the deterministic equivalent of random matrix theory, from which a
    fixed-point iteration is away by a few steps (Silverstein & Bai 1995, doi 10.1006/jmva.1995.1051). One dimension has
    nothing to average, and N itself.

    Args:
        precision: p, `(rows, in)`.
        energy: q, `(in,)`.
        prior: `(r,)`.
        variance: m is filled in, `(rows,)`.
        curvature: e is filled in, `(rows,)`.
    """
    rows, columns = precision.shape
    r, sums, one = len(prior), np.empty(WIDE, dtype=np.float32), np.float32(1)
    seen = np.zeros((columns + WIDE - 1) // WIDE * WIDE, dtype=np.float32)
    for a in range(rows):
        for b in range(columns):
            seen[b] = precision[a, b] * energy[b]
        m = np.float32(0)
        for _ in range(MOST_TURNS):
            before, times = m, np.float32(r if r > 1 else 0) * m
            sums[:] = 0
            for first in range(0, len(seen), WIDE):
                for lane in range(WIDE):
                    sums[lane] += seen[first + lane] / (one + times * seen[first + lane])
            e, m = sums.sum(), np.float32(0)
            for j in range(r):
                m += one / (prior[j] + e)
            m /= np.float32(r)
            if m - before < NEAR * m:
                break
        variance[a], curvature[a] = m, e
