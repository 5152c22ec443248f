"""The changes of W that the data cannot see: the null space of `A: Delta -> sum_i P_i Delta R_i`.

`P_i Delta R_i = 0` for every i. Where the row spaces are linearly independent, `Delta = sum_k X_k V_k^T + X_0 V_0^T`
with V_0 outside all of them; then `P_i X_k = 0` for all `i != k`, and `P_i X_0 = 0` for all i, so that the dimension is

    sum_k r_k dim(intersection of col(M_i), i != k) + (in - sum_k r_k) dim(intersection of all col(M_i)),

and the same with rows and columns exchanged. It is `2 r_1 r_2` for two adapters, and 0 for three or more in general
position. Where neither side is independent, zeros of the core's spectrum are counted, or estimated by probes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from detune.fitting.normal_operator import NormalOperator
from detune.numerics.random import seeded
from detune.numerics.trace import probe
from detune.problem.low_rank import SVDFactors
from detune.problem.stack import Stack

# Eigenvalues of sums of projectors below this are zeros of the arithmetic: float64's precision times 10^4, a large
# joint width, and a factor of five to spare (derived).
ZERO = 1e-11
# A core of at most 2500 unknowns has its spectrum computed, in 50 MB and 1.7 s on one thread; larger ones are probed.
# Any number does that is as quick.
COUNTED = 2500
PROBES = 4
# Conjugate gradients for the probes leave this share of each entry: with 10^4 unknowns a hundredth in the sum, and
# whole numbers are told apart (derived).
PRECISION = 1e-6
# Directions in all spaces are seen apart (sin^2) by at most 0.95 times the expected square of their errors, in the
# median by 0.73 (measured: 300 random sets of 3 to 6 spaces, seed 0). Up to twice the expectation is no distance.
BLURRED = 2.0


def undetermined(operator: NormalOperator, blur_U: Sequence[Tensor], blur_V: Sequence[Tensor], seed: int = 0) -> int:
    """Dimension of the null space, counting directions that all models share within the noise.

    Args:
        operator: The operator, float64.
        blur_U: For each column of each `U_i` the expected square of its error, `(r_i,)`; zeros count exactly.
        blur_V: Likewise for `V_i`.
        seed: Seed of the probes, where it comes to them.
    """
    if _clearly_determined(operator, blur_U, blur_V):
        return 0
    d, k = operator.Q.shape[0], operator.P.shape[0]
    C_U, C_V = _common(operator.a, blur_U), _common(operator.b, blur_V)
    p_U, p_V = C_U.shape[1], C_V.shape[1]
    hidden = p_U * k + p_V * d - p_U * p_V
    a, b = _without(operator.a, C_U), _without(operator.b, C_V)
    for inner, outer in ((b, a), (a, b)):
        ranks = [c_i.shape[1] for c_i in inner]
        if _independent(inner):
            others = [[c_i for i, c_i in enumerate(outer) if i != j] for j in range(len(outer))]
            return hidden + sum(r * _common(rest).shape[1] for r, rest in zip(ranks, others, strict=True) if rest)
    return hidden + _of_core(NormalOperator.of(a, b) if hidden else operator, seed)


def basis_error_variances(stack: Stack, spaces: Sequence[SVDFactors]) -> tuple[list[Tensor], list[Tensor]]:
    """The expected squared error of every basis vector, for columns and for rows: `sigma_i^2 size / s^2`.

    To first order noise N turns a singular vector v by `N^T u / s` outside its space.
    """
    variances = stack.noise.square().to(stack.device)
    inverse = [variance / space.S.square() for variance, space in zip(variances, spaces, strict=True)]
    out, columns = stack.shape
    return [out * each for each in inverse], [columns * each for each in inverse]


def _clearly_determined(operator: NormalOperator, blur_U: Sequence[Tensor], blur_V: Sequence[Tensor]) -> bool:
    """Whether the spaces are independent on both sides, so that no two of them meet, and nothing is near to all."""
    sides = ((operator.a, operator.spectrum_U, blur_U), (operator.b, operator.spectrum_V, blur_V))
    n = len(operator.a)
    for coordinates, spectrum, blur in sides:
        if n < 3 or not len(spectrum) or sum(c_i.shape[1] for c_i in coordinates) > len(spectrum):
            return False
        closest = float(spectrum[-1])
        noise = max(float(each.max()) for each in blur if len(each)) * closest
        if not (float(spectrum[0]) > ZERO and n - closest > max(BLURRED * noise, ZERO)):
            return False
    return True


def _common(coordinates: Sequence[Tensor], blur: Sequence[Tensor] | None = None) -> Tensor:
    """Orthonormal basis of the directions that lie in all spaces."""
    joint = torch.cat(list(coordinates), dim=1)
    values, vectors = torch.linalg.eigh(joint @ joint.mT)
    apart = len(coordinates) - values
    noise = torch.zeros_like(apart)
    if blur is not None:
        noise = (vectors.mT @ joint).square() @ torch.cat(list(blur)).to(joint)
    common: Tensor = vectors[:, apart.le((BLURRED * noise).clamp(min=ZERO))]
    return common


def _without(coordinates: Sequence[Tensor], common: Tensor) -> tuple[Tensor, ...]:
    """Orthonormal bases of what the spaces hold beside the directions that all share, which A leaves to themselves."""
    if not common.shape[1]:
        return tuple(coordinates)
    rest = []
    for c_i in coordinates:
        X = torch.linalg.svd(c_i - common @ (common.mT @ c_i), full_matrices=False)[0]
        rest.append(X[:, : max(0, c_i.shape[1] - common.shape[1])])
    return tuple(rest)


def _independent(coordinates: Sequence[Tensor]) -> bool:
    joint = torch.cat(list(coordinates), dim=1)
    if joint.shape[1] > joint.shape[0]:
        return False
    return not joint.shape[1] or float(torch.linalg.svdvals(joint)[-1]) ** 2 > ZERO


def _of_core(operator: NormalOperator, seed: int) -> int:
    """Both sides dependent: outside the core A has no null space.

    Preconditioned conjugate gradients give `B A z` with `A B A = A`: then `I - B A` projects onto the null space, and
    its trace, the dimension, is the mean of `z^T (z - B A z)` over random sign matrices z.
    """
    size = operator.Q.shape[1] * operator.P.shape[1]
    if size <= COUNTED:
        return int(torch.linalg.eigvalsh(dense_core(operator)).le(ZERO * len(operator.a)).sum())

    def measure(z: Tensor) -> Tensor:
        return (z * (z - operator.solve(operator.apply(z), PRECISION * size**0.5))).sum()

    def is_none(figures: Tensor) -> bool:
        # Each figure is at least 0, and its mean a whole number.
        return abs(float(figures.sum())) < 1 / 2

    shape = operator.Q.shape[1], operator.P.shape[1]
    figures = probe(measure, shape, PROBES, seeded(seed, operator.Q.device), operator.inverse_G_U, is_none)
    return 0 if is_none(figures) else max(1, round(float(figures.mean())))


def dense_core(operator: NormalOperator) -> Tensor:
    """A on the core as a matrix on row-major vectors, `(s_U s_V, s_U s_V)`."""
    eye_U, eye_V = (torch.eye(B.shape[1], dtype=operator.dtype, device=B.device) for B in (operator.Q, operator.P))
    terms = [
        torch.kron(eye_U - a_i @ a_i.mT, eye_V - b_i @ b_i.mT) for a_i, b_i in zip(operator.a, operator.b, strict=True)
    ]
    return torch.stack(terms).sum(dim=0)
