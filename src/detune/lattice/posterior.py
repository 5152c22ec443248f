"""What the models' rounding intervals say of one entry of the base, and of that entry of every `M_i`.

Model i holds `low_i < W + M_i < high_i`. With `M_i ~ N(m_i, v_i)` from the rest of its matrix, and W on a grid, the
probability of a grid point g is

    p(g) = product_i P(low_i - g < M_i < high_i - g),

and the posterior of `M_i` the mixture of its truncated normals. Where the grid is finer than the intervals, W is as
good as continuous, and the sum is taken over evenly spaced numbers instead.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from detune.lattice.truncated_normal import Moments, truncated_normal
from detune.numerics.float_grid import nearest, spacing

# How many standard deviations of M_i the search for grid points allows beyond the interval's ends.
SLACK = 4.0
# Grid points looked at on each side of the middle: as many as the intervals leave, or the entry is continuous.
REACHES = (0, 1, 2, 4)
# Numbers that stand for a continuous W.
NODES = 9
# Grid points that are blurred by a shared error leave no trace where they are nearer than so many of its deviations;
# else so many to each side count.
CLOSE, COMB = 1.5, 3
# The exponential of less is nothing beside 1; that of much less takes ten times as long.
UNSEEN = -50.0


class Posterior(NamedTuple):
    """Of `entries` entries of W and of the n `M_i`, all float64.

    Attributes:
        weight: The most likely value of W, `(entries,)`.
        doubt: The probability that it is not that one; 1 where W is continuous.
        variance: Expected squared error of the weight.
        delta: Mean of each `M_i`, `(n, entries)`.
        delta_variance: Its variance.
        pull: How it goes with W, `Cov(M_i, W) / std(W)`.
    """

    weight: Tensor
    doubt: Tensor
    variance: Tensor
    delta: Tensor
    delta_variance: Tensor
    pull: Tensor


def posterior(
    low: Tensor,
    high: Tensor,
    m: Tensor,
    v: Tensor,
    grid: torch.dtype | None,
    least_reach: int = 0,
    common: Tensor | None = None,
) -> Posterior:
    """The posterior of each entry by itself.

    Args:
        low: Lower ends of the models' intervals, `(n, entries)`, float64.
        high: Upper ends.
        m: What the rest of its matrix says of each `M_i`.
        v: The variance of that.
        grid: The dtype that W lies on; None is no grid.
        least_reach: Grid points to look at on each side where one alone is feasible: 0 takes it as it is, and `doubt`
            is 0 there.
        common: Variance of an error that all `M_i` have in common, beside v, `(entries,)`; None is none.
    """
    ends = feasible(low, high, m, v)
    middle = ends.mean(dim=0)
    reach = torch.full_like(middle, REACHES[-1] + 1)
    step = torch.ones_like(middle)
    common = torch.zeros_like(middle) if common is None else common
    if grid is not None:
        # The finest step between the ends: next to zero there is no end of grid points.
        smallest = torch.where(ends[0] * ends[1] < 0, 0.0, ends.abs().amin(dim=0))
        step = spacing(smallest, grid)
        middle = nearest(middle, grid)
        reach = torch.ceil(((ends - middle).abs().amax(dim=0) - step) / step).clamp(min=least_reach)
        reach[common > 0] = REACHES[-1] + 1
    parts = Posterior(*(torch.empty_like(t) for t in (middle, middle, middle, m, m, m)))
    below = -1
    for most in (*REACHES, None):
        chosen = (reach > below) if most is None else (reach > below) & (reach <= most)
        below = below if most is None else most
        where = chosen.nonzero().squeeze(1)
        if not len(where):
            continue
        a, b, m_there, v_there = (each.index_select(1, where) for each in (low, high, m, v))
        if most is None or grid is None:
            found = _between(a, b, m_there, v_there, common[where], grid)
        else:
            offsets = torch.arange(-most, most + 1, device=low.device)[:, None]
            points = nearest(middle[where] + step[where] * offsets, grid)
            found = _given_points(a, b, m_there, v_there, points)
        for whole, part in zip(parts, found, strict=True):
            whole.index_copy_(-1, where, part)
    return parts


def log_evidence(low: Tensor, high: Tensor, m: Tensor, v: Tensor, common: Tensor, grid: torch.dtype) -> Tensor:
    """Logarithm of the probability of the intervals, with W on any grid point, as likely as its step is long.

    Args:
        low: `(n, entries)`, as for `posterior`.
        high: As there.
        m: As there.
        v: As there.
        common: Variances of the shared error to try, `(tries, entries)`.
        grid: The dtype that W lies on.

    Returns:
        `(tries, entries)`, up to a constant.
    """
    W, width, moments = _nodes(low, high, m, v)
    log_p = moments.log_probability.sum(dim=1) + width.log()
    return torch.stack([torch.logsumexp(log_p + _log_comb(W, c + width.square() / 4, grid), dim=0) for c in common])


def feasible(low: Tensor, high: Tensor, m: Tensor, v: Tensor) -> Tensor:
    """The ends between which W must lie, `(2, entries)`; where the models contradict each other, around their mean."""
    slack = SLACK * v.sqrt()
    ends = torch.stack([(low - m - slack).amax(dim=0), (high - m + slack).amin(dim=0)])
    mean, variance = gaussian(low, high, m, v)
    spread = SLACK * variance.sqrt()
    return torch.where(ends[0] < ends[1], ends, torch.stack([mean - spread, mean + spread]))


def gaussian(low: Tensor, high: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of W with the intervals taken as normal noise of their variance."""
    precision = 1 / (v + (high - low).square() / 12)
    total = precision.sum(dim=0)
    return (precision * ((low + high) / 2 - m)).sum(dim=0) / total, 1 / total


def _given(low: Tensor, high: Tensor, m: Tensor, std: Tensor, W: Tensor, offsets: Tensor) -> Moments:
    """Of every `(M_i - m) / std`, were the entry of the base `W + offset`: `(candidates, n, entries)`, float32.

    What float32 cannot hold, `low - W - m`, is taken before: all else is a few standard deviations.
    """
    a, width = ((low - W - m) / std).float(), ((high - low) / std).float()
    return truncated_normal(a - offsets.float()[:, None] / std.float(), width)


def _given_points(low: Tensor, high: Tensor, m: Tensor, v: Tensor, points: Tensor) -> Posterior:
    """W is one of `points`, `(candidates, entries)`, ascending."""
    middle, std = points[len(points) // 2], v.sqrt()
    moments = _given(low, high, m, std, middle, points - middle)
    log_p = moments.log_probability.sum(dim=1)
    # Where the step halves at a power of two, two candidates round to one point.
    log_p[1:].masked_fill_(points[1:] == points[:-1], -torch.inf)
    p = torch.softmax(log_p, dim=0)
    # Candidates are few: one after the other takes a tenth of what `argmax` does.
    best, weight = p[0], points[0]
    for p_k, point in zip(p[1:], points[1:], strict=True):
        weight = weight + (p_k > best) * (point - weight)
        best = torch.maximum(best, p_k)
    others = p * (points != weight)
    variance = (others * (points - weight).square()).sum(dim=0)
    return Posterior(weight, others.sum(dim=0).double(), variance, *_mixture(p, points - weight, moments, m, std))


def _between(low: Tensor, high: Tensor, m: Tensor, v: Tensor, common: Tensor, grid: torch.dtype | None) -> Posterior:
    """W, less the error that all `M_i` have in common, is any number: a sum over evenly spaced ones."""
    nodes, width, moments = _nodes(low, high, m, v)
    log_p = moments.log_probability.sum(dim=1)
    flat = torch.softmax(log_p, dim=0)
    if grid is not None:
        log_p = log_p + _log_comb(nodes, common + width.square() / 4, grid)
    p = torch.softmax(log_p, dim=0)
    mean = (p * nodes).sum(dim=0)
    variance = (p * (nodes - mean).square()).sum(dim=0) + width.square() / 12
    weight = mean if grid is None else nearest(mean, grid)
    delta, delta_variance, pull = _mixture(p, nodes - mean, moments, m, v.sqrt())
    if grid is not None:
        # Between two grid points the curvature for a change of all M_i together is too small, or of the wrong sign,
        # and Newton's step too long: there it is what it is on average.
        blur = common + (flat * (nodes - (flat * nodes).sum(dim=0)).square()).sum(dim=0)
        delta_variance -= pull.square()
        precision = ((1 - delta_variance / v) / v).sum(dim=0) - _information(blur, spacing(weight, grid))
        together = (pull / v).sum(dim=0).abs().clamp(min=torch.finfo(v.dtype).tiny)
        pull *= (precision.clamp(min=0).sqrt() / together).clamp(max=1)
        delta_variance += pull.square()
    return Posterior(weight, torch.ones_like(weight), variance, delta, delta_variance, pull)


def _nodes(low: Tensor, high: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Moments]:
    """Evenly spaced numbers that W may be, `(NODES, entries)`, their distance, and the `M_i` given each.

    What all intervals have in common is thinner than the range that four deviations leave: that is looked at again.
    """
    ends = feasible(low, high, m, v)
    places = torch.arange(NODES, dtype=low.dtype, device=low.device)[:, None] - NODES // 2
    middle, width = (ends[0] + ends[1]) / 2, (ends[1] - ends[0]) / NODES
    moments = _given(low, high, m, v.sqrt(), middle, width * places)
    p = torch.softmax(moments.log_probability.sum(dim=1), dim=0)
    offset = (p * width * places).sum(dim=0)
    deviation = ((p * (width * places - offset).square()).sum(dim=0) + width.square() / 12).sqrt()
    middle, width = middle + offset, torch.minimum(width, 2 * SLACK * deviation / NODES)
    return middle + width * places, width, _given(low, high, m, v.sqrt(), middle, width * places)


def _information(common: Tensor, step: Tensor) -> Tensor:
    """Fisher's, of the place on a comb of that step, blurred by a normal error of that variance.

    For a small error it is `1 / common`; for a large one only the comb's first harmonic is left, of amplitude
    `2 exp(-x / 2)` with `x = (2 pi / step)^2 common`. In between this is up to 9 % off.
    """
    x = (2 * math.pi / step).square() * common
    return torch.minimum(1 / common, 2 * (2 * math.pi / step).square() / torch.expm1(x))


def _log_comb(T: Tensor, variance: Tensor, grid: torch.dtype) -> Tensor:
    """Logarithm of the density at T of a grid point, as likely as its step is long, and an error of that variance."""
    step = spacing(T, grid)
    off = T - nearest(T, grid)
    scale = -0.5 / variance
    # The nearest tooth, and the others beside it.
    others = torch.zeros_like(T)
    for j in range(1, COMB + 1):
        for side in (-j, j):
            # (off + step j)^2 - off^2
            others += ((2 * side * off + side**2 * step).mul_(step).mul_(scale)).clamp_(min=UNSEEN).exp_()
    comb = off.square() * scale + others.log1p_() + (step.square() / (2 * math.pi * variance)).log() / 2
    # Where the teeth are so close that more of them count, they are as good as none.
    return comb * (step.square() > CLOSE**2 * variance)


def _mixture(p: Tensor, W: Tensor, moments: Moments, m: Tensor, std: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and pull of the `M_i`, `(n, entries)`, where each value of W has the probability p."""
    mean = (p[:, None] * moments.mean).sum(dim=0)
    variance = (p[:, None] * (moments.variance + (moments.mean - mean).square())).sum(dim=0)
    W = W - (p * W).sum(dim=0)
    weighted = p * W
    deviation = (weighted * W).sum(dim=0).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    pull = (weighted[:, None] * moments.mean).sum(dim=0) / deviation
    return m + std * mean, std.square() * variance, std * pull
