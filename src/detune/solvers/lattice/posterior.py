"""What the models' rounding intervals say of one entry of the base, and of that entry of every `M_i`.

Model i holds `low_i < W + M_i < high_i`. With `M_i ~ N(m_i, v_i)` from the rest of its matrix, and W on a grid, the
probability of a grid point g is

    p(g) = product_i P(low_i - g < M_i < high_i - g),

and the posterior of `M_i` the mixture of its truncated normals. Where the grid is finer than the intervals, W is as
good as continuous, and the sum is taken over evenly spaced numbers instead.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from detune.solvers.grid import nearest, spacing
from detune.solvers.lattice.truncated import Moments, truncated_normal

# How many standard deviations of M_i the search for grid points allows beyond the interval's ends.
SLACK = 4.0
# Grid points looked at on each side of the middle: as many as the intervals leave, or the entry is continuous.
REACHES = (0, 1, 2, 4)
# Numbers that stand for a continuous W.
NODES = 9


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
    low: Tensor, high: Tensor, m: Tensor, v: Tensor, grid: torch.dtype | None, least_reach: int = 0
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
    """
    ends = feasible(low, high, m, v)
    middle = ends.mean(dim=0)
    reach = torch.full_like(middle, REACHES[-1] + 1)
    step = torch.ones_like(middle)
    if grid is not None:
        # The finest step between the ends: next to zero there is no end of grid points.
        smallest = torch.where(ends[0] * ends[1] < 0, 0.0, ends.abs().amin(dim=0))
        step = spacing(smallest, grid)
        middle = nearest(middle, grid)
        reach = torch.ceil(((ends - middle).abs().amax(dim=0) - step) / step).clamp(min=least_reach)
    parts = Posterior(*(torch.empty_like(t) for t in (middle, middle, middle, m, m, m)))
    below = -1
    for most in (*REACHES, None):
        chosen = (reach > below) if most is None else (reach > below) & (reach <= most)
        below = below if most is None else most
        where = chosen.nonzero().squeeze(1)
        if not len(where):
            continue
        arguments = low[:, where], high[:, where], m[:, where], v[:, where]
        if most is None or grid is None:
            found = _between(*arguments, ends[:, where], grid)
        else:
            offsets = torch.arange(-most, most + 1, device=low.device)[:, None]
            found = _given_points(*arguments, nearest(middle[where] + step[where] * offsets, grid))
        for whole, part in zip(parts, found, strict=True):
            whole[..., where] = part
    return parts


def log_evidence(low: Tensor, high: Tensor, m: Tensor, v: Tensor, points: Tensor) -> Tensor:
    """Logarithm of the probability of the intervals, `(entries,)`, up to a constant.

    Args:
        low: `(n, entries)`, as for `posterior`.
        high: As there.
        m: As there.
        v: As there.
        points: Grid points that W may be, equally likely, `(candidates, entries)`.
    """
    middle = points[len(points) // 2]
    moments = _given(low, high, m, v.sqrt(), middle, points - middle)
    return torch.logsumexp(moments.log_probability.sum(dim=1), dim=0)


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
    best = p.argmax(dim=0, keepdim=True)
    weight = points.gather(0, best)[0]
    others = p.scatter(0, best, 0.0)
    variance = (others * (points - weight).square()).sum(dim=0)
    return Posterior(weight, others.sum(dim=0).double(), variance, *_mixture(p, points - weight, moments, m, std))


def _between(low: Tensor, high: Tensor, m: Tensor, v: Tensor, ends: Tensor, grid: torch.dtype | None) -> Posterior:
    """W is any number between the ends: the same sum, over evenly spaced numbers."""
    std, width = v.sqrt(), (ends[1] - ends[0]) / NODES
    places = torch.arange(NODES, dtype=low.dtype, device=low.device)[:, None] - NODES // 2
    middle = (ends[0] + ends[1]) / 2
    moments = _given(low, high, m, std, middle, width * places)
    p = torch.softmax(moments.log_probability.sum(dim=1), dim=0)
    offset = (p * width * places).sum(dim=0)
    variance = (p * (width * places - offset).square()).sum(dim=0) + width.square() / 12
    weight = middle + offset if grid is None else nearest(middle + offset, grid)
    return Posterior(weight, torch.ones_like(weight), variance, *_mixture(p, width * places - offset, moments, m, std))


def _mixture(p: Tensor, W: Tensor, moments: Moments, m: Tensor, std: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and pull of the `M_i`, `(n, entries)`, where each value of W has the probability p."""
    mean = (p[:, None] * moments.mean).sum(dim=0)
    variance = (p[:, None] * (moments.variance + (moments.mean - mean).square())).sum(dim=0)
    W = W - (p * W).sum(dim=0)
    weighted = p * W
    deviation = (weighted * W).sum(dim=0).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    pull = (weighted[:, None] * moments.mean).sum(dim=0) / deviation
    return m + std * mean, std.square() * variance, std * pull
