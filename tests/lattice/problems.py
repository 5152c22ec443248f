"""Random bases on a grid, or off every grid, and merges whose deltas are given in the grid's steps."""

from collections.abc import Sequence

import torch
from torch import Tensor

from detune.lattice.entries import StoredEntries
from detune.lattice.estimate import Estimate
from detune.numerics.float_grid import nearest, spacing
from detune.problem import Recovery, Stack
from tests.cases import normal, rms, seeded

SCALE = 0.02


class LatticeProblem:
    """A base, its deltas, whose row spaces overlap by about a cosine `shared`, and its merges.

    Attributes:
        W: The base, float64.
        step: The distance between points of the grid at W's root mean square.
        factors: L and R of every `M_i = L R^T`.
        deltas: The `M_i`, each with entries of size `delta` steps.
        stack: The merges.
    """

    def __init__(
        self,
        shape: tuple[int, int] = (128, 128),
        rank: int = 4,
        n: int = 3,
        delta: float = 1.0,
        merge: torch.dtype | tuple[torch.dtype, ...] = torch.float32,
        grid: torch.dtype = torch.bfloat16,
        seed: int = 0,
        off: bool = False,
        shared: float = 0.0,
    ) -> None:
        generator = seeded(seed)
        self.grid, self.rank = grid, rank
        W = SCALE * normal(generator, *shape)
        self.W = W if off else nearest(W, grid)
        self.step = float(spacing(torch.tensor(SCALE), grid))
        size = delta * self.step / rank**0.5
        drawn = [(size * normal(generator, shape[0], rank), normal(generator, shape[1], rank)) for _ in range(n)]
        self.factors = [(L, shared**0.5 * drawn[0][1] + (1 - shared) ** 0.5 * R) for L, R in drawn]
        self.deltas = [L @ R.mT for L, R in self.factors]
        merges = merge if isinstance(merge, tuple) else (merge,) * n
        self.stack = Stack.of([(self.W + M_i).to(dtype) for M_i, dtype in zip(self.deltas, merges, strict=True)])

    @property
    def entries(self) -> StoredEntries:
        return StoredEntries.of(self.stack)

    def estimates(self, std: float, seed: int = 0) -> list[Estimate]:
        """The true factors, those on the left changed so that entries are off by `std` steps, and known to be so."""
        generator, size = seeded(seed), std * self.step / self.rank**0.5
        none = torch.zeros(self.W.shape[1])
        return [
            Estimate((L + size * normal(generator, *L.shape)).float(), R.float(), torch.full((len(L),), size**2), none)
            for L, R in self.factors
        ]

    def off(self, estimates: Sequence[Estimate]) -> list[float]:
        """Root mean square errors of the estimates, in steps."""
        return [rms(e.low_rank.dense() - M_i) / self.step for e, M_i in zip(estimates, self.deltas, strict=True)]

    def right(self, weight: Tensor) -> float:
        """The share of entries that are the base's, bit for bit."""
        return float((weight.double() == self.W).double().mean())

    def certain_and_wrong(self, recovery: Recovery) -> int:
        assert recovery.bits is not None
        return int((recovery.bits.certain & (recovery.weight.double() != self.W)).sum())
