"""What each constant of the fit of bits decides: the bits with half of it and with twice as much.

Twelve random problems: light, ordinary and heavy deltas, bf16, fp16 and float32 merges, one to five models, one that
left the matrix alone, one that is a copy of another at 0.7, uneven rows, and matrices of which a block is fitted. A row
prints the share of wrong entries over all of them, the share of certain entries, and how many of these are wrong, with
half of the constant and with twice as much; the first row has all of them as they are. Six more problems have a base in
float32, and adapters that nearly coincide, decay, or are told their rank: their mean W-Error, log10 of the mean squared
error, is the last column. Constants of compiled loops are left out: they are of arithmetic.

    python benchmarks/constants.py [--only NAME,...]

Expected: no factor of two brings more than half as many wrong entries again, and none makes a certain entry wrong.
"""

import argparse
import math
import time
from collections.abc import Callable
from importlib import import_module
from statistics import fmean
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from detune.methods import Auto, Lattice
from detune.metrics import w_error
from detune.problem import NotRecoverable, Stack

MODULES = {
    "lattice.search": ("MOST_STEPS", "MOST_NOISE", "MOST_SWEEPS", "PATIENCE"),
    "lattice.fit": ("BLOCK", "BLOCK_PER_RANK", "SETTLED", "BARREN"),
    "lattice.holdout": ("HELD", "TESTED", "SIGN"),
    "lattice.light": ("FINE", "COMMON", "NOTHING", "FEW_SWEEPS"),
    "lattice.submatrix": ("SMALL_BLOCK", "WIDE", "MOST_FALL"),
    "lattice.growth": ("EDGE", "SHRUNK", "FIRST_DIRECTIONS", "MOST_DIRECTIONS", "POWER_PASSES"),
    "lattice.message_passing": ("MOST_STEPS", "REST", "MOST_SQUARE", "LOCKED", "MOST_RISE", "MOST_FALL", "SLOW_FALL"),
    "lattice.decode": ("SAFETY", "DOUBT", "MOST_STRAIN", "DEVIATIONS", "DRAWS", "OUTSIDE"),
    "problem.delta_sizes": (
        "SAMPLED",
        "FINEST",
        "SMALLEST_SHARE",
        "SAMPLED_FOR_PRODUCTS",
        "SURE",
        "MOST_ALIKE",
        "TOO_ALIKE",
    ),
    "problem.balance": ("SAMPLED", "ROUNDS"),
    "methods.auto": (*("BELOW_NOISE", "AT_FLOOR", "RAN_OFF", "CLEAR", "JUST_ABOVE", "FEW_DIRECTIONS"),),
    "source_models.identical": ("MOST",),
}
# These are factors next to 1, or shares: what is over 1, or missing to it, is halved and doubled.
FROM_ONE = {
    *("lattice.growth.EDGE", "lattice.growth.SHRUNK", "lattice.search.MOST_NOISE", "lattice.message_passing.MOST_FALL"),
    "methods.auto.AT_FLOOR",
}


class Problem(NamedTuple):
    """A base on the bf16 grid, and its merges."""

    W: Tensor
    stack: Stack


class Outcome(NamedTuple):
    """Shares of the entries of all problems, and a number."""

    wrong: float
    certain: float
    certain_and_wrong: int
    w_error: float


def draw(
    seed: int, delta: float, dtypes: list[torch.dtype], ranks: list[int], shape: tuple[int, int] = (288, 224),
    change: Callable[[list[Tensor]], list[Tensor]] = list, uneven: bool = False,
) -> Problem:  # fmt: skip
    """Deltas of a root mean square in units in the last place of bf16."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(shape, generator=generator, dtype=torch.float64) / 20
    if uneven:
        W[: shape[0] // 8] *= 16
    W = W.bfloat16().double()
    deltas = []
    for rank in ranks:
        B = torch.randn(shape[0], rank, generator=generator, dtype=torch.float64)
        A = torch.randn(rank, shape[1], generator=generator, dtype=torch.float64)
        deltas.append(delta * 2.0**-13 * B @ A / math.sqrt(max(1, rank)))
    merges = [(W + M_i).to(dtype) for M_i, dtype in zip(change(deltas), dtypes, strict=True)]
    return Problem(W, Stack.of(merges))


def problems() -> list[Problem]:
    """All of them."""
    bf16, fp16, single = torch.bfloat16, torch.float16, torch.float32
    return [
        draw(0, 0.1, [bf16] * 3, [8, 4, 8]),
        draw(1, 0.3, [bf16] * 3, [8, 8, 8]),
        draw(2, 2.0, [bf16] * 3, [8, 4, 8]),
        draw(3, 20.0, [bf16] * 3, [4, 4, 8]),
        draw(4, 1.0, [bf16] * 5, [4, 8, 4, 4, 8]),
        draw(5, 1.0, [fp16] * 3, [8, 8, 8]),
        draw(6, 0.3, [single], [4]),
        draw(7, 0.4, [single] * 2, [4, 4]),
        draw(8, 0.3, [bf16] * 3, [8, 8, 0]),
        draw(9, 1.0, [bf16] * 4, [8, 4, 8], change=lambda M: [*M, 0.7 * M[0]]),
        draw(10, 1.0, [bf16] * 3, [8, 8, 4], uneven=True),
        draw(11, 0.5, [bf16] * 3, [8, 8, 8], shape=(1024, 800)),
    ]


def off_grid() -> list[tuple[Problem, int | None]]:
    """Problems for least squares, and the rank that is told."""
    found = []
    for seed, (n, apart, decay, told) in enumerate(
        [
            (3, 1.0, 0.0, None),
            (3, 1.0, 7.0, None),
            (5, 0.03, 9.0, None),
            (5, 0.03, 9.0, 8),
            (4, 0.1, 4.0, 8),
            (8, 1.0, 4.0, None),
        ]
    ):
        generator = torch.Generator().manual_seed(100 + seed)
        W = torch.randn(96, 80, generator=generator, dtype=torch.float64) / 20
        rows, sizes = (
            torch.randn(8, 80, generator=generator, dtype=torch.float64),
            torch.linspace(0, -decay, 8).double().exp(),
        )
        merges = []
        for _ in range(n):
            A = math.sqrt(1 - apart) * rows + math.sqrt(apart) * torch.randn(
                8, 80, generator=generator, dtype=torch.float64
            )
            B = torch.randn(96, 8, generator=generator, dtype=torch.float64)
            merges.append((W + 1e-3 * (B * sizes) @ A).float())
        found.append((Problem(W, Stack.of(merges)), told))
    return found


def outcome(given: list[Problem], others: list[tuple[Problem, int | None]]) -> Outcome:
    """Solve all."""
    wrong, certain, both, entries = 0, 0, 0, 0
    for W, stack in given:
        entries += W.numel()
        try:
            found = (Auto() if stack.n >= Auto.min_models else Lattice()).solve(stack)
        except NotRecoverable:
            wrong += W.numel()
            continue
        off = found.weight.to(torch.bfloat16).double().ne(W)
        sure = found.bits.certain if found.bits is not None else torch.zeros_like(off)
        wrong, certain, both = wrong + int(off.sum()), certain + int(sure.sum()), both + int((off & sure).sum())
    errors = [w_error(Auto().solve(stack, told).weight, W) for (W, stack), told in others]
    return Outcome(wrong / entries, certain / entries, both, fmean(errors))


def changed(name: str, value: float | int, factor: float) -> float | int:
    """Half of a constant, or twice as much."""
    if name in FROM_ONE:
        return 1 + (value - 1) * factor
    return max(1, round(value * factor)) if isinstance(value, int) else value * factor


def row(label: str, found: Outcome) -> str:
    shares = f"{100 * found.wrong:7.3f} % {100 * found.certain:6.2f} %"
    return f"{label:44} {shares} {found.certain_and_wrong:5d} {found.w_error:8.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda text: text.split(","), help="names of constants")
    options = parser.parse_args()
    torch.set_num_threads(1)
    given = problems(), off_grid()
    outcome(*given)
    began = time.process_time()
    print(f"{'':44} {'wrong':>9} {'certain':>8} {'both':>5} {'W-Error':>8}")
    print(row("as they are", outcome(*given)), flush=True)
    for path, names in MODULES.items():
        module: ModuleType = import_module(f"detune.{path}")
        for name in names:
            if options.only and name not in options.only:
                continue
            value = getattr(module, name)
            for factor in (0.5, 2.0):
                other = changed(f"{path}.{name}", value, factor)
                setattr(module, name, other)
                try:
                    print(row(f"{path}.{name} {value:g} -> {other:g}", outcome(*given)), flush=True)
                finally:
                    setattr(module, name, value)
    print(f"{time.process_time() - began:.0f} core seconds")


if __name__ == "__main__":
    main()
