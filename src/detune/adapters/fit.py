"""One model's `M_i` where the base's `W` is known: a low rank that, added to W, rounds to the stored `W_i`.

Least squares takes the rounding errors of `W_i` for Gaussian and leaves a part of the entries on the wrong side of a
tie. They are uniform: every entry says `low <= W + M_i <= high`, the reals that round to it. Of the matrices of rank r
the one wanted lies in all of these intervals, and is found by alternating between them and the rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from detune.compatibility.low_rank_test import PRODUCT_ROUNDING
from detune.fitting.differences import Difference, find_differences
from detune.numerics.device import full_precision
from detune.numerics.float_grid import interval, times_power_of_two
from detune.numerics.linalg import orthonormal, thin_svd
from detune.problem.low_rank import LowRank
from detune.problem.rank_rule import OVER_EDGE
from detune.problem.recovery import NotLowRank
from detune.problem.solving import Prepared
from detune.problem.stack import Stack
from detune.problem.storage_noise import noise_edge

# Alternations: any number does from there on, as the share of entries inside grows by less than 1e-3 in those after.
STEPS = 32
# Aimed at this much inside an interval, in its half widths: what lies on the edge may fall either way in a merge. Any
# small number does.
MARGIN = 0.03
# The step is this over the share of violated entries: half of Newton's, which overshoots (see `_into_intervals`):
# any number does between that and slow.
DAMPING = 0.5
# With fewer violations a longer step would only follow single entries: any small number does.
FEWEST_VIOLATED = 1e-3


@full_precision()
def fit_adapter(
    W: Tensor,
    W_i: Tensor,
    rank: int | None = None,
    device: torch.device | str | None = None,
    noise: Sequence[float | None] = (),
) -> LowRank:
    """Fit `W_i = round(W + M_i)` with `M_i` of the rank that stands over the storage noise.

    Args:
        W: The base's matrix as stored, `(out, in)`, a float dtype.
        W_i: The model's, same shape, a float dtype.
        rank: The most that `M_i` can have; None finds it from the data.
        device: Where to compute; None is where the matrices lie.
        noise: That of each of the two where it was quantised, see `Stack.of`: `M_i` is what stands over it.

    Returns:
        The factors, `(out, r)` and `(in, r)`, in the compute dtype, with columns of equal norm on either side. Of
        rank 0 where the two differ by storage noise alone.

    Raises:
        NotLowRank: They differ at full rank.
        NonFinite: One holds NaN or Inf.
    """
    prepared = Prepared.of(Stack.of([W, W_i], device=device, noise=noise))
    exponent = prepared.scale.exponent

    def split(part: Stack) -> tuple[LowRank, LowRank]:
        return _nothing(part), _fit(part, exponent, rank)

    return _fit(prepared.foretold(split).stack, exponent, rank).times_power_of_two(exponent)


def _nothing(stack: Stack) -> LowRank:
    return LowRank(stack.zeros(stack.shape[0], 0), stack.zeros(stack.shape[1], 0))


def _fit(stack: Stack, exponent: int, rank: int | None) -> LowRank:
    """The `M_i` of a stack of W and `W_i`.

    Args:
        stack: On its unit scale.
        exponent: The matrices as stored are `2^exponent` times as large: small ones may have longer steps there.
        rank: The most that `M_i` can have.
    """
    # Lower than where models are split from each other: a direction of the noise that is taken in spoils nothing here.
    difference = find_differences(stack, signal=OVER_EDGE).of(0, 1)
    if difference.full_rank:
        raise NotLowRank((difference.pair,), stack.shape)
    if not difference.rank:
        return _nothing(stack)
    W, W_i = (times_power_of_two(matrix, exponent) if exponent else matrix for matrix in stack.matrices)
    base = W.to(stack.device, torch.float64)
    bounds = [bound.sub_(base) for bound in interval(W_i.to(stack.device))]
    low, high = ((times_power_of_two(bound, -exponent) if exponent else bound).to(stack.dtype) for bound in bounds)
    start = _least_squares(low + (high - low) / 2, difference, W_i.dtype, rank)
    # A quantised entry may have been anywhere between two levels, not only where its dtype would have rounded it.
    return _balanced(start if stack.noise_override else _into_intervals(start, low, high))


def _least_squares(D: Tensor, difference: Difference, dtype: torch.dtype, rank: int | None) -> LowRank:
    """The best approximation of D near a row space: two power steps from it, then the SVD of what is left."""
    left = orthonormal(D @ difference.basis.to(D.dtype))
    left = orthonormal(D @ orthonormal(D.mT @ left))
    V, S, Z = thin_svd(D.mT @ left)
    # A merge in this dtype has rounded `M_i` as well, a product of factors, before it was added.
    rounding = PRODUCT_ROUNDING.get(dtype, 0.5) * torch.finfo(dtype).eps * float(S.norm())
    edge = noise_edge((D.shape[0], D.shape[1]), rounding**2 / D.numel())
    r = int(S.gt(max(difference.noise_norm, OVER_EDGE * edge)).sum())
    r = r if rank is None else min(rank, r)
    return LowRank((left.double() @ Z[:, :r] * S[:r]).to(D.dtype), V[:, :r].to(D.dtype))


def _into_intervals(start: LowRank, low: Tensor, high: Tensor) -> LowRank:
    """Alternate between the intervals and the rank; `start.right` is orthonormal.

    With v what M lacks to its interval in each entry, `left += step v right` is a gradient step on `|v|^2 / 2` with
    respect to the left factor. Its curvature is about the share p of entries that are violated, which makes 1 / p
    Newton's step. Then it is the right factor's turn.
    """
    middle, reach = low + (high - low) / 2, (high - low) * (0.5 * (1 - MARGIN))
    low, high = middle - reach, middle + reach
    best, most_inside = start, -1.0
    left, right = start.left, start.right
    # The same memory for all steps: the system takes longer to give new memory than a step does.
    M, lacking = torch.empty_like(low), torch.empty_like(low)
    for step in range(STEPS + 1):
        torch.mm(left, right.mT, out=M)
        torch.clamp(M, low, high, out=lacking).sub_(M)
        violated = float(lacking.count_nonzero()) / lacking.numel()
        if 1 - violated > most_inside:
            best, most_inside = LowRank(left, right), 1 - violated
        if violated == 0:
            break
        length = DAMPING / max(violated, FEWEST_VIOLATED)
        # Another basis makes the factor that was moved the orthonormal one: L R^T = Q (R S^T)^T of L = Q S.
        if step % 2 == 0:
            left, S = torch.linalg.qr(left + length * (lacking @ right))
            right = right @ S.mT
        else:
            right, S = torch.linalg.qr(right + length * (lacking.mT @ left))
            left = left @ S.mT
    return best


def _balanced(M: LowRank) -> LowRank:
    """Balance the factors: `(U sqrt(S)) (V sqrt(S))^T`."""
    Q_left, R_left = torch.linalg.qr(M.left.double())
    Q_right, R_right = torch.linalg.qr(M.right.double())
    U, S, Vh = torch.linalg.svd(R_left @ R_right.mT)
    root = S.sqrt()
    return LowRank((Q_left @ U * root).to(M.left.dtype), (Q_right @ Vh.mT * root).to(M.right.dtype))
