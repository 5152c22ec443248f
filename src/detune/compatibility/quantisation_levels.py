"""Quantisation levels: for every entry of a quantised matrix, the interval that its level stands for.

The format and the scales can be read off what is released. The largest magnitude that has a scale lies on the outermost
level, so it is the scale; then all others must lie on levels too, which no other matrix does.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from detune.errors import InputError
from detune.numerics.float_grid import spacing
from detune.problem.storage_noise import sample_rows, step_variance

__all__ = ["Levels", "level_noise", "levels_of", "to_nf4"]

# Weights with one scale, in GGUF's Q8_0, by definition of the format.
Q8_0_BLOCK = 32
# Rows that levels are looked for in: any number does, as thousands of entries on levels are no chance.
ROWS = 16
# Weights with one scale, in NF4: QLoRA's (arXiv 2305.14314), then the others that bitsandbytes has.
BLOCKS = (64, 32, 128, 256, 512, 1024, 2048, 4096)
# The outermost of the 16 levels is this quantile of the normal distribution, by definition of the format.
OUTERMOST = 0.9677083
# Logarithm of the probability that a matrix lies on levels by chance: any number does that is far below one over the
# matrices that anybody looks at.
SURE = -30.0


@dataclass(frozen=True)
class Levels:
    """A quantised matrix.

    Attributes:
        low: Lower ends of what each entry was before, `(out, in)`, float64.
        high: Upper ends.
    """

    low: Tensor
    high: Tensor


def levels_of(matrix: Tensor) -> Levels:
    """The intervals of a matrix in int8 with a scale for each row, column or block of 32, or in NF4 with one a block.

    Args:
        matrix: Dequantised, `(out, in)`, a float dtype.

    Raises:
        InputError: It lies on the levels of neither.
    """
    found = _int8(matrix, dim=1) or _int8(matrix, dim=0) or _q8_0(matrix) or _nf4(matrix)
    if found is None:
        raise InputError(
            f"a matrix of {matrix.shape[0]}x{matrix.shape[1]} is not quantised",
            "its entries lie on the levels neither of int8 with a scale for each channel nor of NF4",
            "try the attack denoise, which measures noise of any kind",
        )
    return found


def level_noise(matrix: Tensor) -> float | None:
    """The noise of a matrix that was quantised and turned back into floats, judged by some rows.

    Args:
        matrix: `(out, in)`, a float dtype.

    Returns:
        Root mean square of the rounding to 8 or 4 bits; None where the entries lie on no levels.
    """
    if not matrix.is_floating_point() or min(matrix.shape) < Q8_0_BLOCK:
        return None
    rows, values = sample_rows(matrix, ROWS), matrix[len(matrix) // 2].tolist()
    if not all(map(math.isfinite, values)):
        return None
    found = (_int8(rows, dim=1) or _q8_0(rows)) if _may_be_int8(values, matrix.dtype) else None
    found = found or (_nf4(rows) if _may_be_nf4(values, matrix.dtype) else None)
    return None if found is None else float(step_variance((found.high - found.low).square().mean())) ** 0.5


def _may_be_int8(values: list[float], dtype: torch.dtype) -> bool:
    """Whether a row may lie on levels of int8: a glance at some entries, which costs nothing beside reading them."""
    tolerance = 2 * torch.finfo(dtype).eps
    for scaled in (values, values[:Q8_0_BLOCK]):
        step = max(map(abs, scaled)) / 127
        multiples = [value / step for value in values[:Q8_0_BLOCK]] if step else []
        if multiples and all(abs(each - round(each)) <= tolerance * abs(round(each)) for each in multiples):
            return True
    return False


def _may_be_nf4(values: list[float], dtype: torch.dtype) -> bool:
    """Whether a row may lie on levels of NF4: few numbers where many have one scale, or the levels themselves."""
    if len(set(values[: BLOCKS[0]])) <= len(_nf4_levels()):
        return True
    block = values[: min(BLOCKS)]
    largest, tolerance = max(map(abs, block)), 4 * torch.finfo(dtype).eps
    levels = _nf4_levels().tolist()
    return all(any(abs(value / largest - level) <= tolerance for level in levels) for value in block)


def to_nf4(matrix: Tensor, size: int = BLOCKS[0]) -> Tensor:
    """Round a matrix to NF4 and back, float64, as QLoRA does with a base.

    Args:
        matrix: `(out, in)`, any float dtype.
        size: Weights with one scale.
    """
    flat = matrix.double().flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)
    largest = blocks.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    levels = _nf4_levels().to(matrix.device)
    ends = (levels[1:] + levels[:-1]) / 2
    return (levels[torch.bucketize(blocks / largest, ends)] * largest).flatten()[: len(flat)].view(matrix.shape)


def _q8_0(matrix: Tensor) -> Levels | None:
    if matrix.shape[1] % Q8_0_BLOCK:
        return None
    found = _int8(matrix.reshape(-1, Q8_0_BLOCK), dim=1)
    return None if found is None else Levels(found.low.view(matrix.shape), found.high.view(matrix.shape))


def _int8(matrix: Tensor, dim: int) -> Levels | None:
    exact = matrix.double()
    largest = exact.abs().amax(dim=dim, keepdim=True)
    step = torch.where(largest > 0, largest / 127, 1.0)
    multiple = exact / step
    nearest = multiple.round()
    # In units of a step: the entry's own rounding to its dtype, and the scale's.
    rounding = 2 * torch.finfo(matrix.dtype).eps * nearest.abs()
    if not _is_on((multiple - nearest).abs(), rounding, nearest.abs().lt(127) & nearest.ne(0), apart=1.0):
        return None
    # The interval is around the entry and not the multiple: in bf16 that may be the wrong one.
    return _with_known(matrix, exact - step / 2, exact + step / 2, exact.abs() > 126.5 * step, dim)


def _nf4(matrix: Tensor) -> Levels | None:
    levels = _nf4_levels().to(matrix.device)
    ends = torch.cat([levels[:1], (levels[1:] + levels[:-1]) / 2, levels[-1:]])
    flat = matrix.double().flatten()
    for size in BLOCKS:
        blocks = torch.nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)
        largest = blocks.abs().amax(dim=1, keepdim=True)
        share = blocks / torch.where(largest > 0, largest, 1.0)
        level = torch.bucketize(share, ends[1:-1])
        # The published levels have seven digits.
        rounding = 2 * torch.finfo(matrix.dtype).eps * share.abs() + 1e-6
        if _is_on((share - levels[level]).abs(), rounding, share.abs().lt(0.99) & share.ne(0), apart=2 / 15):
            low, high = ends[level] * largest, ends[level + 1] * largest
            known = _with_known(blocks.to(matrix.dtype), low, high, share.abs() > 0.99, dim=1)
            return Levels(*(end.flatten()[: len(flat)].view(matrix.shape) for end in (known.low, known.high)))
    return None


def _is_on(off: Tensor, rounding: Tensor, counts: Tensor, apart: float) -> bool:
    """Whether all entries are as close to levels as rounding allows, and would not be by chance.

    Args:
        off: Distances from the levels.
        rounding: What is allowed.
        counts: The entries that say something: not zero, and not the scale.
        apart: The mean distance of levels.
    """
    chance = (2 * rounding[counts] / apart).clamp(max=1).log10().sum()
    return bool((off <= rounding).all()) and float(chance) < SURE


def _with_known(stored: Tensor, low: Tensor, high: Tensor, is_outermost: Tensor, dim: int) -> Levels:
    """An entry that is alone on the outermost levels of its scale is the scale, and known to its rounding."""
    known = is_outermost & is_outermost.sum(dim=dim, keepdim=True).eq(1)
    exact, ulp = stored.double(), spacing(stored, stored.dtype)
    # The entry has been rounded to its dtype, and so has the scale.
    return Levels(torch.where(known, exact, low) - ulp, torch.where(known, exact, high) + ulp)


@cache
def _nf4_levels() -> Tensor:
    """NF4's levels: 7 quantiles of a standard normal below zero and 8 above, over the largest (QLoRA, Appendix E)."""
    below, above = (
        torch.special.ndtri(torch.linspace(OUTERMOST, 0.5, count + 1, dtype=torch.float64)[:-1]) for count in (7, 8)
    )
    levels: Tensor = torch.cat([-below, below.new_zeros(1), above.flip(0)]) / above[0]
    return levels
