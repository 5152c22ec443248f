"""The joint core: `W_i = mean + Q C_i P^T`, so that iterations run on small matrices.

All `W_i - mean_j W_j` live in the sum of the adapters' spaces, at most `s = sum r_i` wide. An iteration that is
built from SVDs and averages of the `W_i - W` commutes with the orthonormal Q and P, so on the cores `C_i` it gives
the same iterates; only what storage rounding adds outside the spans is left to the last full-size step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from detune.fitting.differences import OVERSAMPLING
from detune.numerics.linalg import orthonormal
from detune.problem.low_rank import LowRank
from detune.problem.stack import Stack


@dataclass(frozen=True)
class ProjectedStack:
    """A stack in the coordinates of its joint column and row space.

    Attributes:
        Q: Orthonormal, `(out, s_Q)`, compute dtype.
        P: Orthonormal, `(in, s_P)`, compute dtype.
        cores: `C_i = Q^T (W_i - mean) P`, `(n, s_Q, s_P)`, compute dtype.
    """

    Q: Tensor
    P: Tensor
    cores: Tensor

    @classmethod
    def of(cls, stack: Stack, rank: int, seed: int = 0) -> "ProjectedStack | None":
        """Find the joint spaces with a Gaussian sketch and one power pass.

        Args:
            stack: The models.
            rank: The most that any `M_i` can have.
            seed: Seed of the test matrix.

        Returns:
            The core, or None where it would be no smaller than the matrices.
        """
        out, columns = stack.shape
        width = stack.n * rank + OVERSAMPLING
        if width >= min(out, columns):
            return None
        generator = stack.generator(seed)
        sketch = stack.zeros(width, columns)
        for block in stack.blocks():
            # Each model has test vectors of its own; their sum covers the sum of the spaces.
            for centred_i in block.centred:
                sketch.addmm_(stack.gaussian(generator, width, centred_i.shape[0]), centred_i)
        stack.require_finite(sketch.sum())
        P = orthonormal(sketch.mT)
        images = stack.zeros(stack.n, out, width)
        for block in stack.blocks():
            images[:, block.rows] = block.centred @ P
        mixing = stack.gaussian(generator, stack.n, width, width)
        Q = orthonormal((images @ mixing).sum(dim=0))
        return cls(Q, P, Q.mT @ images)

    def lift(self, deltas: Sequence[LowRank]) -> tuple[LowRank, ...]:
        """Deltas of the cores as deltas of the matrices."""
        return tuple(LowRank(self.Q @ M_i.left, self.P @ M_i.right) for M_i in deltas)
