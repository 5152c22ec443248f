"""Posteriors of W and of the `M_i` at single entries, given their intervals: compiled, some rows at a time.

Model i stores `W_i`, so `low_i < W + M_i < high_i`, the numbers that round to it. The rest of the fit says
`M_i ~ N(m_i, v_i)`, and W is a point g of the base's grid. Then

    p(g) = product_i P(low_i - g < M_i < high_i - g),

and each `M_i` is a mixture, over g, of normal numbers that were cut off. Where W is open over many grid points, the
intervals are taken for normal noise of their variance: the grid then says nothing.

Entries are sorted by how many grid points W may be; those of a kind are gathered into packets, which vector
instructions work on.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from detune.lattice.truncated_normal import compiled, nearest, share_of, spacing, truncated_normal

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Indices = NDArray[np.uint64]

# Grid points are looked for up to this many standard deviations beyond the intervals: 6e-5 of a normal is outside
# (derived).
SLACK = 4.0
# With more grid points to each side the sum over them is a normal integral to 1 % (Poisson summation)
# (derived).
MOST_REACH = 3
# Numbers that stand for a W on no grid: the sum over them is the integral to 1e-3 for intervals of a deviation or more
# (derived).
NODES = 24
# Entries that are worked on together: a multiple of all vectors' lengths, and all they need stays in the nearest cache
# (any number does).
LANES = 64
# Kinds of entries beside the numbers of grid points to each side: those that are not looked at, and open ones
# (derived).
SETTLED, OPEN = -1, MOST_REACH + 1
# Likelihoods below this have no ratios, and spreads below this none that matters (any small number does).
NO_LIKELIHOOD, NO_SPREAD = 1e-250, 1e-200
# Where a packet keeps what it knows of each entry (derived).
PARTS = 13
MIDDLE, STEP, W, DOUBT, ERROR, EVIDENCE, TOTAL, MOST, OFF, MEAN, LEFT, ALONG, INVERSE = range(PARTS)


class Strip(NamedTuple):
    """Entries of some rows, one after the other: what is known before, `(n, entries)`, and after.

    Attributes:
        low: Lower ends of the models' intervals.
        high: Upper ends.
        mean: Means of the `M_i`.
        variance: Their variances.
        kind: Grid points to each side of the middle that W may be, `SETTLED` or `OPEN`, `(entries,)`.
        middle: The grid's point in the middle of those, or the number.
        step: From one to the next.
        W: The most likely W; the mean where there is no grid.
        doubt: The probability that it is another; 1 where there is no grid, and where W is open.
        error: The mean squared error.
        evidence: The sum of `p(g)` over all g, each times the length of the numbers that it stands for; -1 where W is
            open.
        shift: Changes of the means, `(n, entries)`.
        left: Variances that are left.
        pull: `Cov(M_i, W) / std(W)`.
    """

    low: Floats
    high: Floats
    mean: Floats
    variance: Floats
    kind: Integers
    middle: Floats
    step: Floats
    W: Floats
    doubt: Floats
    error: Floats
    evidence: Floats
    shift: Floats
    left: Floats
    pull: Floats


class Packet(NamedTuple):
    """Memory for `LANES` entries of one kind.

    Attributes:
        places: Which entries of the strip are of a kind, `(entries,)`.
        chosen: Which of them are worked on, `(LANES,)`.
        low: As in `Strip`, `(n, LANES)`, as the next three.
        high: .
        mean: .
        variance: .
        points: What W may be, `(NODES, LANES)`.
        likelihood: Likelihood of each.
        means: Means of the `M_i` for each, in deviations from the mean, `(NODES, n, LANES)`.
        variances: Variances of the `M_i` for each, in variances.
        shift: As in `Strip`, `(n, LANES)`, as the next two.
        left: .
        pull: .
        one: A number for each entry, `(PARTS, LANES)`, at the places that are named above.
    """

    places: Indices
    chosen: Indices
    low: Floats
    high: Floats
    mean: Floats
    variance: Floats
    points: Floats
    likelihood: Floats
    means: Floats
    variances: Floats
    shift: Floats
    left: Floats
    pull: Floats
    one: Floats


@compiled
def strip_of(n: int, entries: int) -> Strip:
    """Memory for a strip."""
    before = (np.empty((n, entries)), np.empty((n, entries)), np.empty((n, entries)), np.empty((n, entries)))
    points = (np.empty(entries, dtype=np.int64), np.empty(entries), np.empty(entries))
    of_W = (np.empty(entries), np.empty(entries), np.empty(entries), np.empty(entries))
    return Strip(*before, *points, *of_W, np.empty((n, entries)), np.empty((n, entries)), np.empty((n, entries)))


@compiled
def packet_of(n: int, entries: int) -> Packet:
    """Memory for packets of a strip."""
    before = (np.empty((n, LANES)), np.empty((n, LANES)), np.empty((n, LANES)), np.empty((n, LANES)))
    of_points = (np.empty((NODES, LANES)), np.empty((NODES, LANES)))
    of_models = (np.empty((NODES, n, LANES)), np.empty((NODES, n, LANES)))
    after = (np.empty((n, LANES)), np.empty((n, LANES)), np.empty((n, LANES)))
    index = (np.empty(entries, dtype=np.uint64), np.empty(LANES, dtype=np.uint64))
    return Packet(*index, *before, *of_points, *of_models, *after, np.empty((PARTS, LANES)))


@compiled
def _bounds(strip: Strip, slack: float, first: Floats, last: Floats) -> None:
    """Fill in the ends between which W must lie, a number of deviations beyond what each model says."""
    first[:], last[:] = -math.inf, math.inf
    for i in range(len(strip.low)):
        for t in range(len(first)):
            beyond = slack * math.sqrt(strip.variance[i, t])
            first[t] = max(first[t], strip.low[i, t] - strip.mean[i, t] - beyond)
            last[t] = min(last[t], strip.high[i, t] - strip.mean[i, t] + beyond)


@compiled
def _agree(strip: Strip, slack: float, first: Floats, last: Floats) -> None:
    """Where models contradict each other: ends about what they say with their intervals as normal noise."""
    for t in range(len(first)):
        if first[t] < last[t]:
            continue
        total, weighted = 0.0, 0.0
        for i in range(len(strip.low)):
            width = strip.high[i, t] - strip.low[i, t]
            precision = 1 / (strip.variance[i, t] + width * width / 12)
            total += precision
            weighted += precision * ((strip.low[i, t] + strip.high[i, t]) / 2 - strip.mean[i, t])
        beyond = slack / math.sqrt(total)
        first[t], last[t] = weighted / total - beyond, weighted / total + beyond


@compiled
def sort(strip: Strip, sure: float, inside: float, least: float, grid: Floats, first: Floats, last: Floats) -> None:
    """Fill in `kind`, `middle`, `step`, and what is known where nothing is left to be found.

    Args:
        strip: Its first four fields are filled in.
        sure: A grid point is alone if its neighbours are out of reach by this many deviations.
        inside: It is settled if it lies inside all intervals by this many deviations, too.
        least: Grid points to look at on each side at least.
        grid: Relative spacing and smallest normal number of the base's dtype; zeros are no grid.
        first: Memory, `(entries,)`.
        last: Memory, `(entries,)`.
    """
    eps, tiny, kind, beyond = grid[0], grid[1], strip.kind, strip.step
    strip.doubt[:], strip.error[:], strip.evidence[:] = 0.0, 0.0, -1.0
    for i in range(len(strip.low)):
        for t in range(len(first)):
            strip.shift[i, t], strip.left[i, t], strip.pull[i, t] = 0.0, strip.variance[i, t], 0.0
    if eps == 0:
        _bounds(strip, SLACK, first, last)
        _agree(strip, SLACK, first, last)
        for t in range(len(first)):
            kind[t], strip.middle[t], strip.step[t] = 0, (first[t] + last[t]) / 2, (last[t] - first[t]) / NODES
        return
    beyond[:] = 0.0
    for i in range(len(strip.low)):
        variance = strip.variance[i]
        for t in range(len(first)):
            beyond[t] = max(beyond[t], variance[t])
    _bounds(strip, 0.0, first, last)
    W = strip.W
    for t in range(len(first)):
        deviation, middle = math.sqrt(beyond[t]), nearest((first[t] + last[t]) / 2, eps, tiny)
        # The next point towards zero is the nearest: at a power of two by half of the step.
        step = spacing(middle * (1 - eps / 4), eps, tiny)
        depth = min(middle - first[t], last[t] - middle)
        alone = min(first[t] - (middle - step), middle + step - last[t]) > sure * deviation
        settled = SETTLED if depth >= inside * deviation else 0
        kind[t] = settled if alone & (depth >= 0) else OPEN
        W[t] = middle
    _bounds(strip, SLACK, first, last)
    _agree(strip, SLACK, first, last)
    for t in range(len(first)):
        middle = nearest((first[t] + last[t]) / 2, eps, tiny)
        # The finest step between the ends; next to none around zero.
        finest = spacing(0.0 if first[t] * last[t] < 0 else min(abs(first[t]), abs(last[t])), eps, tiny)
        away = max(abs(first[t] - middle), abs(last[t] - middle))
        reach = np.int64(min(max(least, np.ceil((away - finest) / finest)), OPEN))
        known = kind[t] <= 0
        kind[t] = kind[t] if known else reach
        strip.middle[t] = W[t] if known else middle
        strip.step[t] = finest


@compiled
def evaluate(strip: Strip, packet: Packet, grid: Floats) -> None:
    """Fill in what is known after all intervals were seen, for entries that are not settled."""
    index = packet.places
    for kind in range(OPEN + 1):
        count = 0
        for t in range(len(strip.kind)):
            index[count] = t
            count += strip.kind[t] == kind
        for start in range(0, count, LANES):
            # The last packet is filled up with its last entry.
            for t in range(LANES):
                packet.chosen[t] = index[min(start + t, count - 1)]
            _gather(strip, packet)
            if kind == OPEN:
                _as_normal(packet, grid)
            else:
                points = 2 * kind + 1 if grid[0] > 0 else NODES
                _place(packet, points, grid)
                _weigh(packet, points)
                _combine(packet, points, grid)
            _scatter(strip, packet)
            for t in range(LANES):
                # No point is likely at all: the nearest to what the models say on average, once all others are done.
                if kind < OPEN and packet.one[TOTAL, t] < NO_LIKELIHOOD:
                    strip.kind[packet.chosen[t]] = OPEN


@compiled
def _gather(strip: Strip, packet: Packet) -> None:
    for t in range(LANES):
        e = packet.chosen[t]
        packet.one[MIDDLE, t], packet.one[STEP, t] = strip.middle[e], strip.step[e]
        packet.one[EVIDENCE, t] = strip.evidence[e]
    for i in range(len(strip.low)):
        for t in range(LANES):
            e = packet.chosen[t]
            packet.low[i, t], packet.high[i, t] = strip.low[i, e], strip.high[i, e]
            packet.mean[i, t], packet.variance[i, t] = strip.mean[i, e], strip.variance[i, e]


@compiled
def _scatter(strip: Strip, packet: Packet) -> None:
    for t in range(LANES):
        e = packet.chosen[t]
        strip.W[e], strip.doubt[e] = packet.one[W, t], packet.one[DOUBT, t]
        strip.error[e], strip.evidence[e] = packet.one[ERROR, t], packet.one[EVIDENCE, t]
    for i in range(len(strip.low)):
        for t in range(LANES):
            e = packet.chosen[t]
            strip.shift[i, e], strip.left[i, e] = packet.shift[i, t], packet.left[i, t]
            strip.pull[i, e] = packet.pull[i, t]


@compiled
def _place(packet: Packet, count: int, grid: Floats) -> None:
    """Fill in what W may be, ascending: grid points, or numbers that stand for all."""
    one, points = packet.one, packet.points
    for k in range(count):
        for t in range(LANES):
            point = one[MIDDLE, t] + one[STEP, t] * (k - (count - 1) / 2)
            points[k, t] = nearest(point, grid[0], grid[1]) if grid[0] > 0 else point
            packet.likelihood[k, t] = 1.0
    # Where the step doubles, two candidates round to one point.
    for k in range(1, count):
        for t in range(LANES):
            packet.likelihood[k, t] = 0.0 if points[k, t] == points[k - 1, t] else 1.0


@compiled
def _weigh(packet: Packet, count: int) -> None:
    """Fill in each point's likelihood, and the mean and the variance of each `M_i` if W is there."""
    one, low, high, mean = packet.one, packet.low, packet.high, packet.mean
    for i in range(len(low)):
        for t in range(LANES):
            one[INVERSE, t] = 1 / math.sqrt(packet.variance[i, t])
        for k in range(count):
            for t in range(LANES):
                away, inverse = packet.points[k, t] + mean[i, t], one[INVERSE, t]
                probability, centre, variance = truncated_normal(
                    (low[i, t] - away) * inverse, (high[i, t] - away) * inverse
                )
                packet.means[k, i, t], packet.variances[k, i, t] = centre, variance
                packet.likelihood[k, t] *= probability


@compiled
def _combine(packet: Packet, count: int, grid: Floats) -> None:
    """Sum over the points."""
    one, points, likelihood, means = packet.one, packet.points, packet.likelihood, packet.means
    for t in range(LANES):
        one[TOTAL, t], one[MOST, t], one[EVIDENCE, t] = 0.0, -1.0, 0.0
        one[DOUBT, t], one[ERROR, t], one[OFF, t] = 0.0, 0.0, 0.0
    for k in range(count):
        for t in range(LANES):
            one[TOTAL, t] += likelihood[k, t]
            better = likelihood[k, t] > one[MOST, t]
            one[W, t] = points[k, t] if better else one[W, t]
            one[MOST, t] = likelihood[k, t] if better else one[MOST, t]
            width = share_of(points[k, t], grid[0], grid[1]) if grid[0] > 0 else one[STEP, t]
            one[EVIDENCE, t] += width * likelihood[k, t]
    for k in range(count):
        for t in range(LANES):
            likelihood[k, t] /= one[TOTAL, t]
            distance = points[k, t] - one[W, t]
            one[OFF, t] += likelihood[k, t] * distance
            one[ERROR, t] += likelihood[k, t] * distance * distance
            one[DOUBT, t] += 0.0 if distance == 0 else likelihood[k, t]
    for i in range(len(packet.low)):
        for t in range(LANES):
            one[MEAN, t], one[LEFT, t], one[ALONG, t] = 0.0, 0.0, 0.0
        for k in range(count):
            for t in range(LANES):
                one[MEAN, t] += likelihood[k, t] * means[k, i, t]
        for k in range(count):
            for t in range(LANES):
                away = means[k, i, t] - one[MEAN, t]
                one[LEFT, t] += likelihood[k, t] * (packet.variances[k, i, t] + away * away)
                one[ALONG, t] += likelihood[k, t] * (points[k, t] - one[W, t] - one[OFF, t]) * away
        for t in range(LANES):
            spread = max(one[ERROR, t] - one[OFF, t] * one[OFF, t], NO_SPREAD)
            variance = packet.variance[i, t]
            packet.shift[i, t] = math.sqrt(variance) * one[MEAN, t]
            packet.left[i, t] = variance * one[LEFT, t]
            packet.pull[i, t] = math.sqrt(variance / spread) * one[ALONG, t]
    if grid[0] == 0:
        for t in range(LANES):
            one[ERROR, t] += one[STEP, t] * one[STEP, t] / 12 - one[OFF, t] * one[OFF, t]
            one[W, t] += one[OFF, t]
            one[DOUBT, t] = 1.0


@compiled
def _as_normal(packet: Packet, grid: Floats) -> None:
    """The posterior of entries whose W is open, with the intervals as normal noise."""
    one, low, high, mean, variance = packet.one, packet.low, packet.high, packet.mean, packet.variance
    for t in range(LANES):
        one[W, t], one[TOTAL, t], one[DOUBT, t] = 0.0, 0.0, 1.0
    for i in range(len(low)):
        for t in range(LANES):
            width = high[i, t] - low[i, t]
            precision = 1 / (variance[i, t] + width * width / 12)
            one[TOTAL, t] += precision
            one[W, t] += precision * ((low[i, t] + high[i, t]) / 2 - mean[i, t])
    for t in range(LANES):
        one[W, t] /= one[TOTAL, t]
    for i in range(len(low)):
        for t in range(LANES):
            width = high[i, t] - low[i, t]
            share = variance[i, t] / (variance[i, t] + width * width / 12)
            pull = -share / math.sqrt(one[TOTAL, t])
            packet.shift[i, t] = share * ((low[i, t] + high[i, t]) / 2 - mean[i, t] - one[W, t])
            packet.left[i, t] = variance[i, t] * (1 - share) + pull * pull
            packet.pull[i, t] = pull
    for t in range(LANES):
        step = spacing(one[W, t], grid[0], grid[1])
        one[ERROR, t] = 1 / one[TOTAL, t] + step * step / 12
        one[W, t] = math.floor(one[W, t] / step + 0.5) * step if grid[0] > 0 else one[W, t]
