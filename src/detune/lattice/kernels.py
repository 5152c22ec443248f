"""Measurements of the base and the adapters by rows of stored entries: compiled loops over matrices.

To second order in a change x of the `M_i`, the logarithm of an entry's probability (`detune.lattice.posterior`) is
`gradient^T x - x^T (diag(precision) - pull pull^T) x / 2`: `pull` is what an entry does not say because its W is open.

numba compiles these loops once and keeps the result. Every function is single-threaded and lets other threads run.

Most functions take the ends of the intervals, `low` and `high`, `(n, rows, in)`, float64; `m`, what the rest of the fit
says of the `M_i`, of the same shape, float32; and `Known`.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from detune.lattice.posterior import SETTLED, SLACK, Floats, Packet, Strip, evaluate, packet_of, sort, strip_of
from detune.lattice.truncated_normal import compiled, spacing

Singles = NDArray[np.float32]

# Entries that are worked on together: they stay in a core's own cache (any number does).
TOGETHER = 2048
# An entry's doubt is looked at from here on: 1e-9 of a normal number is beyond six standard deviations, and the
# certainty of `decode` wants the variance four times as large (derived).
BEYOND_DOUBT = 12.5
LEAST_VARIANCE = 1e-30
# Means are computed in float32, from sums of tens of products (derived).
ROUNDED = 2.0**-22
# Up to this share of a step an M_i may lie outside its interval (a definition).
HARMLESS = 0.01
# A measurement that says nothing still has a precision: no equation is singular (any small number does).
LEAST_SHARE = 1e-9
# An entry never says all that it could of one M_i, nor nothing of all together (any share does that is close to 1).
MOST_SHARE = 0.99999
MOST_PULL = 0.999
NO_PRECISION = 1e-300
# A likelihood ratio that one entry in a hundred may contradict: wild entries must not decide (a definition).
CONTAMINATED = 0.01


class Known(NamedTuple):
    """The variances of the fit, beside its means.

    The variance of `M_i[a, b]` is `q[a] p_columns[b] + p_rows[a] q_columns[b] + lack`: of a row's coordinates, of a
    column's, and of what no direction holds.

    Attributes:
        q_rows: `(n, rows)`, float64, as all others.
        p_rows: `(n, rows)`.
        q_columns: `(n, in)`.
        p_columns: `(n, in)`.
        lack: `(n,)`.
        grid: Relative spacing and smallest normal number of the base's dtype; zeros are no grid.
    """

    q_rows: Floats
    p_rows: Floats
    q_columns: Floats
    p_columns: Floats
    lack: Floats
    grid: Floats


@compiled
def intervals(stored: Singles, models: Floats, low: Floats, high: Floats) -> None:
    """Fill in the ends of the numbers that round to stored ones: half as far towards zero at a power of two.

    Args:
        stored: `(n, rows, in)`, float32: bf16, fp16 and float32 fit exactly.
        models: `(n, 2)`: relative spacing and smallest normal number of each model's dtype.
        low: Filled.
        high: Filled.
    """
    n, rows, columns = stored.shape
    for i in range(n):
        eps, tiny = models[i, 0], models[i, 1]
        for a in range(rows):
            values, lows, highs = stored[i, a], low[i, a], high[i, a]
            for b in range(columns):
                value = np.float64(values[b])
                half = spacing(value, eps, tiny) / 2
                less = half / 2 if (abs(value) * eps == 2 * half) & (abs(value) > tiny) else 0.0
                lows[b] = value - half + (less if value > 0 else 0.0)
                highs[b] = value + half - (less if value < 0 else 0.0)


@compiled
def memory_of(n: int, entries: int) -> tuple[Strip, Packet, Floats, Floats]:
    """A strip, packets, what is the rows' own of the variances, `(n, entries)`, and five numbers for each entry."""
    return strip_of(n, entries), packet_of(n, entries), np.empty((n, entries)), np.empty((5, entries))


@compiled
def read(low: Floats, high: Floats, m: Singles, known: Known, first: int, strip: Strip, own: Floats) -> None:
    """Fill in the ends, means and variances of some rows from the first on, and the rows' part of these."""
    n, _, columns = low.shape
    for r in range(strip.low.shape[1] // columns):
        a, start = first + r, r * columns
        for i in range(n):
            of_row, of_columns, lack = known.q_rows[i, a], known.p_rows[i, a], known.lack[i]
            for b in range(columns):
                strip.low[i, start + b], strip.high[i, start + b] = low[i, a, b], high[i, a, b]
                strip.mean[i, start + b] = m[i, a, b]
            for b in range(columns):
                part, off = of_row * known.p_columns[i, b], ROUNDED * strip.mean[i, start + b]
                variance = part + of_columns * known.q_columns[i, b] + lack + off * off
                own[i, start + b], strip.variance[i, start + b] = part, max(variance, LEAST_VARIANCE)


@compiled
def measure(
    low: Floats, high: Floats, m: Singles, known: Known, for_rows: bool, gradient: Singles, precision: Singles,
    pull: Singles,
) -> None:  # fmt: skip
    """Fill in what the entries say of the `M_i`: see the module.

    Args:
        low: See the module, as the next two.
        high: .
        m: .
        known: .
        for_rows: Whether the rows' coordinates are to be solved for: then their own variance is no noise to them, and
            the gradient is what is left at `m` of the entry's own most likely `M_i` (expectation propagation, Minka
            2001, arXiv 1301.2294). Else what is said beside `N(m, v)`.
        gradient: Filled, `(n, rows, in)`.
        precision: Filled.
        pull: Filled.
    """
    n, rows, columns = low.shape
    height = min(rows, max(1, TOGETHER // columns))
    for first in range(0, rows, height):
        # The last strip has fewer rows.
        height = min(height, rows - first)
        entries = height * columns
        strip, packet, own, memory = memory_of(n, entries)
        read(low, high, m, known, first, strip, own)
        sort(strip, SLACK, SLACK, 0.0, known.grid, memory[0], memory[1])
        evaluate(strip, packet, known.grid)
        _measured(strip, memory[0])
        if for_rows:
            _without_own(strip, own, memory)
        for i in range(n):
            for r in range(height):
                a = first + r
                for b in range(columns):
                    t = r * columns + b
                    gradient[i, a, b], precision[i, a, b] = strip.shift[i, t], strip.left[i, t]
                    pull[i, a, b] = strip.pull[i, t]


@compiled
def _measured(strip: Strip, together: Floats) -> None:
    """Replace what is known after an entry was seen by what it says: gradient, precision and pull."""
    variance, shift, left, pull = strip.variance, strip.shift, strip.left, strip.pull
    together[:] = 0.0
    for i in range(len(variance)):
        for t in range(len(together)):
            share = min(MOST_SHARE, max(LEAST_SHARE, 1 - (left[i, t] - pull[i, t] * pull[i, t]) / variance[i, t]))
            left[i, t] = share / variance[i, t]
            together[t] += pull[i, t] * pull[i, t] / (share * variance[i, t])
    for i in range(len(variance)):
        for t in range(len(together)):
            shift[i, t] /= variance[i, t]
            pull[i, t] *= math.sqrt(MOST_PULL / max(together[t], MOST_PULL)) / variance[i, t]
    for i in range(len(variance)):
        for t in range(len(together)):
            left[i, t] = 0.0 if strip.kind[t] == SETTLED else left[i, t]


@compiled
def _without_own(strip: Strip, own: Floats, memory: Floats) -> None:
    """The measurement of an entry where the rows' own variance is no noise.

    With `K = diag(h) - u u^T`: `K' = (K^-1 - diag(own))^-1` is of the same form, and the gradient `K' K^-1 g`.
    """
    lost, common, rest, dot = memory[0], memory[1], memory[2], memory[3]
    lost[:], common[:], rest[:], dot[:] = 0.0, 0.0, 0.0, 0.0
    g, h, u = strip.shift, strip.left, strip.pull
    for i in range(len(own)):
        for t in range(len(lost)):
            share = u[i, t] / max(h[i, t], NO_PRECISION)
            lost[t] += u[i, t] * share
            common[t] += share * g[i, t]
            rest[t] += share * share * h[i, t] / (1 - h[i, t] * own[i, t])
    for i in range(len(own)):
        for t in range(len(lost)):
            inverse, alone = 1 / max(h[i, t], NO_PRECISION), h[i, t] / (1 - h[i, t] * own[i, t])
            at = (g[i, t] + u[i, t] * common[t] / (1 - lost[t])) * inverse
            along = alone * u[i, t] * inverse / math.sqrt(1 - lost[t] + rest[t])
            dot[t] += along * at
            h[i, t], u[i, t], g[i, t] = alone, along, alone * at
    for i in range(len(own)):
        for t in range(len(lost)):
            g[i, t] -= u[i, t] * dot[t]


@compiled
def weigh(precision: Singles, pull: Singles, y: Singles) -> None:
    """Replace the y of each entry by `(diag(precision) - pull pull^T) y`; all `(n, rows, in)`."""
    n, rows, columns = y.shape
    along = np.empty(columns, dtype=np.float32)
    for a in range(rows):
        along[:] = 0
        for i in range(n):
            for b in range(columns):
                along[b] += pull[i, a, b] * y[i, a, b]
        for i in range(n):
            for b in range(columns):
                y[i, a, b] = precision[i, a, b] * y[i, a, b] - pull[i, a, b] * along[b]


@compiled
def decode(
    low: Floats, high: Floats, m: Singles, known: Known, widened: float, most_doubt: float, weight: Floats,
    certain: NDArray[np.bool_], wrong: Floats, strained_rows: Floats, strained_columns: Floats,
) -> tuple[float, float, float]:  # fmt: skip
    """Fill in the most likely value of each entry, and whether it is certain.

    Args:
        low: See the module, as the next two.
        high: .
        m: .
        known: .
        widened: An entry is certain if it is so with all variances this many times as large, too.
        most_doubt: The largest probability of another grid point that counts as none.
        weight: Filled, `(rows, in)`.
        certain: Filled, `(rows, in)`.
        wrong: `(256,)`: the number of wrong entries to expect is added, by the exponent of their error; where W is on
            no grid, the mean squared error at 0.
        strained_rows: `(n, rows)`: by how many squared deviations each `M_i` lies outside its interval is added.
        strained_columns: `(n, in)`: the same.

    Returns:
        `sum_i |W_i - W - m_i|^2`, the energy that the models' rounding has, and `sum_i |W_i - mean_j W_j|^2`.
    """
    n, rows, columns = low.shape
    height, grid, sums = min(rows, max(1, TOGETHER // columns)), known.grid, np.zeros(3)
    for first in range(0, rows, height):
        height = min(height, rows - first)
        entries = height * columns
        strip, packet, own, memory = memory_of(n, entries)
        read(low, high, m, known, first, strip, own)
        sort(strip, BEYOND_DOUBT, 0.0, 1.0, grid, memory[0], memory[1])
        evaluate(strip, packet, grid)
        if grid[0] > 0:
            _count_wrong(strip, grid, wrong)
        else:
            wrong[0] += strip.error.sum()
        _add_squares(strip, sums)
        for r in range(height):
            for b in range(columns):
                weight[first + r, b] = strip.W[r * columns + b]
            if grid[0] > 0:
                _strain(strip, r * columns, grid, strained_rows[:, first + r], strained_columns)
        sure = _certain(strip, packet, grid, widened, most_doubt, memory)
        for r in range(height):
            for b in range(columns):
                certain[first + r, b] = sure[r * columns + b] > 0
    return sums[0], sums[1], sums[2]


@compiled
def _strain(strip: Strip, first: int, grid: Floats, of_row: Floats, of_columns: Floats) -> None:
    """Add up by how much each `M_i` of a row lies outside its interval, in squared deviations."""
    for i in range(len(strip.low)):
        for b in range(of_columns.shape[1]):
            t = first + b
            outside = max(
                strip.low[i, t] - strip.W[t] - strip.mean[i, t], strip.mean[i, t] + strip.W[t] - strip.high[i, t]
            )
            if (strip.kind[t] == SETTLED) | (outside <= 0):
                continue
            outside -= HARMLESS * spacing(strip.W[t], grid[0], grid[1])
            if outside > 0:
                of_row[i] += outside * outside / strip.variance[i, t]
                of_columns[i, b] += outside * outside / strip.variance[i, t]


@compiled
def _count_wrong(strip: Strip, grid: Floats, wrong: Floats) -> None:
    """Add the wrong entries to expect."""
    for t in range(len(strip.W)):
        if (strip.doubt[t] > 0) & (grid[0] > 0):
            step = spacing(strip.W[t], grid[0], grid[1])
            # An error is a step, or a few of them where W is as good as continuous.
            bits = np.float32(math.sqrt(max(step * step, strip.error[t]))).view(np.int32)
            wrong[(bits >> 23) & 255] += min(1.0, strip.error[t] / (step * step))


@compiled
def _add_squares(strip: Strip, sums: Floats) -> None:
    """Add the residual's, the rounding's and the spread's squares."""
    n = len(strip.low)
    for t in range(len(strip.W)):
        average = 0.0
        for i in range(n):
            average += (strip.low[i, t] + strip.high[i, t]) / 2 / n
        for i in range(n):
            middle, width = (strip.low[i, t] + strip.high[i, t]) / 2, strip.high[i, t] - strip.low[i, t]
            residual, away = middle - strip.W[t] - strip.mean[i, t], middle - average
            sums[0] += residual * residual
            sums[1] += width * width / 12
            sums[2] += away * away


@compiled
def _certain(
    strip: Strip, packet: Packet, grid: Floats, widened: float, most_doubt: float, memory: Floats
) -> Floats:  # fmt: skip
    """Which entries are certain, `(entries,)`: again, with variances that are larger.

    The most likely values are replaced.
    """
    before, certain, asked = memory[2], memory[3], memory[4]
    for t in range(len(certain)):
        before[t], certain[t] = strip.W[t], strip.kind[t] == SETTLED
        asked[t] = (strip.kind[t] != SETTLED) & (strip.doubt[t] < most_doubt)
    if asked.max() > 0:
        for i in range(len(strip.low)):
            for t in range(len(certain)):
                strip.variance[i, t] *= widened
        sort(strip, BEYOND_DOUBT, 0.0, 1.0, grid, memory[0], memory[1])
        for t in range(len(certain)):
            strip.kind[t] = strip.kind[t] if asked[t] > 0 else SETTLED
        evaluate(strip, packet, grid)
        for t in range(len(certain)):
            again = (strip.doubt[t] < most_doubt) & (strip.W[t] == before[t])
            certain[t] = again if asked[t] > 0 else certain[t]
    return certain


@compiled
def log_ratios(low: Floats, high: Floats, m: Floats, v: Floats, grid: Floats, ratios: Floats) -> None:
    """Fill in the logarithm of how much likelier each entry is with W on the grid than with W anywhere.

    On the grid a point is as likely as the numbers that round to it are many.

    Args:
        low: `(n, entries)`, float64, as the next three.
        high: .
        m: .
        v: Variances of the `M_i`.
        grid: As in `Known`.
        ratios: Filled, `(entries,)`, at least `log(CONTAMINATED)`; 0 where grid points are too many to tell.
    """
    n, entries = low.shape
    strip, packet, memory = strip_of(n, entries), packet_of(n, entries), np.empty((3, entries))
    for i in range(n):
        for e in range(entries):
            strip.low[i, e], strip.high[i, e] = low[i, e], high[i, e]
            strip.mean[i, e], strip.variance[i, e] = m[i, e], v[i, e]
    # Nothing is settled beyond infinitely many deviations.
    sort(strip, math.inf, 0.0, 1.0, grid, memory[0], memory[1])
    evaluate(strip, packet, grid)
    for e in range(entries):
        memory[2, e] = strip.evidence[e]
    sort(strip, math.inf, 0.0, 0.0, np.zeros(2), memory[0], memory[1])
    evaluate(strip, packet, np.zeros(2))
    for e in range(entries):
        on, off = memory[2, e], strip.evidence[e]
        ratios[e] = math.log((1 - CONTAMINATED) * on / off + CONTAMINATED) if (on >= 0) & (off > 0) else 0.0
