"""VeRA's adapters share two frozen random matrices. Whoever knows them loses nothing to them.

VeRA (Kopiczko, Blankevoort & Asano 2024, arXiv 2310.11454) merges `M_i = diag(b_i) B diag(c_i) A`, A of shape `(r, in)`
and B of shape `(out, r)` drawn once and frozen, b_i and c_i trained. All M_i have A's row space, so that by low ranks
alone W is lost in it (see `identifiability`). But A and B come from a seed, `projection_prng_key`, 0 unless told
otherwise. With `A^T = Q R`, on the row space

    W_i Q = W Q + (B * b_i c_i^T) R^T ,

n (out + r) unknown numbers beside W Q: as many models as for LoRA decide, three. They are found by Gauss-Newton steps
with Levenberg's damping; W Q and b_i are eliminated, row by row, so that n r unknowns remain.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from detune.fitting.differences import find_differences
from detune.fitting.least_squares import w_step
from detune.numerics.float_grid import times_power_of_two
from detune.problem.low_rank import LowRank
from detune.problem.recovery import NotRecoverable, Recovery
from detune.problem.stack import Stack
from detune.problem.storage_noise import COMPUTED, FLOOR_RATIO

# Most steps: any number does, as each falls by a factor near the end.
STEPS = 60
# The last step is one that lowers the misfit by less than a ten-thousandth: any number does that is small.
CONVERGED = 1 - 1e-4
# Levenberg's damping: any numbers do, it is adapted.
FIRST_DAMPING, LEAST_DAMPING, MOST_DAMPING = 1e-2, 1e-12, 1e8
# At the start all c_i are one, and the common part of the b_i is not determined: any small
# number does.
RIDGE = 1e-3
# Rows whose equations are held at once: any number does.
CHUNK = 512
# Draws of noise that the error is predicted from: the mean of four energies of thousands of entries is known to some
# per cent (derived).
PROBES = 4


@dataclass(frozen=True)
class Frozen(LowRank):
    """`diag(b) B diag(c) A`, or its transpose, as `left @ right.T`.

    Attributes:
        b: `(out,)`.
        c: `(r,)`.
        A: `(r, in)`.
        B: `(out, r)`.
    """

    b: Tensor
    c: Tensor
    A: Tensor
    B: Tensor

    def times_power_of_two(self, exponent: int) -> "Frozen":
        """The matrix times `2^exponent`, which b takes up."""
        left, b = (times_power_of_two(factor, exponent) for factor in (self.left, self.b))
        return replace(self, left=left, b=b)


@dataclass(frozen=True)
class VeRA:
    """Recovery where each adapter scales the rows and the rank's directions of frozen factors from a seed: VeRA.

    Attributes:
        seed: PEFT's `projection_prng_key`.
        largest: The most outputs and inputs of any layer that has adapters, `(out, in)`: PEFT cuts its factors from
            matrices of that size. None takes the matrix's own.
    """

    min_models: ClassVar[int] = 3
    low_rank: ClassVar[bool] = False
    working_copies: ClassVar[int] = 10

    seed: int = 0
    largest: tuple[int, int] | None = None

    def solve(self, stack: Stack, rank: int | None = None) -> Recovery:
        """Draw the factors, see that they fit, and solve; see `Solver.solve`. `rank` is VeRA's r itself.

        Raises:
            NotRecoverable: Other factors, or fewer than three models.
        """
        stack.require_finite(torch.stack([W_i.sum(dtype=torch.float64) for W_i in stack.matrices]))
        if stack.n < self.min_models:
            raise NotRecoverable(f"{stack.n} models: b_i and c_i of two can be traded for each other", "add a model")
        r = rank or self._rank(stack)
        # Some layers, GPT-2's for instance, hold their weights the other way round.
        fit, other = self._fit(stack, r), False
        if fit is None:
            fit, other = self._fit(stack.transposed, r), True
        if fit is None:
            raise NotRecoverable(
                f"{stack.n} {stack.shape[0]}x{stack.shape[1]} matrices differ outside of the row space of VeRA's A",
                f"of seed {self.seed}, rank {r} and layers of at most {self.largest or stack.shape}",
                "give the seed, the rank or the largest layer's shape, or use another method",
            )
        deltas = fit.deltas(other)
        step = w_step(stack, deltas)
        # Far fewer numbers were fitted than rank r has.
        models = torch.stack([W_i.to(stack.device, torch.float64) for W_i in stack.matrices])
        spread = float(_centred(models).square().sum())
        free = max(1, (stack.n - 1) * step.weight.numel() - fit.b.numel() - fit.c.numel())
        noise = float(stack.noise.square().mean()) + COMPUTED**2 * spread / models.numel()
        return Recovery(
            step.weight,
            "vera",
            f"VeRA's factors of rank {r} from seed {self.seed}; {fit.steps} damped Gauss-Newton steps",
            deltas,
            (r,) * stack.n,
            step.relative_residual,
            math.sqrt(step.relative_residual**2 * spread / (noise * free)),
            fit.steps,
        )

    def _fit(self, stack: Stack, r: int) -> "_Fit | None":
        """None where the models differ outside of A's row space."""
        A, B = (factor.to(stack.device) for factor in draw_factors(stack.shape, r, self.seed, self.largest))
        Q, R = torch.linalg.qr(A.mT)
        models = _centred(torch.stack([W_i.to(stack.device, torch.float64) for W_i in stack.matrices]))
        inside = models @ Q
        outside = float((models - inside @ Q.mT).square().mean())
        share = (stack.n - 1) / stack.n * (1 - Q.shape[1] / stack.shape[1])
        noise = float(stack.noise.square().mean()) * share + COMPUTED**2 * float(models.square().mean())
        if outside > FLOOR_RATIO**2 * noise:
            return None
        return _Fit(A, B, *_Problem(B, R).solve(inside))

    def _rank(self, stack: Stack) -> int:
        """The rank of a difference is that of A."""
        differences = find_differences(stack)
        if differences.full_rank_pairs:
            raise NotRecoverable(
                f"{stack.n} {stack.shape[0]}x{stack.shape[1]} matrices differ at full rank",
                "VeRA's rank cannot be told from that",
                "give it: --rank",
            )
        return max(difference.rank for difference in differences.by_pair.values())


def draw_factors(
    shape: tuple[int, int], rank: int, seed: int, largest: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """A and B as PEFT draws them: uniform, of variance `2 / fan-in`, A first.

    Args:
        shape: Shape of the layer, `(out, in)`.
        rank: VeRA's r.
        seed: `projection_prng_key`.
        largest: Largest shape of all layers; the layer's own by default.

    Returns:
        `(r, in)` and `(out, r)`, float64.
    """
    generator = torch.Generator().manual_seed(seed)
    most_out, most_in = largest or shape

    def uniform(rows: int, columns: int) -> Tensor:
        bound = math.sqrt(3) * math.sqrt(2) / math.sqrt(columns)
        return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)

    A, B = uniform(rank, most_in), uniform(most_out, rank)
    return A[:, : shape[1]].double(), B[: shape[0]].double()


def expected_mse(stack: Stack, recovery: Recovery, seed: int = 0) -> float:
    """Mean squared error per entry that the models' noise leaves at the answer, by draws of noise.

    Args:
        stack: The models.
        recovery: An answer with `Frozen` deltas.
        seed: Seed of the draws.
    """
    found = [M_i for M_i in recovery.deltas if isinstance(M_i, Frozen)]
    Q, R = torch.linalg.qr(found[0].A.mT)
    problem = _Problem(found[0].B, R)
    b, c = (torch.stack(part) for part in ([M_i.b for M_i in found], [M_i.c for M_i in found]))
    generator = stack.generator(seed)
    sigma = stack.noise.to(Q.device)
    energy = 0.0
    for _ in range(PROBES):
        noise = torch.randn(
            stack.n, *b.shape[1:], Q.shape[1], generator=generator, dtype=torch.float64, device=Q.device
        )
        noise *= sigma[:, None, None]
        db, dc = problem.step(b, c, noise - noise.mean(dim=0), LEAST_DAMPING)
        moved = problem.product(b + db, c + dc) - problem.product(b, c)
        energy += float((noise - moved).mean(dim=0).square().sum()) / PROBES
    variance = float(sigma.square().mean()) / stack.n
    outside = recovery.weight.numel() - b.shape[1] * Q.shape[1]
    return float(energy + variance * outside) / recovery.weight.numel()


@dataclass(frozen=True)
class _Fit:
    """Factors, and what the models scale them by.

    Attributes:
        A: `(r, in)`.
        B: `(out, r)`.
        b: `(n, out)`.
        c: `(n, r)`.
        steps: Taken to find b and c.
    """

    A: Tensor
    B: Tensor
    b: Tensor
    c: Tensor
    steps: int

    def deltas(self, other: bool) -> tuple[Frozen, ...]:
        """`diag(b_i) B diag(c_i) A`, or its transpose."""
        deltas = []
        for b_i, c_i in zip(self.b, self.c, strict=True):
            scaled, A_T = b_i[:, None] * self.B * c_i, self.A.mT
            left, right = (A_T, scaled) if other else (scaled, A_T)
            deltas.append(Frozen(left, right, b_i, c_i, self.A, self.B))
        return tuple(deltas)


@dataclass(frozen=True)
class _Problem:
    """`Z_i = (B * b_i c_i^T) R^T`, all less their mean.

    Attributes:
        B: `(out, r)`.
        R: `(q, r)`, q the width of A's row space.
    """

    B: Tensor
    R: Tensor

    def solve(self, Z: Tensor) -> tuple[Tensor, Tensor, int]:
        """`b` `(n, out)`, `c` `(n, r)` and the steps taken, from `Z` `(n, out, q)`."""
        c = torch.ones(len(Z), self.B.shape[1], dtype=Z.dtype, device=Z.device)
        b = self._b_given(c, Z)
        misfit, damping = self._misfit(b, c, Z), FIRST_DAMPING
        for step in range(STEPS):
            rest = Z - _centred(self.product(b, c))
            while True:
                db, dc = self.step(b, c, rest, damping)
                now = self._misfit(b + db, c + dc, Z)
                if now < misfit or damping > MOST_DAMPING:
                    break
                damping *= 4
            if not now < misfit:
                return b, c, step
            b, c, left, misfit = b + db, c + dc, now / misfit, now
            damping = max(damping / 5, LEAST_DAMPING)
            if left > CONVERGED:
                return b, c, step + 1
        return b, c, STEPS

    def product(self, b: Tensor, c: Tensor) -> Tensor:
        """`(B * b_i c_i^T) R^T`, `(n, out, q)`."""
        return b[:, :, None] * self._directions(c)

    def step(self, b: Tensor, c: Tensor, rest: Tensor, damping: float) -> tuple[Tensor, Tensor]:
        """Take a damped Gauss-Newton step; `rest` is the residual, less its mean over the models.

        Each row's own unknowns, the `b_i` of that row, are eliminated: what is left are equations for all c.
        """
        H, g = self._equations_of_c(b, rest, damping)
        solved = []
        for rows in _chunks(len(self.B)):
            part = self._eliminated(rows, b, c, rest, damping)
            H = H - torch.einsum("pix,piy->xy", part.coupling, part.response)
            g = g - torch.einsum("pix,pi->x", part.response, part.g)
            solved.append((part.free, part.response))
        dc = torch.linalg.solve(H, g)
        db = torch.cat([free - torch.einsum("pix,x->pi", response, dc) for free, response in solved]).mT
        return db, dc.view_as(c)

    def _equations_of_c(self, b: Tensor, rest: Tensor, damping: float) -> tuple[Tensor, Tensor]:
        """Normal equations `H dc = g` for all c, with b as it is: `(n r, n r)` and `(n r,)`."""
        n, r = len(b), self.B.shape[1]
        weighted = torch.einsum("ip,jp,pa,pe->iaje", b, b, self.B, self.B)
        H = (weighted * (self.R.mT @ self.R)[None, :, None] * _centre(b)[:, None, :, None]).reshape(n * r, n * r)
        g = torch.einsum("ip,pa,sa,ips->ia", b, self.B, self.R, rest).reshape(-1)
        return H + damping * torch.diag(H.diagonal()), g

    def _eliminated(self, rows: slice, b: Tensor, c: Tensor, rest: Tensor, damping: float) -> "_Eliminated":
        """Solve the equations of some rows' b for given c."""
        n, centre = len(b), _centre(b)
        G = self._directions(c, rows)
        H = torch.einsum("ips,jps->pij", G, G) * centre
        H = H + damping * torch.diag_embed(H.diagonal(dim1=1, dim2=2))
        g = torch.einsum("ips,ips->pi", G, rest[:, rows])
        coupling = torch.einsum("ij,jp,ipa->pija", centre, b[:, rows], (G @ self.R) * self.B[rows])
        coupling = coupling.reshape(len(g), n, c.numel())
        return _Eliminated(g, coupling, torch.linalg.solve(H, coupling), torch.linalg.solve(H, g))

    def _directions(self, c: Tensor, rows: slice = slice(None)) -> Tensor:
        """`(B * c_i) R^T`, `(n, rows, q)`."""
        return (self.B[rows] * c[:, None]) @ self.R.mT

    def _b_given(self, c: Tensor, Z: Tensor) -> Tensor:
        n, G = len(c), self._directions(c)
        H = torch.einsum("ips,jps->pij", G, G) * _centre(Z)
        ridge = RIDGE * H.diagonal(dim1=1, dim2=2).mean() * torch.eye(n, dtype=Z.dtype, device=Z.device)
        b: Tensor = torch.linalg.solve(H + ridge, torch.einsum("ips,ips->pi", G, Z)).mT
        return b

    def _misfit(self, b: Tensor, c: Tensor, Z: Tensor) -> float:
        return float((Z - _centred(self.product(b, c))).square().sum())


class _Eliminated(NamedTuple):
    """The equations of some rows' b, solved for any c.

    Attributes:
        g: Their right-hand side, `(rows, n)`.
        coupling: Their coefficients of c, `(rows, n, n r)`.
        response: How b moves with c, of that shape.
        free: b where c stays, `(rows, n)`.
    """

    g: Tensor
    coupling: Tensor
    response: Tensor
    free: Tensor


def _centre(like: Tensor) -> Tensor:
    """The projector `I - 1/n` off what n models have in common."""
    return torch.eye(len(like), dtype=like.dtype, device=like.device) - 1 / len(like)


def _centred(values: Tensor) -> Tensor:
    return values - values.mean(dim=0)


def _chunks(rows: int) -> Iterator[slice]:
    for start in range(0, rows, CHUNK):
        yield slice(start, start + CHUNK)
