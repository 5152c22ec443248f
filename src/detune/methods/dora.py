"""DoRA's adapters have a low rank but for a scale of each row, IA³'s are nothing but scales.

DoRA (Liu et al. 2024, arXiv 2402.09353) merges `W_i = D_i (W + M_i)`, D_i diagonal. Differences have full rank. For two
models there is a diagonal R with

    W_i - R W_1 = D_i (M_i - M_1)     of rank r_i + r_1 ,     R = D_i D_1^-1 ,

found by turns: the row space V of the left side for given R, its leading right singular vectors, and

    R = <W_i P, W_1 P> / <W_1 P, W_1 P>     row by row,     P = I - V V^T .

Brought to one scale, the models are LoRA's problem. Which scale is the base's is not in the data: any positive
diagonal E gives `D_i E^-1` and `E (W + M_i)`. DoRA starts its magnitudes at the norms of W's rows, so the mean of the
models' norms is the guess that is made, and it is as good as training moved them little.

IA³ (Liu et al. 2022, arXiv 2205.05638) scales rows, or columns in feed-forward layers: the same with M_i = 0.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from detune.fitting.differences import find_differences
from detune.fitting.gauss_newton import GaussNewton
from detune.fitting.least_squares import WStep, w_step, w_step_given_rows
from detune.fitting.subspaces import find_spaces
from detune.methods.auto import Auto
from detune.numerics.float_grid import times_power_of_two
from detune.numerics.linalg import orthonormal, thin_svd
from detune.problem.low_rank import LowRank
from detune.problem.rank_rule import difference_floor
from detune.problem.recovery import NotRecoverable, Recovery
from detune.problem.stack import Stack
from detune.problem.storage_noise import COMPUTED

# Singular values count from twice the noise's estimated norm where a merge has been rounded, scaled, rounded, scaled
# back and rounded: of three roundings the norm is 1.7 times that of one (derived).
ROUNDED_OFTEN = 2.0
# Singular vectors looked at beyond the rank: any number does, as two power steps follow.
SPARE = 4
# The rank grows when a turn leaves more than 0.7 of the next singular value: any number does that is below one, as a
# turn at the right rank converges, and at one too low it stalls.
STALLED = 0.7
# Scales have settled when a turn moves them by less than a fiftieth of what noise does, which adds less than a
# hundredth to their error even where each turn leaves 0.7 of the last move (derived).
SETTLED = 0.02
# Turns in all: any number does that leaves each rank some.
MOST_TURNS = 2000
# Scales that differ from 1 by less than eight times their own noise are none: the largest of a million rows are off by
# five (derived), and merges of scaled rows are rounded more than once.
SURE = 8.0


@dataclass(frozen=True)
class Scaled(LowRank):
    """The delta of a scaled model, `D_i (W + M_i) - W`: `diag(scale) (weight + left @ right.T) - weight`.

    Attributes:
        scale: Scale of each row, or column, over the weight's, `(out,)` or `(in,)`.
        weight: W, `(out, in)`.
        columns: Whether columns are scaled.
    """

    scale: Tensor
    weight: Tensor
    columns: bool

    def dense(self) -> Tensor:
        """The matrix itself, `(out, in)`."""
        scaled = (self.weight + super().dense()) * (self.scale if self.columns else self.scale[:, None])
        return scaled - self.weight

    def times_power_of_two(self, exponent: int) -> "Scaled":
        """The matrix times `2^exponent`: so is the weight that it is relative to."""
        M_i = super().times_power_of_two(exponent)
        return replace(self, left=M_i.left, right=M_i.right, weight=times_power_of_two(self.weight, exponent))


@dataclass(frozen=True)
class DoRA:
    """Recovery up to one scale for each row, where every model has scaled rows as well: DoRA, IA³.

    Attributes:
        polish: How the models on one scale are polished.
        unscaled: Solves where no rows were scaled.
    """

    min_models: ClassVar[int] = 3
    low_rank: ClassVar[bool] = False
    working_copies: ClassVar[int] = 10

    polish: GaussNewton = field(default_factory=GaussNewton)
    unscaled: Auto = field(default_factory=Auto)

    def solve(self, stack: Stack, rank: int | None = None) -> Recovery:
        """Bring the models to one scale, recover, guess that of the base; see `Solver.solve`.

        Raises:
            NotRecoverable: Scales of rows, or of columns, do not leave low ranks.
        """
        stack.require_finite(torch.stack([W_i.sum(dtype=torch.float64) for W_i in stack.matrices]))
        found = _ratios(stack, rank)
        columns = found is None
        turned = stack.transposed if columns else stack
        if columns:
            found = _ratios(turned, rank)
        if found is None:
            raise NotRecoverable(
                f"{stack.n} {stack.shape[0]}x{stack.shape[1]} matrices do not differ by low ranks and scales of rows "
                "or columns",
                "expected adapters of DoRA or IA³",
                "try another method, or mean",
            )
        if all(_is_one(turned, i, ratio) for i, ratio in enumerate(found)):
            return self.unscaled.solve(stack, rank)
        return self._solve(turned, found, rank, columns)

    def _solve(self, stack: Stack, ratios: list[Tensor], rank: int | None, columns: bool) -> Recovery:
        first = self._on_one_scale(_unscaled(stack, ratios, stored=True), rank)
        # Once more with scales from all columns, and without the rounding that putting on one scale took.
        models = [W_i.to(stack.device, torch.float64) for W_i in stack.matrices]
        fits = [first.weight.double() + M_i.dense().double() for M_i in first.deltas]
        ratios = [_rows(W_i, fit) / _rows(fit, fit) for W_i, fit in zip(models, fits, strict=True)]
        step = w_step(_unscaled(stack, ratios, stored=False), first.deltas)
        # The base's scale: of the mean of the norms.
        norms = torch.stack([torch.linalg.vector_norm(W_i, dim=1) for W_i in models])
        guess = norms.mean(dim=0) / torch.linalg.vector_norm(step.weight.double(), dim=1)
        weight = (step.weight.double() * guess[:, None]).to(stack.dtype)
        deltas = tuple(
            Scaled(
                (M_i.left * guess[:, None]).to(stack.dtype),
                M_i.right.to(stack.dtype),
                (ratio / guess).to(stack.dtype),
                weight,
                False,
            )
            for M_i, ratio in zip(first.deltas, ratios, strict=True)
        )
        misfit, spread = _misfit(stack, models, weight, deltas)
        if columns:
            weight = weight.mT
            deltas = tuple(Scaled(M_i.right, M_i.left, M_i.scale, weight, True) for M_i in deltas)
        side = "column" if columns else "row"
        noise = float(stack.noise.square().mean()) * (stack.n - 1) * weight.numel()
        return Recovery(
            weight,
            "dora",
            f"the models on one scale for each {side}, closed form there; the base's own {len(guess)} scales are not "
            "in the data: those of the mean norm stand in",
            deltas,
            tuple(M_i.rank for M_i in deltas),
            (misfit / spread) ** 0.5 if spread else 0.0,
            (misfit / noise) ** 0.5 if noise else 0.0,
        )

    def _on_one_scale(self, stack: Stack, rank: int | None) -> WStep:
        """Closed form and polish; ranks are not searched for near the noise, which is more than the dtype's here."""
        spaces = find_spaces(find_differences(stack, rank, signal=ROUNDED_OFTEN), rank)
        polished = self.polish.run(spaces.stack, spaces.bases)
        step = w_step(spaces.stack, polished.deltas) if polished.converged else None
        start = w_step_given_rows(spaces.stack, spaces.bases)
        best = start if step is None or start.noise_ratio < step.noise_ratio else step
        return best.transposed if spaces.transposed else best


def as_one_scale(stack: Stack, recovery: Recovery) -> tuple[Stack, Recovery] | None:
    """The problem, and its answer, as it was solved: on the answer's scale; None where nothing was scaled.

    Args:
        stack: The models.
        recovery: What a solver made of them.
    """
    scaled = [M_i for M_i in recovery.deltas if isinstance(M_i, Scaled)]
    if not scaled:
        return None
    turned = stack.transposed if scaled[0].columns else stack
    one = _unscaled(turned, [M_i.scale.double() for M_i in scaled], stored=True)
    return (
        one.transposed if scaled[0].columns else one,
        replace(recovery, deltas=tuple(LowRank(M_i.left, M_i.right) for M_i in scaled)),
    )


def _ratios(stack: Stack, rank: int | None) -> list[Tensor] | None:
    """`D_i D_1^-1` for every model, `(out,)` each, float64; None where no low rank is left."""
    reference = stack.matrices[0].to(stack.device, torch.float64)
    ratios = [torch.ones_like(reference[:, 0])]
    for i in range(1, stack.n):
        noise = difference_floor(stack.noise_norm(i, stack.shape[0]), stack.noise_norm(0, stack.shape[0]))
        noise = max(noise, COMPUTED * float(torch.linalg.matrix_norm(reference)))
        ratio = _ratio(stack, stack.matrices[i].to(reference), reference, noise, rank)
        if ratio is None:
            return None
        ratios.append(ratio)
    return ratios


def _ratio(stack: Stack, W_i: Tensor, W_1: Tensor, noise: float, rank: int | None) -> Tensor | None:
    """Fit scales and rank by turns; the rank grows by one when they stall: too high a rank swallows whole rows."""
    most = min(stack.shape) // 3 if rank is None else min(2 * rank, min(stack.shape) // 2)
    test = torch.randn(
        stack.shape[1], most + SPARE, generator=stack.generator(0), dtype=torch.float64, device=stack.device
    )
    ratio, r, before = _rows(W_i, W_1) / _rows(W_1, W_1), 0, float("inf")
    settled = max(SETTLED * noise / (float(torch.linalg.matrix_norm(W_1)) or 1.0), COMPUTED)
    V = test[:, :0]
    for _ in range(MOST_TURNS):
        E = W_i - ratio[:, None] * W_1
        # The row space so far and some random vectors: two power steps find the rest.
        Q = orthonormal(E @ torch.cat([V, test[:, : r + SPARE - V.shape[1]]], dim=1))
        V, S, _ = thin_svd((orthonormal(E @ (E.mT @ Q)).mT @ E).mT)
        left = float(S[r])
        if left > noise and left > STALLED * before:
            r += 1
            if r > most:
                return None
        before = left
        P_i, P_1 = W_i - (W_i @ V[:, :r]) @ V[:, :r].mT, W_1 - (W_1 @ V[:, :r]) @ V[:, :r].mT
        turned = _rows(P_i, P_1) / _rows(P_1, P_1)
        moved = float((turned - ratio).square().mean().sqrt())
        ratio = turned
        if left <= noise and moved <= settled:
            return ratio
    return None


def _is_one(stack: Stack, i: int, ratio: Tensor) -> bool:
    """Whether a model's scales are the first's, for all that the storage noise lets one see."""
    norms = torch.linalg.vector_norm(stack.matrices[0].double(), dim=1).to(ratio)
    noise = float(torch.hypot(stack.noise[i], stack.noise[0]))
    return bool(((ratio - 1).abs() * norms).le(SURE * (noise + COMPUTED * norms)).all())


def _unscaled(stack: Stack, ratios: list[Tensor], stored: bool) -> Stack:
    """The models on the first's scale, in float64 or, so that their noise is known, in the dtype they are stored in."""
    matrices = (
        (W_i.to(stack.device, torch.float64) / ratio[:, None]).to(W_i.dtype if stored else torch.float64)
        for W_i, ratio in zip(stack.matrices, ratios, strict=True)
    )
    return Stack(tuple(matrices), stack.dtype, stack.device)


def _misfit(stack: Stack, models: list[Tensor], weight: Tensor, deltas: tuple[Scaled, ...]) -> tuple[float, float]:
    """`sum_i |W_i - W - M_i|^2` and `sum_i |W_i - mean|^2`."""
    mean = torch.stack(models).mean(dim=0)
    rest = (W_i - weight.double() - M_i.dense().double() for W_i, M_i in zip(models, deltas, strict=True))
    return sum(float(e.square().sum()) for e in rest), sum(float((W_i - mean).square().sum()) for W_i in models)


def _rows(A: Tensor, B: Tensor) -> Tensor:
    """Inner products of rows."""
    products: Tensor = torch.linalg.vecdot(A, B)
    return products
