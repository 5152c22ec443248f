"""Numbers on a grid and normal numbers that were cut off, as scalar functions to be inlined into compiled loops.

Both outcomes of a comparison are computed and one is taken, and no function of a library is called: a loop over entries
that uses these becomes vector instructions, eight entries at a time where the processor can.

Reference:
    Johnson, Kotz & Balakrishnan, "Continuous Univariate Distributions" 1, 1994, Section 13.10.1 (truncated normal);
    Shepherd & Laframboise 1981, doi 10.1090/S0025-5718-1981-0595058-X (the tail's expansion).
"""

import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numba.core.caching import FunctionCache

F = TypeVar("F", bound=Callable[..., Any])

# Below this width of a normal's interval, in deviations, the density is a parabola to 1e-4 (derived).
THIN = 0.03
# A smaller share of a normal number is none: 12.6 deviations away (derived).
NONE = 1e-36
LOG2_E, LN_2 = 1 / math.log(2), math.log(2)
ROOT_HALF, DENSITY, TAIL = math.sqrt(0.5), 1 / math.sqrt(2 * math.pi), math.sqrt(math.pi / 2)
# The bits of a float64's exponent, how many are below them, and what is added to it (derived).
EXPONENT, BELOW, BIAS = 0x7FF0000000000000, 52, 1023
# `exp(z^2) erfc(z) (1 + 2 z)` as a polynomial of `(z - 2) / (z + 2)`, to 1e-8; made by `_expand` (derived).
DEGREE = 12


def _expand() -> list[float]:
    """Interpolate the tail at Chebyshev's points."""
    t = np.cos(np.pi * (np.arange(400) + 0.5) / 400)
    z = 2 * (1 + t) / (1 - t)
    # The continued fraction where erfc underflows.
    tail = np.array([math.exp(x * x) * math.erfc(x) if x < 5 else _far_tail(x) for x in z])
    fitted = np.polynomial.chebyshev.chebfit(t, tail * (1 + 2 * z), DEGREE)
    return list(np.polynomial.chebyshev.cheb2poly(fitted)[::-1])


def _far_tail(z: float) -> float:
    fraction = z
    for k in range(60, 0, -1):
        fraction = z + k / 2 / fraction
    return 1 / (fraction * math.sqrt(math.pi))


EXPANSION = tuple(map(float, _expand()))
# When each file of compiled loops was changed, and its size.
SOURCES = tuple((file.stat().st_mtime, file.stat().st_size) for file in sorted(Path(__file__).parent.glob("*.py")))


class _KeptOnDisk(FunctionCache):  # type: ignore[misc]
    """numba's cache of a function's machine code, where a full disk or a lost right costs the cache and not the run."""

    def save_overload(self, sig: object, data: object) -> None:
        with suppress(OSError):
            super().save_overload(sig, data)

    def load_overload(self, sig: object, target_context: object) -> object:
        with suppress(OSError):
            return super().load_overload(sig, target_context)
        return None


def _jit(function: F, inline: bool) -> F:
    """Compile, in IEEE arithmetic, and keep the code beside this file or, where nothing can be written, in the home.

    Were sums and products allowed to be taken together, code that was just compiled would give other last bits than the
    same code from numba's cache, as more of it is inlined.
    """
    jitted: Any = numba.njit(nogil=True, error_model="numpy", forceinline=inline)(function)
    # No directory that can be written, as in some containers: each run compiles for some seconds.
    with suppress(RuntimeError, OSError):
        jitted._cache = _KeptOnDisk(function)
        # numba keeps machine code until its own file changes; functions of other files are part of it, too.
        jitted._cache._cache_file._source_stamp = SOURCES
    return cast(F, jitted)


def compiled(function: F) -> F:
    """Compile a loop."""
    return _jit(function, False)


def inlined(function: F) -> F:
    """Compile a function that becomes part of the loops it is called in: a call keeps them from being vector loops."""
    return _jit(function, True)


@inlined
def spacing(value: float, eps: float, tiny: float) -> float:
    """Distance between neighbouring points of a grid at a value."""
    power = np.int64(np.float64(value).view(np.int64) & EXPONENT).view(np.float64)
    return max(power, tiny) * eps


@inlined
def nearest(value: float, eps: float, tiny: float) -> float:
    """The grid's point next to a value."""
    step = spacing(value, eps, tiny)
    return math.floor(value / step + 0.5) * step


@inlined
def share_of(point: float, eps: float, tiny: float) -> float:
    """Length of the numbers that round to a grid point: at a power of two the step towards zero is half as long."""
    outward = spacing(point * (1 + eps / 4), eps, tiny)
    return (outward + spacing(point * (1 - eps / 4), eps, tiny)) / 2


@inlined
def exp(x: float) -> float:
    """`e^x` to 1e-8 for x from -700 to 0, and next to none below."""
    x = max(x, -700.0)
    doublings = math.floor(x * LOG2_E + 0.5)
    f = x - doublings * LN_2
    value = 1 + f * (1 + f * (1 / 2 + f * (1 / 6 + f * (1 / 24 + f * (1 / 120 + f * (1 / 720 + f / 5040))))))
    return value * np.int64((np.int64(doublings) + BIAS) << BELOW).view(np.float64)


@inlined
def tail(z: float) -> float:
    """`exp(z^2) erfc(z)` for `z >= 0`."""
    t = (z - 2) / (z + 2)
    c = EXPANSION
    value = c[0]
    # Unrolled, as a loop over a tuple of constants is compiled.
    for k in range(1, DEGREE + 1):
        value = value * t + c[k]
    return value / (1 + 2 * z)


@inlined
def edge(x: float) -> tuple[float, float]:
    """Density of `N(0, 1)` at x, and its probability beyond `|x|`."""
    density = DENSITY * exp(-x * x / 2)
    return density, density * TAIL * tail(abs(x) * ROOT_HALF)


@inlined
def truncated_normal(a: float, b: float) -> tuple[float, float, float]:
    """Probability, mean and variance of `x ~ N(0, 1)` in `(a, b)`.

    Where the interval is out of sight the probability is 0, and the rest is finite and means nothing.
    """
    density_a, beyond_a = edge(a)
    density_b, beyond_b = edge(b)
    side_a, side_b = math.copysign(1.0, a), math.copysign(1.0, b)
    # Tails are subtracted from each other, never from one, where both ends lie on one side.
    inside = (side_b - side_a) / 2 - side_b * beyond_b + side_a * beyond_a
    least = max(inside, NONE)
    mean = (density_a - density_b) / least
    variance = max(0.0, 1 + (a * density_a - b * density_b) / least - mean * mean)
    width, middle = b - a, (a + b) / 2
    second = width * width / 12
    parabola = width * DENSITY * exp(-middle * middle / 2) * (1 + (middle * middle - 1) * second / 2)
    thin = width * max(6.0, max(a, -b)) < 6 * THIN
    probability = parabola if thin else inside
    mean = middle - middle * second if thin else mean
    variance = second if thin else variance
    return (probability if probability > NONE else 0.0), mean, variance
