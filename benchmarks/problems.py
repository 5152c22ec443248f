"""Random problems with a known answer, and how close an answer can come to it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from detune.identifiability.error_traces import cramer_rao_mse
from detune.metrics import w_error
from detune.problem import Stack
from detune.problem.storage_noise import storage_variance


@dataclass(frozen=True)
class Problem:
    """A base matrix and its merged fine-tunes.

    Attributes:
        W: The base as stored, `(out, in)`.
        models: `round(W + M_i)`, `(n, out, in)`, same dtype.
        U: Orthonormal column spaces of the `M_i`, `(out, r)`, float64.
        V: Orthonormal row spaces, `(in, r)`, float64.
    """

    W: Tensor
    models: Tensor
    U: tuple[Tensor, ...]
    V: tuple[Tensor, ...]

    @property
    def bound(self) -> float:
        """The Cramér-Rao bound as a W-Error."""
        variance = float(Stack.of(self.models).noise.square().mean())
        return math.log10(cramer_rao_mse(self.U, self.V, variance))

    @property
    def storage_floor(self) -> float:
        """The W-Error that rounding the exact answer to a finer grid of the same dtype would leave."""
        return math.log10(float(storage_variance(self.W).mean()))


def random_problem(
    out: int,
    columns: int,
    rank: int,
    n: int,
    *,
    decay: float = 0.0,
    relative_size: float = 1.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Problem:
    """Gaussian W with entries of variance `1 / in`; random spaces; singular values from 1 down to `e^-decay`.

    Args:
        out: Rows.
        columns: Columns.
        rank: Of every `M_i`.
        n: Number of models.
        decay: How far the singular values fall, exponentially.
        relative_size: rms of `M_i` over rms of W.
        dtype: Of W and of the merges.
        seed: Of everything.
    """
    generator = torch.Generator().manual_seed(seed)
    W = (torch.randn(out, columns, generator=generator, dtype=torch.float64) / math.sqrt(columns)).to(dtype)
    sigma = torch.exp(-decay * torch.linspace(0, 1, rank, dtype=torch.float64))
    # |M| = relative_size |W| in the Frobenius norm.
    sigma *= relative_size * W.double().norm() / sigma.norm()
    models, U, V = [], [], []
    for _ in range(n):
        U.append(torch.linalg.qr(torch.randn(out, rank, generator=generator, dtype=torch.float64))[0])
        V.append(torch.linalg.qr(torch.randn(columns, rank, generator=generator, dtype=torch.float64))[0])
        models.append((W.double() + (U[-1] * sigma) @ V[-1].mT).to(dtype))
    return Problem(W, torch.stack(models), tuple(U), tuple(V))


def verdict(name: str, measured: float, at_most: float) -> str:
    """A line that holds a figure against its target."""
    return f"{name}: {measured:.2f}, target at most {at_most}: {'met' if measured <= at_most else 'MISSED'}"


def error(weight: Tensor, problem: Problem) -> float:
    """W-Error of an answer."""
    return w_error(weight, problem.W)
