"""LoKr's adapters are Kronecker products: of full rank as they are, of rank 1 once they are arranged otherwise.

For `M_i = w1 ⊗ w2` with w1 of shape `(a, b)` let row `p b + q` of R(M_i) be block (p, q) of M_i, written as a row. Then

    R(w1 ⊗ w2) = vec(w1) vec(w2)^T

(Van Loan & Pitsianis 1993, doi 10.1007/978-94-015-8196-7_17). R only moves entries, so `R(W_i) = R(W) + R(M_i)` is the
problem of LoRA, with rank 1 and the same storage noise, and is solved as that. With `(a, b) = (out, 1)` R changes
nothing, and a plain low rank is one.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from detune.methods.auto import Auto
from detune.numerics.random import seeded
from detune.problem.low_rank import LowRank
from detune.problem.recovery import NotRecoverable, Recovery
from detune.problem.stack import Stack
from detune.problem.storage_noise import FLOOR_RATIO, noise_edge

# Rows and columns of a rearranged difference that are looked at: any number does that is well above the ranks.
SAMPLE = 32
# A rearrangement with fewer rows or columns is of low rank whatever is in it: a difference of two
# products has rank 2, which is to be less than half of them (derived).
FEWEST = 6
# A singular value counts from four times what storage noise adds to a sample: noise of entries whose steps are up to
# four times the typical one does not reach there (derived).
SIGNAL = 4.0
# A rearrangement is worth trying if a difference has at most half of the rank that the sample could show: any share
# does, as the lowest ranks are tried first.
LOW = 0.5
# Shapes that are tried in full: any number does, each costs a solution.
MOST_TRIED = 4

Blocks = tuple[int, int]


@dataclass(frozen=True)
class Rearranged(LowRank):
    """A matrix that is `left @ right.T` once it is rearranged.

    Attributes:
        blocks: How many blocks there are down and across, `(a, b)`.
        shape: Shape of the matrix, `(out, in)`.
    """

    blocks: Blocks
    shape: tuple[int, int]

    def dense(self) -> Tensor:
        """The matrix itself, `(out, in)`."""
        return arrange_back(super().dense(), self.blocks, self.shape)


@dataclass(frozen=True)
class LoKr:
    """Recovery where each `M_i` is a Kronecker product, or a sum of few: LoKr.

    Attributes:
        blocks: Shape of the first factor, `(a, b)`; None finds it.
        method: Solves the rearranged problem.
        seed: Seed of the choice of rows and columns by which a shape is found.
    """

    min_models: ClassVar[int] = 3
    low_rank: ClassVar[bool] = False
    working_copies: ClassVar[int] = 10

    blocks: Blocks | None = None
    method: Auto = field(default_factory=Auto)
    seed: int = 0

    def solve(self, stack: Stack, rank: int | None = None) -> Recovery:
        """Rearrange, recover, arrange back; see `Solver.solve`. `rank` is the most terms that a sum can have.

        Raises:
            NotRecoverable: Fewer than three models, or no shape of the factors leaves low ranks.
        """
        found: list[Recovery] = []
        refused: NotRecoverable | None = None
        for blocks in [self.blocks] if self.blocks else self._promising(stack):
            try:
                found.append(self._solve(stack, blocks, rank))
            except NotRecoverable as why:
                refused = refused or why
                continue
            if (found[-1].noise_ratio or 0.0) <= FLOOR_RATIO:
                break
        if not found:
            raise refused or NotRecoverable(
                f"the differences of {stack.n} {stack.shape[0]}x{stack.shape[1]} matrices are no Kronecker products",
                "of no shape of the factors",
                "use --method auto or mean",
            )
        return min(found, key=lambda recovery: recovery.noise_ratio or 0.0)

    def _solve(self, stack: Stack, blocks: Blocks, rank: int | None) -> Recovery:
        recovery = self.method.solve(rearrange_stack(stack, blocks), rank)
        moved = _moved(recovery, blocks, stack.shape)
        a, b = blocks
        if recovery.left_alone or blocks == (stack.shape[0], 1):
            return moved
        return replace(
            moved,
            method=f"lokr+{recovery.method}",
            reason=f"factors of {a}x{b} and {stack.shape[0] // a}x{stack.shape[1] // b}: rearranged, {recovery.reason}",
            deltas=tuple(Rearranged(M_i.left, M_i.right, blocks, stack.shape) for M_i in recovery.deltas),
        )

    def _promising(self, stack: Stack) -> list[Blocks]:
        """Shapes of the first factor that leave a difference of low rank, the lowest first; at last none."""
        out, columns = stack.shape
        plain = (out, 1)
        if stack.n < 2:
            return [plain]
        stack.require_finite(torch.stack([W_i.sum(dtype=torch.float64) for W_i in stack.matrices]))
        first, second = (W_i.to(stack.device, torch.float64) for W_i in stack.matrices[:2])
        variance = SIGNAL**2 * float(stack.noise[:2].square().sum())
        ranks = {
            blocks: share
            for blocks in _shapes(out, columns)
            if (share := self._rank(second - first, blocks, variance)) is not None
        }
        return [*sorted(ranks, key=lambda blocks: ranks[blocks])[:MOST_TRIED], plain]

    def _rank(self, difference: Tensor, blocks: Blocks, variance: float) -> int | None:
        """The rank of some rows and columns of a rearranged difference; None where it is not low."""
        arranged = _blockwise(difference, blocks)
        generator = seeded(self.seed, difference.device)
        rows, columns = (
            torch.randperm(a * b, generator=generator, device=difference.device)[:SAMPLE]
            for a, b in (arranged.shape[:2], arranged.shape[2:])
        )
        b, width = arranged.shape[1], arranged.shape[3]
        sample = arranged[(rows // b)[:, None], (rows % b)[:, None], (columns // width)[None], (columns % width)[None]]
        p, q = sample.shape
        rank = int(torch.linalg.svdvals(sample).gt(noise_edge((p, q), variance)).sum())
        return rank if rank <= LOW * min(p, q) else None


def _shapes(out: int, columns: int) -> Iterator[Blocks]:
    """Shapes of the first factor, but for those that leave the matrix, or its transpose, as it is."""
    for a in _divisors(out):
        for b in _divisors(columns):
            plain = (a, b) in ((out, 1), (1, columns))
            if not plain and FEWEST <= a * b <= out * columns // FEWEST:
                yield a, b


def _divisors(size: int) -> list[int]:
    return [divisor for divisor in range(1, size + 1) if size % divisor == 0]


def _blockwise(matrix: Tensor, blocks: Blocks) -> Tensor:
    """A view as `(a, b, out / a, in / b)`."""
    a, b = blocks
    out, columns = matrix.shape
    return matrix.reshape(a, out // a, b, columns // b).permute(0, 2, 1, 3)


def rearrange(matrix: Tensor, blocks: Blocks) -> Tensor:
    """R: one row for each block.

    Args:
        matrix: `(out, in)`.
        blocks: How many down and across, `(a, b)`.

    Returns:
        `(a b, out / a · in / b)`.
    """
    a, b = blocks
    return _blockwise(matrix, blocks).reshape(a * b, -1)


def arrange_back(matrix: Tensor, blocks: Blocks, shape: tuple[int, int]) -> Tensor:
    """The inverse of `rearrange`."""
    (a, b), (out, columns) = blocks, shape
    return matrix.reshape(a, b, out // a, columns // b).permute(0, 2, 1, 3).reshape(out, columns)


def rearrange_stack(stack: Stack, blocks: Blocks) -> Stack:
    """The models with their entries rearranged."""
    return Stack(tuple(rearrange(W_i, blocks) for W_i in stack.matrices), stack.dtype, stack.device)


def as_solved(stack: Stack, recovery: Recovery) -> tuple[Stack, Recovery] | None:
    """The problem, and its answer, as it was solved: rearranged; None where nothing was.

    Args:
        stack: The models.
        recovery: What a solver made of them.
    """
    if not recovery.deltas or not isinstance(recovery.deltas[0], Rearranged):
        return None
    blocks = recovery.deltas[0].blocks
    deltas = tuple(LowRank(M_i.left, M_i.right) for M_i in recovery.deltas)
    bits = recovery.bits and replace(recovery.bits, certain=rearrange(recovery.bits.certain, blocks))
    weight = rearrange(recovery.weight, blocks)
    return rearrange_stack(stack, blocks), replace(recovery, weight=weight, deltas=deltas, bits=bits)


def _moved(recovery: Recovery, blocks: Blocks, shape: tuple[int, int]) -> Recovery:
    """The weight, and what is known of its bits, arranged back."""
    bits = recovery.bits and replace(recovery.bits, certain=arrange_back(recovery.bits.certain, blocks, shape))
    return replace(recovery, weight=arrange_back(recovery.weight, blocks, shape), bits=bits)
