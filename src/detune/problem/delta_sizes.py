"""The sizes of deltas, and how alike they are, before any is known.

In differences of models W drops out: `W_i - W_j` times `W_i - W_k` is `M_i^2` on average where the three are
independent, and the squares of all differences tell which are. Entries with fine steps count most, since rounding is
all that others show.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from detune.numerics.float_grid import nearest, spacing
from detune.problem.recovery import FEWEST_MODELS
from detune.problem.stack import Stack
from detune.problem.storage_noise import storage_variance

# Rows with about this many entries show the size of deltas, and the entries with the finest steps show it best (any
# number does: `benchmarks/constants.py`).
SAMPLED, FINEST = 1 << 17, 0.03
# Fewer show whether deltas are alike: a product of independent ones is known to 1 % of their sizes (any number does:
# `benchmarks/constants.py`).
SAMPLED_FOR_PRODUCTS = 1 << 15
# No model's delta is taken for smaller than a tenth of their average: what is too small to be measured is not zero (any
# number does: `benchmarks/constants.py`).
SMALLEST_SHARE = 0.1
# Standard errors by which a delta's size may be larger than it seems, and two deltas' product too (any number does:
# `benchmarks/constants.py`).
SURE = 3.0
# Fine-tunes of one base on texts of one language had a correlation of 0.16 at most (`benchmarks/llm.py`): from 0.25 on
# two are not independent (measured).
MOST_ALIKE = 0.25
# Those of few directions reach 0.3 by chance (`tests/methods/test_auto.py`), and to leave one out costs little accuracy
# but some; a copy, a later checkpoint or a merge of two has 0.45 or more with one of the others (`benchmarks/llm.py`)
# (measured).
TOO_ALIKE = 0.35
# A delta that has less than 0.15 of the larger one in common with another is as good as independent of it: what
# independent ones of a real model have in common comes to 0.13 of them (measured: `benchmarks/llm.py`).
LEAST_SHARED = 0.15
# Bases of three that are looked at: all that fifteen models have (any number does).
MOST_THREES = 455
# Pairs that are alike from one base and not from another, by chance: of two fine-tunes of one fine-tune and three more
# two more are alike from the wrong base (derived).
BY_CHANCE = 1
LEAST = torch.finfo(torch.float64).tiny


class DeltaScale(NamedTuple):
    """The size of a delta's entries.

    Attributes:
        rms: Root mean square.
        at_most: What it is hardly more than.
    """

    rms: float
    at_most: float


class Product(NamedTuple):
    """A mean of products of entries, and its standard error."""

    mean: float
    error: float


@dataclass(frozen=True)
class Sample:
    """Some rows of all models.

    Attributes:
        values: `W_i - W_1`, `(n, entries)`, float64.
        weights: Weights of the entries, `(entries,)`, their sum 1.
        rounding: Mean square of both models' rounding in the difference of two, with these weights, `(n, n)`.
    """

    values: Tensor
    weights: Tensor
    rounding: Tensor

    @classmethod
    def of(cls, stack: Stack, entries: int) -> "Sample":
        """Take rows with about as many entries, at regular distances."""
        every = max(1, stack.shape[0] * stack.shape[1] // entries)
        rows = [W_i[::every].cpu() for W_i in stack.matrices]
        if stack.noise_override:
            noise = torch.stack([torch.full(rows[0].shape, s**2, dtype=torch.float64) for s in stack.noise_override])
        else:
            noise = torch.stack(
                [storage_variance(W_i, dtype) for W_i, dtype in zip(rows, stack.rounded_dtypes, strict=True)]
            )
        values = torch.stack([W_i.double() for W_i in rows]).flatten(1)
        # Zeros have the finest steps of all, and nothing shows in rows of them.
        seen = values.ne(0).any(dim=0)
        seen = seen if bool(seen.any()) else torch.ones_like(seen)
        values, noise = values[:, seen], noise.flatten(1)[:, seen]
        values -= values[0].clone()
        summed = noise.sum(dim=0)
        size = (values - values.mean(dim=0)).square().mean(dim=0)
        # The size of the deltas where rounding is finest: there it counts.
        fine = summed <= summed[:: max(1, summed.numel() // 10**5)].quantile(FINEST)
        typical = max(float(size[fine].mean() - summed[fine].mean() / stack.n), LEAST)
        weights = 1 / (summed + typical).square()
        weights /= weights.sum()
        own = noise @ weights
        return cls(values, weights, own[:, None] + own)

    def mean(self, products: Tensor) -> Product:
        """The mean over the entries."""
        mean = float((self.weights * products).sum())
        return Product(mean, float((self.weights * (products - mean)).square().sum().sqrt()))

    @property
    def distances(self) -> tuple[Tensor, Tensor]:
        """Mean squares of `M_i - M_j`, and their standard errors as of normal entries, both `(n, n)`."""
        products = (self.values * self.weights) @ self.values.mT
        squares = products.diagonal()
        found = squares[:, None] + squares - 2 * products
        return (found - self.rounding).fill_diagonal_(0), found * (2 * self.weights.square().sum()).sqrt()

    def square(self, i: int, others: Sequence[int]) -> Product:
        """Mean square of `M_i`, where it and the others are independent."""
        away = self.values[i] - self.values[list(others)]
        # The mean over pairs j != k of the products, from their sums.
        products = away.sum(dim=0).square() - away.square().sum(dim=0)
        return self.mean(products / (len(others) * (len(others) - 1)))


def delta_scales(stack: Stack) -> list[DeltaScale]:
    """Root mean square of each delta's entries, from two models on; two share what their difference shows."""
    sample = Sample.of(stack, SAMPLED)
    models = range(stack.n)
    if stack.n == 2:
        return [DeltaScale(math.sqrt(max(float(sample.distances[0][0, 1]) / 2, LEAST)), math.inf)] * 2
    found = [sample.square(i, [j for j in models if j != i]) for i in models]
    typical = max(sum(max(0.0, square) for square, _ in found) / stack.n, LEAST)
    return [
        DeltaScale(math.sqrt(max(square, SMALLEST_SHARE**2 * typical)), math.sqrt(max(0.0, square + SURE * error)))
        for square, error in found
    ]


def independent_models(stack: Stack, most_alike: float = TOO_ALIKE) -> tuple[int, ...]:
    """The models without those whose deltas are more alike than independent fine-tunes: a copy at another strength.

    Distances of three models are those of three independent deltas from one base, whatever they are: of a fine-tune, a
    copy of it and another, that base is the copy or beyond; of two fine-tunes of one fine-tune and another, it is that
    first one. So the base is one that the fewest pairs of deltas are alike from, and of such bases that of the three
    whose smallest delta is largest. Of all models the most that are not alike, seen from there, are taken, with the
    largest deltas: their directions stand over the noise.

    Args:
        stack: The models.
        most_alike: The largest correlation of two deltas that are not alike.

    Returns:
        Which, in order: all where there are three or fewer, and where no three are independent.
    """
    models = tuple(range(stack.n))
    if stack.n <= FEWEST_MODELS:
        return models
    distances, errors = Sample.of(stack, SAMPLED_FOR_PRODUCTS).distances
    threes = torch.combinations(torch.arange(stack.n), FEWEST_MODELS)
    own = _squares(distances, threes)
    smallest, order = own.min(dim=1).values.sort(descending=True, stable=True)
    order = order[smallest > 0][:MOST_THREES]
    if not len(order):
        return models
    threes = threes[order]
    squares = _squares_from(distances, threes, own[order])
    products = (squares[:, :, None] + squares[:, None] - distances) / 2
    sizes = squares.clamp(min=0)
    # Deltas of one direction, in rows that they share, have a correlation of about this size by chance.
    by_chance = min(stack.shape) ** -0.5
    least = torch.maximum(
        max(most_alike, SURE * by_chance) * (sizes[:, :, None] * sizes[:, None]).sqrt(),
        LEAST_SHARED * torch.maximum(sizes[:, :, None], sizes[:, None]),
    )
    alike = products.abs() > least + SURE * errors / 2
    pairs = alike.triu(diagonal=1).sum(dim=(1, 2))
    best = int((pairs <= pairs.min() + BY_CHANCE).nonzero()[0])
    found = _most_unlike(alike[best], squares[best].tolist())
    return found if len(found) >= FEWEST_MODELS else tuple(threes[best].tolist())


def _most_unlike(alike: Tensor, squares: Sequence[float]) -> tuple[int, ...]:
    """The most models of which no two are alike; of several such sets the one with the largest deltas.

    Either the model that is like most others is in the set, and these are not, or it is not: copies of one model go at
    once, and pairs of copies, where going through all sets would take `2^n` steps.
    """
    relatives = [{j for j in range(len(alike)) if j != i and alike[min(i, j), max(i, j)]} for i in range(len(alike))]

    def most(left: frozenset[int]) -> tuple[int, ...]:
        crowded = max(sorted(left), key=lambda i: len(relatives[i] & left), default=None)
        if crowded is None or not relatives[crowded] & left:
            return tuple(left)
        if len(relatives[crowded] & left) == 1:
            # Pairs are left, and models that are like none.
            return tuple(i for i in left if all((squares[i], i) > (squares[j], j) for j in relatives[i] & left))
        without = left - {crowded}
        sets = ((crowded, *most(without - relatives[crowded])), most(without))
        return max(sets, key=lambda each: (len(each), sum(squares[i] for i in each)))

    return tuple(sorted(most(frozenset(range(len(alike))))))


def _squares(distances: Tensor, threes: Tensor) -> Tensor:
    """Mean squares of three independent deltas with these distances, `(threes, 3)`."""
    i, j, k = threes.T
    a, b, c = distances[i, j], distances[i, k], distances[j, k]
    return torch.stack([a + b - c, a + c - b, b + c - a], dim=1) / 2


def _squares_from(distances: Tensor, threes: Tensor, own: Tensor) -> Tensor:
    """Mean squares of all deltas from the bases of three independent ones, `(threes, n)`.

    A distance from one of these is `m + m_t - 2 p_t`: with the square m of a delta its three products p_t are known.
    Of the m that Bessel's inequality `sum_t p_t^2 / m_t <= m` allows, that is taken with the least sum of |p_t|.

    Args:
        distances: Mean squares of differences, `(n, n)`.
        threes: Which three, `(threes, 3)`.
        own: Mean squares of their deltas, above zero.
    """
    # p_t = (m - off_t) / 2, so the inequality is a quadratic one in m.
    off, own = distances[threes].mT - own[:, None], own[:, None]
    second, first, constant = ((each / (4 * own)).sum(dim=2) for each in (torch.ones_like(off), -2 * off, off.square()))
    vertex = (1 - first) / (2 * second)
    reach = (vertex.square() - constant / second).clamp(min=0).sqrt()
    squares = off.median(dim=2).values.clamp(min=vertex - reach, max=vertex + reach)
    return squares.scatter(1, threes, own[:, 0])


def beside_rounding(rest: Tensor, W_i: Tensor) -> float:
    """Mean square of what a model differs by from a base, beside rounding, where its steps are finest."""
    rounding = storage_variance(W_i).flatten()
    fine = rounding <= rounding[:: max(1, rounding.numel() // 10**5)].quantile(FINEST)
    return float((rest.flatten()[fine].square() - rounding[fine]).mean().clamp(min=0))


def scatter(W_1: Tensor, grid: torch.dtype) -> DeltaScale:
    """The size tau of a single model's delta, by the scatter of its entries about the grid.

    Solves `E cos(2 pi W_1 / step) = exp(-2 pi^2 tau^2 / step^2)`, which holds for normal deltas, by bisection.
    """
    W_1 = W_1[:: max(1, W_1.numel() // SAMPLED)].cpu()
    step = spacing(W_1, grid)
    cosine = float(torch.cos(2 * math.pi * (W_1.double() - nearest(W_1, grid)) / step).mean())
    low, high = 1e-6 * float(step.median()), 1e3 * float(step.median())
    while high > 1.001 * low:
        tau = math.sqrt(low * high)
        if float(torch.exp(-2 * (math.pi * tau / step).square()).mean()) > cosine:
            low = tau
        else:
            high = tau
    return DeltaScale(high, math.inf)
