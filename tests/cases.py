"""The solvers' conformance table, and the random problems that it speaks of.

A new solver needs one row: a regime that it must solve, how well, and how far rounding and its random vectors may
move the answer when the same problem is put another way.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from detune.methods.vera import draw_factors


@dataclass(frozen=True)
class Problem:
    """A matrix recovery problem and its solution.

    Attributes:
        W_star: The base's matrix, `(out, in)`, float64.
        deltas: The true `M_i`, float64.
        stack: `W_star + M_i`, rounded once to the storage dtype, `(n, out, in)`.
    """

    W_star: Tensor
    deltas: tuple[Tensor, ...]
    stack: Tensor

    def turned(self, left: Tensor, right: Tensor) -> "Problem":
        """The problem in other orthonormal bases, rounded once again as storing does it."""
        W_star = left @ self.W_star @ right
        deltas = tuple(left @ M_i @ right for M_i in self.deltas)
        return Problem(W_star, deltas, torch.stack([W_star + M_i for M_i in deltas]).to(self.stack.dtype))

    def error(self, weight: Tensor) -> float:
        """Root mean square error of an answer, over that of the deltas."""
        return rms(weight.double() - self.W_star) / self.delta_rms

    @property
    def delta_rms(self) -> float:
        return rms(torch.stack(self.deltas))


@dataclass(frozen=True)
class Regime:
    """What a random problem looks like.

    Attributes:
        shape: `(out, in)`.
        ranks: Of the true `M_i`.
        decay: Singular values of `M_i` fall from 1 to `e^-decay`.
        scale: Root mean square of an `M_i` of full scale, where W has 1.
        shared_rows: Share of the row factors that all models have in common, as LoRAs of one seed do.
        dtype: Storage dtype.
        frozen: Each `M_i` scales the rows and directions of VeRA's factors, of its rank and of this seed.
        changed: Each `M_i` is a random choice of this share of the entries.
        blocks: Shape of the first factors of Kronecker products, of which each `M_i` is the sum of as many as its rank.
    """

    shape: tuple[int, int] = (72, 60)
    ranks: tuple[int, ...] = (4, 4, 4)
    decay: float = 0.0
    scale: float = 0.1
    shared_rows: float = 0.0
    dtype: torch.dtype = torch.float64
    frozen: int | None = None
    changed: float = 0.0
    blocks: tuple[int, int] | None = None

    def change_of_basis(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random orthogonal matrices for columns and rows that leave the regime what it is; none where it is fixed."""
        if self.frozen is not None:
            left, right = (torch.eye(size, dtype=torch.float64) for size in self.shape)
            return left, right
        if self.changed:
            left, right = (torch.eye(size)[torch.randperm(size, generator=generator)].double() for size in self.shape)
            return left, right
        if self.blocks is None:
            return orthogonal(generator, self.shape[0]), orthogonal(generator, self.shape[1])
        left, right = (
            torch.kron(orthogonal(generator, part), orthogonal(generator, size // part))
            for size, part in zip(self.shape, self.blocks, strict=True)
        )
        return left, right


REGIMES = {
    "plain": Regime(),
    "tall": Regime(shape=(120, 40)),
    "wide": Regime(shape=(40, 120)),
    "mixed ranks": Regime(ranks=(7, 2, 5, 3)),
    "one model unchanged": Regime(ranks=(4, 0, 4)),
    "decaying": Regime(ranks=(6, 6, 6), decay=7.0),
    "one seed": Regime(shared_rows=0.97),
    "many models": Regime(ranks=(4,) * 6),
    "high ranks": Regime(shape=(40, 120), ranks=(17, 17, 17)),
    "frozen factors": Regime(frozen=0, ranks=(20, 20, 20), dtype=torch.float32),
    "few entries": Regime(changed=0.03, ranks=(1,) * 5),
    "Kronecker products": Regime(blocks=(6, 5), ranks=(1, 1, 1)),
    "sums of two Kronecker products": Regime(blocks=(6, 5), ranks=(2, 2, 2, 2), dtype=torch.float32),
    "float32": Regime(shape=(96, 80), scale=0.01, dtype=torch.float32),
    "bfloat16": Regime(shape=(160, 128), scale=0.3, ranks=(3,) * 6, dtype=torch.bfloat16),
    "float16": Regime(shape=(160, 128), scale=0.1, ranks=(3,) * 5, dtype=torch.float16),
}


class Case(NamedTuple):
    """One row of the table; both figures are in units of the deltas' root mean square.

    Attributes:
        solver: A name in `SOLVERS`.
        regime: A name in `REGIMES`.
        tolerance: The largest error of the answer.
        rounding: How far the answer may move when the problem is turned, scaled, shifted or permuted.
    """

    solver: str
    regime: str
    tolerance: float
    rounding: float


CASES = (
    Case("single", "plain", 1.1, 1e-13),
    Case("single", "bfloat16", 1.1, 1e-1),
    Case("mean", "plain", 0.65, 1e-13),
    Case("mean", "many models", 0.45, 1e-13),
    Case("mean", "float32", 0.65, 1e-4),
    Case("mean", "bfloat16", 0.45, 1e-1),
    Case("spectral", "plain", 1e-4, 1e-4),
    Case("spectral", "many models", 1e-12, 1e-12),
    Case("intersect", "plain", 1e-12, 1e-12),
    Case("intersect", "tall", 1e-12, 1e-12),
    Case("intersect", "wide", 1e-12, 1e-12),
    Case("intersect", "mixed ranks", 1e-12, 1e-12),
    Case("intersect", "one model unchanged", 1e-12, 1e-12),
    Case("intersect", "decaying", 1e-9, 1e-9),
    Case("intersect", "one seed", 1e-11, 1e-11),
    Case("intersect", "many models", 1e-12, 1e-12),
    Case("intersect", "high ranks", 1e-11, 1e-11),
    Case("intersect", "float32", 1e-3, 1e-3),
    Case("intersect", "bfloat16", 1e-1, 1e-1),
    Case("intersect", "float16", 1e-1, 1e-1),
    Case("lokr", "plain", 1e-12, 1e-12),
    Case("lokr", "Kronecker products", 1e-12, 1e-12),
    Case("lokr", "sums of two Kronecker products", 1e-4, 1e-4),
    Case("shira", "few entries", 1e-1, 1e-13),
    Case("vera", "frozen factors", 1e-4, 1e-4),
    Case("dora", "plain", 1e-12, 1e-12),
    Case("dora", "mixed ranks", 1e-12, 1e-12),
    Case("dora", "float32", 1e-4, 1e-4),
    Case("lattice", "plain", 1e-12, 1e-12),
    Case("lattice", "mixed ranks", 1e-12, 1e-12),
    Case("lattice", "one model unchanged", 1e-12, 1e-12),
    Case("lattice", "bfloat16", 1e-1, 1e-1),
    Case("auto", "plain", 1e-12, 1e-12),
    Case("auto", "tall", 1e-12, 1e-12),
    Case("auto", "wide", 1e-12, 1e-12),
    Case("auto", "mixed ranks", 1e-12, 1e-12),
    Case("auto", "one model unchanged", 1e-12, 1e-12),
    Case("auto", "decaying", 1e-11, 1e-11),
    Case("auto", "one seed", 1e-11, 1e-11),
    Case("auto", "many models", 1e-12, 1e-12),
    Case("auto", "high ranks", 1e-11, 1e-11),
    Case("auto", "float32", 1e-4, 1e-4),
    Case("auto", "bfloat16", 1e-1, 1e-1),
    Case("auto", "float16", 1e-2, 1e-2),
)


def make_problem(regime: Regime, generator: torch.Generator) -> Problem:
    """Draw a problem: Gaussian W, deltas with Haar-like spaces and the regime's singular values."""
    if regime.blocks is not None:
        return _make_kronecker(regime, generator)
    if regime.changed:
        return _make_sparse(regime, generator)
    if regime.frozen is not None:
        return _make_frozen(regime, generator)
    out, columns = regime.shape
    W_star = normal(generator, out, columns)
    common = normal(generator, columns, max(regime.ranks))
    deltas = []
    for r in regime.ranks:
        own = normal(generator, columns, r)
        rows = regime.shared_rows**0.5 * common[:, :r] + (1 - regime.shared_rows) ** 0.5 * own
        U, V = torch.linalg.qr(normal(generator, out, r))[0], torch.linalg.qr(rows)[0]
        sigma = torch.exp(torch.linspace(0, -regime.decay, r, dtype=torch.float64))
        deltas.append(regime.scale * (out * columns / max(1, r)) ** 0.5 * (U * sigma) @ V.mT)
    stack = torch.stack([W_star + M_i for M_i in deltas]).to(regime.dtype)
    return Problem(W_star, tuple(deltas), stack)


def _make_kronecker(regime: Regime, generator: torch.Generator) -> Problem:
    (out, columns), (a, b) = regime.shape, regime.blocks
    W_star = normal(generator, out, columns)
    deltas = []
    for r in regime.ranks:
        terms = [
            torch.kron(normal(generator, a, b), normal(generator, out // a, columns // b) * regime.scale / r**0.5)
            for _ in range(r)
        ]
        deltas.append(torch.stack(terms).sum(dim=0))
    return Problem(W_star, tuple(deltas), torch.stack([W_star + M_i for M_i in deltas]).to(regime.dtype))


def _make_frozen(regime: Regime, generator: torch.Generator) -> Problem:
    W_star = normal(generator, *regime.shape)
    A, B = draw_factors(regime.shape, regime.ranks[0], regime.frozen)
    deltas = []
    for r in regime.ranks:
        b, c = normal(generator, regime.shape[0], 1), 1 + 0.3 * normal(generator, r)
        deltas.append(regime.scale * (b * B * c) @ A)
    return Problem(W_star, tuple(deltas), torch.stack([W_star + M_i for M_i in deltas]).to(regime.dtype))


def _make_sparse(regime: Regime, generator: torch.Generator) -> Problem:
    W_star = normal(generator, *regime.shape)
    deltas = []
    for _ in regime.ranks:
        chosen = torch.rand(regime.shape, generator=generator, dtype=torch.float64) < regime.changed
        deltas.append(regime.scale * chosen * normal(generator, *regime.shape))
    return Problem(W_star, tuple(deltas), torch.stack([W_star + M_i for M_i in deltas]).to(regime.dtype))


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal numbers, float64."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def orthogonal(generator: torch.Generator, size: int) -> Tensor:
    """A random orthogonal matrix, float64."""
    return torch.linalg.qr(normal(generator, size, size))[0]


def seeded(seed: int = 0) -> torch.Generator:
    """A generator of one's own: no test depends on which ran before."""
    return torch.Generator().manual_seed(seed)


def rms(values: Tensor) -> float:
    """Root mean square."""
    return float(values.double().square().mean().sqrt())
