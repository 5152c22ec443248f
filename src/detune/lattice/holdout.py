"""Does the base lie on a grid, and how well are the `M_i` known? Entries that the fit has not seen decide."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from detune.lattice.estimate import Estimate
from detune.lattice.posterior import feasible, gaussian, log_evidence
from detune.numerics.float_grid import interval, nearest, spacing
from detune.numerics.random import seeded
from detune.problem.stack import Stack

SHARE = 1 / 8
MOST = 1 << 13
# A grid point hits if it is within so many standard deviations of where it must be.
HIT = 2.0
# Entries whose chance of a hit by accident is larger than this say little, and are left out.
INFORMATIVE = 0.5
# So large a share of the misses by chance is granted as hits, because the M_i are not quite what they are taken for.
MARGIN = 0.5
# What an entry may be off by, in steps, before it counts as a misfit.
ALLOWED_STEPS = 0.05
# Tries for the scale of the variances, relative to the one so far.
SCALES = (1 / 4, 1 / 2, 1.0, 2.0, 4.0)
# And for the variance that all models share.
SHARED = (0.0, 0.25, 1.0, 4.0, 16.0, 64.0, 256.0)
# So many typical entries are added to those of a line.
TYPICAL = 16
# Intervals of more steps of the grid than this are left out: they say nothing of it.
REACH = 4


@dataclass(frozen=True)
class HeldOut:
    """Some entries of the stack, chosen at random and kept from the fit.

    Attributes:
        rows: `(entries,)`.
        columns: `(entries,)`.
        low: Lower ends of the models' intervals there, `(n, entries)`, float64.
        high: Upper ends.
        dtypes: The models' dtypes.
        used: The others, `(out, in)`, bool.
    """

    rows: Tensor
    columns: Tensor
    low: Tensor
    high: Tensor
    dtypes: tuple[torch.dtype, ...]
    used: Tensor

    @classmethod
    def of(cls, stack: Stack, seed: int) -> "HeldOut":
        """Draw them."""
        out, width = stack.shape
        generator = seeded(seed)
        count = min(MOST, max(1, int(SHARE * out * width)))
        chosen = torch.randint(out * width, (count,), generator=generator).unique()
        rows, columns = (chosen // width).to(stack.device), (chosen % width).to(stack.device)
        intervals = [interval(W_i.to(stack.device)[rows, columns]) for W_i in stack.matrices]
        used = torch.ones(out, width, dtype=torch.bool, device=stack.device)
        used[rows, columns] = False
        return cls(
            rows,
            columns,
            torch.stack([i.low for i in intervals]),
            torch.stack([i.high for i in intervals]),
            tuple(W_i.dtype for W_i in stack.matrices),
            used,
        )

    def entries(self, estimates: Sequence[Estimate]) -> tuple[Tensor, Tensor]:
        """Mean and variance of every `M_i` there, `(n, entries)`."""
        found = [estimate.at(self.rows, self.columns) for estimate in estimates]
        return torch.stack([m for m, _ in found]), torch.stack([v for _, v in found])


def calibrated(held: HeldOut, estimates: Sequence[Estimate], grid: torch.dtype) -> tuple[tuple[Estimate, ...], float]:
    """The estimates with their variances scaled so that the entries held out are most likely.

    And with what their errors have in common, row by row or column by column. Adapters of one seed share most of their
    row spaces; W can then be off in a row, every `M_i` by the same with the opposite sign, and little tells. A few rows
    may be off by far more than the others: with a variance for all they would be locked on wrong grid points.

    Returns:
        The estimates, and the mean logarithm of that likelihood.
    """
    m, v = held.entries(estimates)
    g = nearest(gaussian(held.low, held.high, m, v)[0], grid)
    keep = spacing(g, grid) * REACH > (held.high - held.low).amin(dim=0)
    low, high, m, v = (t[:, keep] for t in (held.low, held.high, m, v))
    # One model shares its errors with no other; in what two do not share, their difference leaves next to none.
    tries = torch.tensor(SHARED if len(m) > 2 else SHARED[:1], dtype=v.dtype, device=v.device)
    found, best = list(estimates), -math.inf
    for scale in SCALES:
        evidence = log_evidence(low, high, m, scale * v, tries[:, None] * scale * v.amin(dim=0), grid)
        rows, by_rows = _best_by_line(evidence, held.rows[keep], held.used.shape[0])
        columns, by_columns = _best_by_line(evidence, held.columns[keep], held.used.shape[1])
        if max(by_rows, by_columns) > best:
            best = max(by_rows, by_columns)
            shared = tries[rows] * (by_rows >= by_columns), tries[columns] * (by_rows < by_columns)
            found = [
                replace(e, scale=scale * e.scale, shared_rows=shared[0], shared_columns=shared[1]) for e in estimates
            ]
    return tuple(found), best / max(1, int(keep.sum()))


def _best_by_line(evidence: Tensor, lines: Tensor, size: int) -> tuple[Tensor, float]:
    """The best try for each line, and the evidence of all with those.

    Args:
        evidence: Of each entry with each try, `(tries, entries)`.
        lines: The row, or column, of each entry.
        size: How many lines there are.
    """
    by_line = evidence.new_zeros(len(evidence), size).index_add_(1, lines, evidence)
    # A line has few entries: what all say counts as some more.
    chosen = (by_line + TYPICAL * evidence.mean(dim=1, keepdim=True)).argmax(dim=0)
    return chosen, float(by_line.gather(0, chosen[None]).sum())


def log10_false_positive(held: HeldOut, estimates: Sequence[Estimate], grid: torch.dtype) -> float:
    """A bound for the probability of as many hits, had the base been off the grid.

    For a base off the grid the place of W between two grid points is uniform. The models' rounding cuts that range at
    the points `ends of W_i's interval - M_i` into arcs, one of which holds a grid point: W is in that one with a chance
    q, its length in steps. Entries with a small q are counted, and half of the rest granted as hits too, for errors
    of the M_i; Chernoff's bound `exp(-N KL(hits / N || chance))` is the tail's (Hoeffding 1963, Theorem 1).
    """
    m, v = held.entries(estimates)
    g = nearest(gaussian(held.low, held.high, m, v)[0], grid)
    slack = HIT * v.sqrt()
    hit = ((held.low - m - slack).amax(dim=0) <= g) & (g <= (held.high - m + slack).amin(dim=0))
    ends = [interval((g + m_i).to(dtype)) for m_i, dtype in zip(m, held.dtypes, strict=True)]
    low = torch.stack([end.low for end in ends]) - m - slack
    high = torch.stack([end.high for end in ends]) - m + slack
    q = (high.amin(dim=0) - low.amax(dim=0)) / spacing(g, grid)
    counted = q < INFORMATIVE
    N = int(counted.sum())
    if not N:
        return 0.0
    rate, chance = float(hit[counted].double().mean()), float(q[counted].mean())
    chance += MARGIN * (1 - chance)
    return -N * _divergence(rate, chance) / math.log(10) if rate > chance else 0.0


def misfit(held: HeldOut, estimates: Sequence[Estimate], grid: torch.dtype) -> float:
    """The share of the entries held out where the models leave no grid point for W.

    Four deviations and a twentieth of a step are allowed: an `M_i` that is known to a thousandth of a step leaves no
    doubt, whatever its deviation says, and a wrong one is off by anything up to half a step.
    """
    m, v = held.entries(estimates)
    low, high = feasible(held.low, held.high, m, v)
    g = nearest((low + high) / 2, grid)
    allowed = ALLOWED_STEPS * spacing(g, grid)
    return float(((g < low - allowed) | (g > high + allowed)).double().mean())


def _divergence(p: float, q: float) -> float:
    """Of two coins, in nats."""
    heads = p * math.log(p / q)
    return heads + (1 - p) * math.log((1 - p) / (1 - q)) if p < 1 else heads
