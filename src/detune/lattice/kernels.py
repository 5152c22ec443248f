"""What each stored entry says of the base and of the adapters: compiled loops over entries.

Model i stores `W_i`, so `low_i < W + M_i < high_i`, the numbers that round to it. The rest of the fit says
`M_i ~ N(m_i, v_i)`, and W is a point g of the base's grid. Then

    p(g) = product_i P(low_i - g < M_i < high_i - g),

and each `M_i` is a mixture, over g, of normal numbers that were cut off. To second order in a change x of the `M_i`,
the logarithm of an entry's probability is `gradient^T x - x^T (diag(precision) - pull pull^T) x / 2`: `pull` is what
an entry does not say because its W is open. Where W is open over many grid points, the intervals are taken for normal
noise of their variance: the grid then says nothing.

Most entries are settled by a few comparisons, so this is a loop with branches, not a chain of operations on arrays;
numba compiles it once and keeps the result. Every function is single-threaded and lets other threads run.

Most functions take the ends of the intervals, `low` and `high`, `(n, rows, in)`, float64; `m`, what the rest of the fit
says of the `M_i`, of the same shape, float32; and `Known`.

Reference:
    Johnson, Kotz & Balakrishnan, "Continuous Univariate Distributions" 1, 1994, Section 13.10.1 (truncated normal);
    Shepherd & Laframboise 1981, doi 10.1090/S0025-5718-1981-0595058-X (the tail's expansion).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

F = TypeVar("F", bound=Callable[..., Any])
Floats = NDArray[np.float64]
Singles = NDArray[np.float32]

# Grid points are looked for up to this many standard deviations beyond the intervals: 6e-5 of a normal is outside.
SLACK = 4.0
# With more grid points to each side than this the sum over them is a normal integral to 1 % (Poisson summation).
MOST_REACH = 3
# An entry's doubt is looked at from here on: 1e-9 of a normal number is beyond six standard deviations, and the
# certainty of `decode` wants the variance four times as large.
BEYOND_DOUBT = 12.5
LEAST_VARIANCE = 1e-30
# Means are computed in float32, from sums of tens of products.
ROUNDED = 2.0**-22
# Up to this share of a step an M_i may lie outside its interval.
HARMLESS = 0.01
# A measurement that says nothing still has a precision: no equation is singular.
LEAST_SHARE = 1e-9
# An entry never says all that it could of one M_i, nor nothing of all together.
MOST_SHARE = 0.99999
MOST_PULL = 0.999
# Below this width of a normal's interval, in deviations, the density is a parabola to 1e-4.
THIN = 0.03
# Numbers that stand for a W on no grid: the sum over them is the integral to 1e-3 for intervals of a deviation or more.
NODES = 24
# A likelihood ratio that one entry in a hundred may contradict: wild entries must not decide.
CONTAMINATED = 0.01

# 2^e by a float32's exponent bits; zero and subnormals have exponent 0.
POWERS = np.array([math.ldexp(1.0, e - 127) for e in range(256)])
LOG2_E, LN_2 = 1 / math.log(2), math.log(2)
ROOT_HALF, DENSITY, TAIL = math.sqrt(0.5), 1 / math.sqrt(2 * math.pi), math.sqrt(math.pi / 2)
# `exp(z^2) erfc(z) (1 + 2 z)` as a polynomial of `(z - 2) / (z + 2)`, to 1e-8; made by `_expand`.
DEGREE = 12


def _expand() -> list[float]:
    """Interpolate the tail at Chebyshev's points."""
    t = np.cos(np.pi * (np.arange(400) + 0.5) / 400)
    z = 2 * (1 + t) / (1 - t)
    # The continued fraction where erfc underflows.
    tail = np.array([math.exp(x * x) * math.erfc(x) if x < 5 else _far_tail(x) for x in z])
    fitted = np.polynomial.chebyshev.chebfit(t, tail * (1 + 2 * z), DEGREE)
    return list(np.polynomial.chebyshev.cheb2poly(fitted)[::-1])


def _far_tail(z: float) -> float:
    fraction = z
    for k in range(60, 0, -1):
        fraction = z + k / 2 / fraction
    return 1 / (fraction * math.sqrt(math.pi))


EXPANSION = tuple(map(float, _expand()))


class Known(NamedTuple):
    """What the fit knows beside the means.

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


def compiled(function: F) -> F:
    """Compile a loop: reassociation is allowed, NaN and infinity keep their meaning."""
    relaxed = {"contract", "arcp", "nsz", "reassoc"}
    jitted: F = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=relaxed)(function)
    return jitted


@compiled
def spacing(value: float, eps: float, tiny: float) -> float:
    """Distance between neighbouring points of a grid at a value."""
    power = POWERS[(np.float32(value).view(np.int32) >> 23) & 255]
    return max(power, tiny) * eps


@compiled
def nearest(value: float, eps: float, tiny: float) -> float:
    """The grid's point next to a value."""
    step = spacing(value, eps, tiny)
    return math.floor(value / step + 0.5) * step


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
            for b in range(columns):
                bits = np.float32(stored[i, a, b]).view(np.int32)
                half = max(POWERS[(bits >> 23) & 255], tiny) * eps / 2
                value = np.float64(stored[i, a, b])
                less = half / 2 if (bits & 0x7FFFFF) == 0 and abs(value) > tiny else 0.0
                low[i, a, b] = value - half + (less if value > 0 else 0.0)
                high[i, a, b] = value + half - (less if value < 0 else 0.0)


@compiled
def exp(x: float) -> float:
    """`e^x` to 1e-8 for x from -87 to 0, and 0 below: a third of the library's time."""
    if x < -87:
        return 0.0
    doublings = math.floor(x * LOG2_E + 0.5)
    f = x - doublings * LN_2
    value = 1 + f * (1 + f * (1 / 2 + f * (1 / 6 + f * (1 / 24 + f * (1 / 120 + f * (1 / 720 + f / 5040))))))
    return value * POWERS[int(doublings) + 127]


@compiled
def tail(z: float) -> float:
    """`exp(z^2) erfc(z)` for `z >= 0`."""
    t = (z - 2) / (z + 2)
    c = EXPANSION
    value = c[0]
    # Unrolled, as a loop over a tuple of constants is compiled.
    for k in range(1, DEGREE + 1):
        value = value * t + c[k]
    return value / (1 + 2 * z)


@compiled
def edge(x: float) -> tuple[float, float]:
    """Density of `N(0, 1)` at x, and its probability beyond `|x|`; both 0 from 13 deviations on."""
    density = DENSITY * exp(-x * x / 2)
    return density, density * TAIL * tail(abs(x) * ROOT_HALF)


@compiled
def moments(
    a: float, density_a: float, beyond_a: float, b: float, density_b: float, beyond_b: float
) -> tuple[float, float, float]:
    """Probability, mean and variance of `x ~ N(0, 1)` in `(a, b)`, given what `edge` says of both ends.

    Where the interval is out of sight the probability is 0, and the rest means nothing.
    """
    width = b - a
    if width * max(1.0, max(a, -b) / 6) < THIN:
        c, second = (a + b) / 2, width * width / 12
        return width * DENSITY * exp(-c * c / 2) * (1 + (c * c - 1) * second / 2), c - c * second, second
    if a >= 0:
        Z = beyond_a - beyond_b
    elif b <= 0:
        Z = beyond_b - beyond_a
    else:
        Z = 1 - beyond_a - beyond_b
    if Z < 1e-36:
        return 0.0, 0.0, 0.0
    share = 1 / Z
    mean = (density_a - density_b) * share
    return Z, mean, max(0.0, 1 + (a * density_a - b * density_b) * share - mean * mean)


@compiled
def truncated_normal(low: float, width: float) -> tuple[float, float, float]:
    """Probability, mean and variance of `x ~ N(0, 1)` in `(low, low + width)`; see `moments`."""
    density_a, beyond_a = edge(low)
    density_b, beyond_b = edge(low + width)
    return moments(low, density_a, beyond_a, low + width, density_b, beyond_b)


@compiled
def gaussian(low: Floats, high: Floats, m: Floats, v: Floats) -> tuple[float, float]:
    """Mean and precision of W with the intervals as normal noise of their variance."""
    total, weighted = 0.0, 0.0
    for i in range(len(low)):
        width = high[i] - low[i]
        precision = 1 / (v[i] + width * width / 12)
        total += precision
        weighted += precision * ((low[i] + high[i]) / 2 - m[i])
    return weighted / total, total


@compiled
def feasible(low: Floats, high: Floats, m: Floats, v: Floats, slack: float) -> tuple[float, float]:
    """Ends between which W must lie; around the mean where the models contradict each other."""
    first, last = -1e300, 1e300
    for i in range(len(low)):
        beyond = slack * math.sqrt(v[i])
        first, last = max(first, low[i] - m[i] - beyond), min(last, high[i] - m[i] + beyond)
    if first < last:
        return first, last
    W, precision = gaussian(low, high, m, v)
    beyond = slack / math.sqrt(precision)
    return W - beyond, W + beyond


@compiled
def smallest_step(first: float, last: float, grid: Floats) -> float:
    """The finest step of the grid between two ends; next to none around zero."""
    return spacing(0.0 if first * last < 0 else min(abs(first), abs(last)), grid[0], grid[1])


@compiled
def reach_of(first: float, last: float, middle: float, grid: Floats) -> float:
    """How many grid points to each side of the middle lie between the ends."""
    step = smallest_step(first, last, grid)
    return max(0.0, np.ceil((max(abs(first - middle), abs(last - middle)) - step) / step))


@compiled
def candidates(first: float, last: float, grid: Floats, least: float, points: Floats) -> int:
    """Fill in what W may be, ascending: grid points, or numbers that stand for all. Returns how many; 0 if too many."""
    if grid[0] == 0:
        for k in range(NODES):
            points[k, 0] = first + (last - first) * (k + 0.5) / NODES
        return NODES
    middle = nearest((first + last) / 2, grid[0], grid[1])
    reach = max(least, reach_of(first, last, middle, grid))
    if reach > MOST_REACH:
        return 0
    step, count = smallest_step(first, last, grid), 0
    for k in range(-int(reach), int(reach) + 1):
        g = nearest(middle + step * k, grid[0], grid[1])
        # Where the step doubles, two candidates round to one point.
        if count == 0 or g != points[count - 1, 0]:
            points[count, 0] = g
            count += 1
    return count


@compiled
def as_normal(
    low: Floats, high: Floats, m: Floats, v: Floats, grid: Floats, shift: Floats, left: Floats, pull: Floats
) -> tuple[float, float, float]:
    """The posterior of one entry whose W is open, with the intervals as normal noise; see `entry`."""
    W, precision = gaussian(low, high, m, v)
    for i in range(len(low)):
        width = high[i] - low[i]
        share = v[i] / (v[i] + width * width / 12)
        shift[i] = share * ((low[i] + high[i]) / 2 - m[i] - W)
        pull[i] = -share / math.sqrt(precision)
        left[i] = v[i] * (1 - share) + pull[i] * pull[i]
    if grid[0] == 0:
        return W, 1.0, 1 / precision
    step = spacing(W, grid[0], grid[1])
    return math.floor(W / step + 0.5) * step, 1.0, 1 / precision + step * step / 12


@compiled
def entry(
    low: Floats, high: Floats, m: Floats, v: Floats, grid: Floats, least: float, shift: Floats, left: Floats,
    pull: Floats, points: Floats, ends: Floats,
) -> tuple[float, float, float]:  # fmt: skip
    """The posterior of one entry.

    Args:
        low: Lower ends of the models' intervals, `(n,)`.
        high: Upper ends.
        m: Means of the `M_i`.
        v: Variances.
        grid: As in `Known`.
        least: Grid points to look at on each side at least.
        shift: Filled with the means' changes, `(n,)`.
        left: Filled with the variances that are left.
        pull: Filled with `Cov(M_i, W) / std(W)`.
        points: Memory, `(NODES, 2 + 2 n)`.
        ends: Memory, `(n, 3)`.

    Returns:
        The most likely W, the probability that it is another, and the mean squared error; the mean, 1, and the
        variance where there is no grid.
    """
    n = len(low)
    first, last = feasible(low, high, m, v, SLACK)
    count = candidates(first, last, grid, least, points)
    if count == 0:
        return as_normal(low, high, m, v, grid, shift, left, pull)
    total, best, most = 0.0, 0, -1.0
    for k in range(count):
        likelihood = 1.0
        for i in range(n):
            if k == 0:
                shift[i] = 1 / math.sqrt(v[i])
            b = (high[i] - points[k, 0] - m[i]) * shift[i]
            a = (low[i] - points[k, 0] - m[i]) * shift[i]
            # Between neighbouring points of the models' own grid the upper end is the last one's lower end.
            if k > 0 and abs(b - ends[i, 0]) < 1e-9:
                density_b, beyond_b = ends[i, 1], ends[i, 2]
            else:
                density_b, beyond_b = edge(b)
            density_a, beyond_a = edge(a)
            ends[i, 0], ends[i, 1], ends[i, 2] = a, density_a, beyond_a
            Z, mean, variance = moments(a, density_a, beyond_a, b, density_b, beyond_b)
            likelihood *= Z
            points[k, 2 + 2 * i], points[k, 3 + 2 * i] = mean, variance
        points[k, 1] = likelihood
        total += likelihood
        if likelihood > most:
            best, most = k, likelihood
    if total < 1e-250:
        # No point is likely at all: the nearest to what the models say on average.
        return as_normal(low, high, m, v, grid, shift, left, pull)
    W, doubt, error, off = points[best, 0], 0.0, 0.0, 0.0
    for k in range(count):
        points[k, 1] /= total
        distance = points[k, 0] - W
        off += points[k, 1] * distance
        error += points[k, 1] * distance * distance
        if k != best:
            doubt += points[k, 1]
    spread = error - off * off
    for i in range(n):
        mean, variance, along = 0.0, 0.0, 0.0
        for k in range(count):
            mean += points[k, 1] * points[k, 2 + 2 * i]
        for k in range(count):
            away = points[k, 2 + 2 * i] - mean
            variance += points[k, 1] * (points[k, 3 + 2 * i] + away * away)
            along += points[k, 1] * (points[k, 0] - W - off) * away
        deviation = math.sqrt(v[i])
        shift[i], left[i] = deviation * mean, v[i] * variance
        pull[i] = deviation * along / math.sqrt(spread) if spread > 1e-200 else 0.0
    if grid[0] == 0:
        width = (last - first) / NODES
        return W + off, 1.0, spread + width * width / 12
    return W, doubt, error


@compiled
def settled(low: Floats, high: Floats, m: Floats, most: float, grid: Floats) -> tuple[bool, float, float]:
    """Whether one grid point alone is possible, which, and how far inside all intervals it lies.

    Args:
        low: As in `entry`.
        high: As there.
        m: As there.
        most: What neighbours must be ruled out by.
        grid: As in `Known`.
    """
    first, last = -1e300, 1e300
    for i in range(len(low)):
        first, last = max(first, low[i] - m[i]), min(last, high[i] - m[i])
    if grid[0] == 0:
        return False, 0.0, 0.0
    W = nearest((first + last) / 2, grid[0], grid[1])
    # The next point towards zero is the nearest: at a power of two by half of the step.
    step = spacing(abs(W) * (1 - grid[0] / 4), grid[0], grid[1])
    alone = first <= W <= last and W - step < first - most and W + step > last + most
    return alone, W, min(W - first, last - W)


@compiled
def read(
    low: Floats, high: Floats, m: Singles, known: Known, a: int, b: int, here: Floats
) -> float:  # fmt: skip
    """Fill in one entry's ends, means, variances and the rows' part of these, `(5, n)`; return the largest variance."""
    largest = 0.0
    for i in range(low.shape[0]):
        here[0, i], here[1, i], here[2, i] = low[i, a, b], high[i, a, b], m[i, a, b]
        here[4, i] = known.q_rows[i, a] * known.p_columns[i, b]
        variance = here[4, i] + known.p_rows[i, a] * known.q_columns[i, b] + known.lack[i]
        here[3, i] = max(variance + (ROUNDED * here[2, i]) ** 2, LEAST_VARIANCE)
        largest = max(largest, here[3, i])
    return largest


@compiled
def measure(
    low_ends: Floats, high_ends: Floats, m: Singles, known: Known, for_rows: bool, gradient: Singles,
    precision: Singles, pull: Singles,
) -> None:  # fmt: skip
    """Fill in what the entries say of the `M_i`: see the module.

    Args:
        low_ends: See the module, as the next two.
        high_ends: .
        m: .
        known: .
        for_rows: Whether the rows' coordinates are to be solved for: then their own variance is no noise to them, and
            the gradient is what is left at `m` of the entry's own most likely `M_i` (expectation propagation, Minka
            2001, arXiv 1301.2294). Else what is said beside `N(m, v)`.
        gradient: Filled, `(n, rows, in)`.
        precision: Filled.
        pull: Filled.
    """
    n, rows, columns = low_ends.shape
    here, grid = np.empty((5, n)), known.grid
    low, high, mean, v, own = here[0], here[1], here[2], here[3], here[4]
    g, h, u = np.empty(n), np.empty(n), np.empty(n)
    shift, left, along = np.empty(n), np.empty(n), np.empty(n)
    points, edges = np.empty((NODES, 2 + 2 * n)), np.empty((n, 3))
    for a in range(rows):
        for b in range(columns):
            largest = read(low_ends, high_ends, m, known, a, b, here)
            far = SLACK * math.sqrt(largest)
            alone, W, inside = settled(low, high, mean, far, grid)
            if alone and inside > far:
                for i in range(n):
                    gradient[i, a, b], precision[i, a, b], pull[i, a, b] = 0.0, 0.0, 0.0
                continue
            if alone:
                for i in range(n):
                    deviation = math.sqrt(v[i])
                    _, at, variance = truncated_normal(
                        (low[i] - W - mean[i]) / deviation, (high[i] - low[i]) / deviation
                    )
                    g[i], h[i], u[i] = at / deviation, min(MOST_SHARE, max(LEAST_SHARE, 1 - variance)) / v[i], 0.0
            else:
                entry(low, high, mean, v, grid, 0.0, shift, left, along, points, edges)
                together = 0.0
                for i in range(n):
                    share = 1 - (left[i] - along[i] * along[i]) / v[i]
                    g[i], h[i] = shift[i] / v[i], min(MOST_SHARE, max(LEAST_SHARE, share)) / v[i]
                    u[i] = along[i] / v[i]
                    together += u[i] * u[i] / h[i]
                if together > MOST_PULL:
                    for i in range(n):
                        u[i] *= math.sqrt(MOST_PULL / together)
            if not for_rows:
                for i in range(n):
                    gradient[i, a, b], precision[i, a, b], pull[i, a, b] = g[i], h[i], u[i]
                continue
            # With K = diag(h) - u u^T: K' = (K^-1 - diag(own))^-1 is of the same form, and the gradient K' K^-1 g.
            lost, common, rest = 0.0, 0.0, 0.0
            for i in range(n):
                share = u[i] / h[i]
                lost += u[i] * share
                common += share * g[i]
                rest += share * share * h[i] / (1 - h[i] * own[i])
            dot = 0.0
            for i in range(n):
                share, alone_h = u[i] / h[i], h[i] / (1 - h[i] * own[i])
                at = g[i] / h[i] + share * common / (1 - lost)
                along[i] = alone_h * share / math.sqrt(1 - lost + rest)
                dot += along[i] * at
                precision[i, a, b], pull[i, a, b], g[i] = alone_h, along[i], alone_h * at
            for i in range(n):
                gradient[i, a, b] = g[i] - along[i] * dot


@compiled
def decode(
    low_ends: Floats, high_ends: Floats, m: Singles, known: Known, widened: float, most_doubt: float, weight: Floats,
    certain: NDArray[np.bool_], wrong: Floats, strained_rows: Floats, strained_columns: Floats,
) -> tuple[float, float, float]:  # fmt: skip
    """Fill in the most likely value of each entry, and whether it is certain.

    Args:
        low_ends: See the module, as the next two.
        high_ends: .
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
    n, rows, columns = low_ends.shape
    here, grid, wide = np.empty((5, n)), known.grid, np.empty(n)
    low, high, mean, v = here[0], here[1], here[2], here[3]
    shift, left, along = np.empty(n), np.empty(n), np.empty(n)
    points, edges = np.empty((NODES, 2 + 2 * n)), np.empty((n, 3))
    squares, rounding, spread = 0.0, 0.0, 0.0
    for a in range(rows):
        for b in range(columns):
            largest = read(low_ends, high_ends, m, known, a, b, here)
            alone, W, _ = settled(low, high, mean, BEYOND_DOUBT * math.sqrt(largest), grid)
            sure = alone
            if not alone:
                W, doubt, error = entry(low, high, mean, v, grid, 1.0, shift, left, along, points, edges)
                if doubt < most_doubt:
                    for i in range(n):
                        wide[i] = widened * v[i]
                    again, doubt_again, _ = entry(low, high, mean, wide, grid, 1.0, shift, left, along, points, edges)
                    sure = doubt_again < most_doubt and again == W
                allowed = HARMLESS * spacing(W, grid[0], grid[1])
                for i in range(n):
                    outside = max(low[i] - W - mean[i], mean[i] + W - high[i]) - allowed
                    if outside > 0 and grid[0] > 0:
                        strained_rows[i, a] += outside * outside / v[i]
                        strained_columns[i, b] += outside * outside / v[i]
                if grid[0] == 0:
                    wrong[0] += error
                elif doubt > 0:
                    step = spacing(W, grid[0], grid[1])
                    # An error is a step, or a few of them where W is as good as continuous.
                    unit = max(step * step, error)
                    bits = np.float32(math.sqrt(unit)).view(np.int32)
                    wrong[(bits >> 23) & 255] += min(1.0, error / (step * step))
            weight[a, b], certain[a, b] = W, sure
            average = 0.0
            for i in range(n):
                average += (low[i] + high[i]) / 2 / n
            for i in range(n):
                squares += ((low[i] + high[i]) / 2 - W - mean[i]) ** 2
                rounding += (high[i] - low[i]) ** 2 / 12
                spread += ((low[i] + high[i]) / 2 - average) ** 2
    return squares, rounding, spread


@compiled
def share_of(point: float, grid: Floats) -> float:
    """Length of the numbers that round to a grid point: at a power of two the step towards zero is half as long."""
    outward = spacing(point * (1 + grid[0] / 4), grid[0], grid[1])
    return (outward + spacing(point * (1 - grid[0] / 4), grid[0], grid[1])) / 2


@compiled
def log_ratios(
    low_ends: Floats, high_ends: Floats, m: Floats, v: Floats, grid: Floats, ratios: Floats
) -> None:  # fmt: skip
    """Fill in the logarithm of how much likelier each entry is with W on the grid than with W anywhere.

    On the grid a point is as likely as the numbers that round to it are many.

    Args:
        low_ends: `(entries, n)`, float64, as the next three.
        high_ends: .
        m: .
        v: Variances of the `M_i`.
        grid: As in `Known`.
        ratios: Filled, `(entries,)`, at least `log(CONTAMINATED)`; 0 where grid points are too many to tell.
    """
    entries, n = low_ends.shape
    points, none = np.empty((NODES, 2 + 2 * n)), np.zeros(2)
    for e in range(entries):
        low, high, mean, variance = low_ends[e], high_ends[e], m[e], v[e]
        first, last = feasible(low, high, mean, variance, SLACK)
        count, on, off = candidates(first, last, grid, 1.0, points), 0.0, 0.0
        for k in range(count):
            on += share_of(points[k, 0], grid) * _likelihood(low, high, mean, variance, points[k, 0])
        for k in range(candidates(first, last, none, 0.0, points)):
            off += (last - first) / NODES * _likelihood(low, high, mean, variance, points[k, 0])
        known = count > 0 and off > 0
        ratios[e] = math.log((1 - CONTAMINATED) * on / off + CONTAMINATED) if known else 0.0


@compiled
def _likelihood(low: Floats, high: Floats, m: Floats, v: Floats, W: float) -> float:
    likelihood = 1.0
    for i in range(len(low)):
        deviation = math.sqrt(v[i])
        likelihood *= truncated_normal((low[i] - W - m[i]) / deviation, (high[i] - low[i]) / deviation)[0]
    return likelihood
