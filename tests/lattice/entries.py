"""Single entries whose W and `M_i` are known, and their posterior as a sum over grid points."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from detune.lattice.entries import grid_of
from detune.lattice.posterior import evaluate, packet_of, sort, strip_of
from detune.numerics import float_grid

GRID = torch.bfloat16
POINTS, WEIGHTS = np.polynomial.legendre.leggauss(100)


def truncated(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probability, mean and variance of `N(0, 1)` between a and b, by Gauss-Legendre quadrature.

    The density is taken relative to its largest value, over the part that holds the mass.
    """
    a, b = np.broadcast_arrays(a, b)
    peak = np.clip(0.0, a, b)
    reach = np.minimum(12.0, 40 / np.maximum(1e-3, np.abs(peak)))
    a, b = np.maximum(a, peak - reach)[..., None], np.minimum(b, peak + reach)[..., None]
    t = a - peak[..., None] + (b - a) * (POINTS + 1) / 2
    mass = WEIGHTS * (b - a) / 2 * np.exp(-t * (t / 2 + peak[..., None]))
    total = mass.sum(axis=-1)
    mean = (mass * t).sum(axis=-1) / total
    variance = (mass * (t - mean[..., None]) ** 2).sum(axis=-1) / total
    return total * np.exp(-(peak**2) / 2) / math.sqrt(2 * math.pi), peak + mean, variance


@dataclass(frozen=True)
class Sample:
    """Entries of W, on the bf16 grid, and of models whose `M_i` are known up to `std` steps.

    Attributes:
        W: `(entries,)`.
        M: `(entries, n)`, as all others.
        low: Lower ends of the models' intervals.
        high: Upper ends.
        m: Means of the `M_i`.
        v: Variances.
    """

    W: np.ndarray
    M: np.ndarray
    low: np.ndarray
    high: np.ndarray
    m: np.ndarray
    v: np.ndarray

    @classmethod
    def draw(
        cls, n: int, std: float, merge: torch.dtype, seed: int = 0, entries: int = 200, off: bool = False
    ) -> "Sample":
        """Weights of one grid point or of none, `M_i` of about a step."""
        generator = np.random.default_rng(seed)
        W = torch.from_numpy(generator.normal(size=(entries, 1)))
        W = W if off else float_grid.nearest(W, GRID)
        step = float_grid.spacing(W, GRID).numpy()
        # The M_i are what the rest says up to float32, as in the fit.
        m = (step * generator.normal(size=(entries, n))).astype(np.float32).astype(np.float64)
        s = np.broadcast_to(std * step, m.shape)
        M = m + s * generator.normal(size=m.shape)
        ends = float_grid.interval((W + torch.from_numpy(M)).to(merge))
        return cls(W[:, 0].numpy(), M, ends.low.numpy(), ends.high.numpy(), m, s**2)

    @property
    def step(self) -> np.ndarray:
        return float_grid.spacing(torch.from_numpy(self.W), GRID).numpy()

    def at(self, e: int) -> tuple[np.ndarray, ...]:
        return self.low[e], self.high[e], self.m[e], self.v[e]

    def by_sum(self, e: int, points: np.ndarray, change: np.ndarray | float = 0.0) -> "Posterior":
        """Every point is as likely as the others; the `M_i` are expected to be off by `change`."""
        low, high, m, v = self.at(e)
        std = np.sqrt(v)
        a, b = ((end - points[:, None] - m - change) / std for end in (low, high))
        Z, mean, variance = truncated(a, b)
        likelihood = Z.prod(axis=1)
        p = likelihood / likelihood.sum()
        best = int(p.argmax())
        shift = p @ mean
        away = points - p @ points
        spread = float(p @ away**2)
        between = np.einsum("k,ki,kj->ij", p, mean - shift, mean - shift)
        return Posterior(
            points[best],
            1 - p[best],
            float(p @ (points - points[best]) ** 2),
            std * shift,
            v * (p @ variance) + v * np.diag(between),
            std * ((p * away) @ (mean - shift)) / math.sqrt(spread) if spread else 0 * std,
            std[:, None] * std * between,
            likelihood,
        )


@dataclass(frozen=True)
class Posterior:
    """One entry's posterior: as `entry` gives it, then the covariance of means between points and all likelihoods."""

    weight: float
    doubt: float
    error: float
    shift: np.ndarray
    left: np.ndarray
    pull: np.ndarray
    between: np.ndarray | None = None
    likelihoods: np.ndarray | None = None


def found(sample: Sample, e: int, grid: torch.dtype | None = GRID, least: float = 1.0) -> Posterior:
    """What the compiled loops say of one entry."""
    n = sample.low.shape[1]
    strip, memory = strip_of(n, 1), np.empty((2, 1))
    strip.low[:, 0], strip.high[:, 0], strip.mean[:, 0], strip.variance[:, 0] = sample.at(e)
    # Nothing is settled beyond infinitely many deviations.
    sort(strip, math.inf, 0.0, least, grid_of(grid), *memory)
    evaluate(strip, packet_of(n, 1), grid_of(grid))
    of_models = (strip.shift[:, 0], strip.left[:, 0], strip.pull[:, 0])
    return Posterior(float(strip.W[0]), float(strip.doubt[0]), float(strip.error[0]), *of_models)


def all_points(W: float, reach: int = 40) -> np.ndarray:
    """The bf16 numbers around W by their bit patterns: W's own spacing holds on neither side of a power of two."""
    pattern = int(torch.tensor(abs(W)).bfloat16().view(torch.int16))
    patterns = torch.arange(max(0, pattern - reach), pattern + reach + 1).to(torch.int16)
    return patterns.view(torch.bfloat16).double().numpy() * math.copysign(1, W)


REGIMES = [
    (1, 0.05, torch.float32),
    (1, 0.2, torch.float32),
    (1, 0.5, torch.float32),
    (2, 0.3, torch.float32),
    (3, 0.7, torch.float32),
    (1, 0.3, torch.bfloat16),
    (2, 0.2, torch.bfloat16),
    (3, 0.1, torch.bfloat16),
    (2, 0.3, torch.float16),
    (3, 0.02, torch.float16),
]
