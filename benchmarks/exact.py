"""Is "exact" exact? Small matrices of many kinds, and how many of those that are called exact are wrong.

    python benchmarks/exact.py [--matrices 10000] [--kind KIND]

Random matrices with sides of 32 to 128, 2 to 5 models in bf16, fp16 and float32. Many are made to deceive: bases off
their grid in a few entries, or by a few bits; models that left the matrix alone, or share what they made of it; deltas
that are not independent. `made` counts the matrices, `exact` those that `recover` calls so, `wrong` those of these in
which an entry of the stored weight is not the base's. `certain` and `false` are entries that are called certain, and
those of these that are not the base's. Expected: no exact answer wrong, and one certain entry in a million.
"""

import argparse
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from corpus import time_limit
from corpus_problems import EXTRAS, rms
from torch import Tensor

from detune.certificate.verdict import Verdict
from detune.compatibility.model_set import Held
from detune.methods import Auto, Lattice
from detune.numerics.float_grid import spacing
from detune.problem import Solver
from detune.recovery.tensor import solve_tensor

HALVES = (torch.bfloat16, torch.float16)
SIDES = (32, 32, 32, 40, 48, 64, 64, 96, 128)
MOST_SECONDS = 20.0
SHOWN = 20


@dataclass(frozen=True)
class Case:
    """A base and its models.

    Attributes:
        W: `(out, in)`, float64.
        models: `W + M_i`, rounded.
        about: The rest, in words.
    """

    W: Tensor
    models: tuple[Tensor, ...]
    about: str


@dataclass(frozen=True)
class Draw:
    """Random choices of one case."""

    pick: random.Random
    generator: torch.Generator

    @classmethod
    def of(cls, seed: int) -> "Draw":
        """The choices that follow from a seed."""
        return cls(random.Random(seed), torch.Generator().manual_seed(seed))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def base(self) -> Tensor:
        """A base on no grid; some have columns of different size, some many zeros."""
        shape = self.pick.choice(SIDES), self.pick.choice(SIDES)
        W = self.normal(*shape) * self.pick.choice((1.0, 0.02))
        how = self.pick.random()
        if how < 0.4:
            W = W * torch.exp(0.5 * self.normal(shape[1]))
        return W * (self.normal(*shape) > 0) if how > 0.95 else W

    def deltas(self, W: Tensor, n: int, grid: torch.dtype, least: float = -1.3, most: float = 2.5) -> list[Tensor]:
        """Deltas of low rank; the logarithm of their size in steps of a grid is between two ends."""
        rank = self.pick.choice((1, 1, 2, 3, 4))
        overlap, decay = self.pick.choice((0, 0, 0.5, 0.97)), self.pick.choice((0, 0, 2, 5))
        common, size = self.normal(rank, W.shape[1]), 10 ** self.pick.uniform(least, most) * rms(spacing(W, grid))
        found = []
        for _ in range(n):
            own = self.pick.randint(1, rank)
            left = self.normal(W.shape[0], own) * torch.exp(torch.linspace(0, -decay, own, dtype=torch.float64))
            rows = overlap**0.5 * common[:own] + (1 - overlap) ** 0.5 * self.normal(own, W.shape[1])
            M = left @ rows
            found.append(M * (size * 10 ** self.pick.uniform(-0.2, 0.2) / max(rms(M), 1e-300)))
        return found

    def models(self, least: int = 3) -> int:
        return self.pick.randint(least, 5)

    def case(self, W: Tensor, deltas: Sequence[Tensor], dtype: torch.dtype, about: str = "") -> Case:
        """Merge, and put the models in any order."""
        models = [(W + M_i).to(dtype) for M_i in deltas]
        self.pick.shuffle(models)
        return Case(W, tuple(models), about)

    def merge_dtype(self, grid: torch.dtype) -> torch.dtype:
        """The grid's own, or float32."""
        return self.pick.choice((grid, torch.float32))


def _finer(draw: Draw) -> Case:
    """A half-precision base, merged in float32."""
    grid = draw.pick.choice(HALVES)
    W = draw.base().to(grid).double()
    return draw.case(W, draw.deltas(W, draw.models(), grid), torch.float32)


def _same(draw: Draw) -> Case:
    """Merged in the base's own dtype."""
    grid = draw.pick.choice((*HALVES, torch.float32))
    W = draw.base().to(grid).double()
    return draw.case(W, draw.deltas(W, draw.models(), grid, most=4.0), grid)


def _other(draw: Draw) -> Case:
    """A bf16 base that is merged in fp16, or the other way round: rounded to it first."""
    grid, dtype = draw.pick.sample(HALVES, 2)
    W = draw.base().to(grid).double()
    return draw.case(W, draw.deltas(W, draw.models(), grid), dtype)


def _two(draw: Draw) -> Case:
    """Two float32 merges of a half-precision base."""
    grid = draw.pick.choice(HALVES)
    W = draw.base().to(grid).double()
    return draw.case(W, draw.deltas(W, 2, grid, -1.5, 0.8), torch.float32)


def _alone(draw: Draw, count: int) -> Case:
    """Some models left the matrix alone."""
    grid = draw.pick.choice((*HALVES, torch.float32))
    W = draw.base().to(grid).double()
    deltas = draw.deltas(W, draw.models(), grid)
    deltas[:count] = [torch.zeros_like(W)] * count
    return draw.case(W, deltas, draw.merge_dtype(grid))


def _shared(draw: Draw) -> Case:
    """Two models hold the same fine-tuned matrix; the others their own, or the base's."""
    grid = draw.pick.choice((*HALVES, torch.float32))
    W = draw.base().to(grid).double()
    deltas = draw.deltas(W, draw.models(), grid)
    deltas[1] = deltas[0]
    for i in range(2, len(deltas)):
        deltas[i] = deltas[i] if draw.pick.random() < 0.5 else torch.zeros_like(W)
    return draw.case(W, deltas, draw.merge_dtype(grid))


def _off_in_places(draw: Draw) -> Case:
    """A base on a half-precision grid but for a few entries, by a step's half or by float32's last bits."""
    grid, few = draw.pick.choice(HALVES), draw.pick.choice((1, 1, 2, 4))
    W = draw.base().to(grid).double()
    places = torch.randperm(W.numel(), generator=draw.generator)[:few]
    size = 2 ** draw.pick.uniform(-15, -1)
    flat = W.flatten()
    flat[places] += size * spacing(flat[places], grid)
    W = flat.reshape(W.shape).float().double()
    least = draw.pick.choice((2, 3, 3, 3))
    deltas = draw.deltas(W, least if least == 2 else draw.models(), grid, -1.5, 0.8 if least == 2 else 2.5)
    if draw.pick.random() < 0.3 and len(deltas) > 2:
        deltas[0] = torch.zeros_like(W)
    return draw.case(W, deltas, torch.float32, f"{few} entries off by {size:.2g} steps")


def _off_in_rows(draw: Draw) -> Case:
    """A base on a half-precision grid but for a row or two."""
    grid = draw.pick.choice(HALVES)
    W = draw.base()
    rows = draw.pick.randint(1, 2)
    W = torch.cat([W[:rows].float().double(), W[rows:].to(grid).double()])
    return draw.case(W, draw.deltas(W, draw.models(2), grid, -1.5, 1.5), torch.float32)


def _off(draw: Draw) -> Case:
    """A float32 base on no coarser grid, merged in any dtype."""
    dtype = draw.pick.choice((*HALVES, torch.float32, torch.float32))
    W = draw.base().float().double()
    deltas = draw.deltas(W, draw.models(2), draw.pick.choice(HALVES), -1.5, 2.0)
    if draw.pick.random() < 0.2:
        deltas[0] = torch.zeros_like(W)
    return draw.case(W, deltas, dtype)


def _frozen(draw: Draw) -> Case:
    """All adapters share their rows."""
    grid = draw.pick.choice(HALVES)
    W = draw.base().to(grid).double()
    rows = draw.normal(draw.pick.choice((1, 2, 4)), W.shape[1])
    size = 10 ** draw.pick.uniform(-1, 1.5) * rms(spacing(W, grid))
    deltas = [draw.normal(W.shape[0], len(rows)) @ rows for _ in range(draw.models())]
    return draw.case(W, [M * (size / rms(M)) for M in deltas], draw.merge_dtype(grid))


def _surplus(draw: Draw) -> Case:
    """One model is not independent of the others."""
    grid, extra = draw.pick.choice((*HALVES, torch.float32)), draw.pick.choice(list(EXTRAS))
    W = draw.base().to(grid).double()
    deltas = draw.deltas(W, 4, grid)
    deltas[3] = EXTRAS[extra](*deltas)
    return draw.case(W, deltas, draw.merge_dtype(grid), extra)


def _full(draw: Draw) -> Case:
    """One model was fine-tuned in full."""
    grid = draw.pick.choice((*HALVES, torch.float32))
    W = draw.base().to(grid).double()
    deltas = draw.deltas(W, draw.models(4) if draw.pick.random() < 0.7 else 3, grid)
    deltas[0] = deltas[0] + 10 ** draw.pick.uniform(-1, 2) * rms(spacing(W, grid)) * draw.normal(*W.shape)
    return draw.case(W, deltas, draw.merge_dtype(grid))


KINDS: dict[str, tuple[int, Callable[[Draw], Case]]] = {
    "finer merges": (4, _finer),
    "in the base's own dtype": (2, _same),
    "in the other half precision": (1, _other),
    "two models": (2, _two),
    "one left alone": (2, lambda draw: _alone(draw, 1)),
    "two left alone": (1, lambda draw: _alone(draw, 2)),
    "a shared fine-tune": (2, _shared),
    "off the grid in a few entries": (3, _off_in_places),
    "off the grid in a few rows": (1, _off_in_rows),
    "off every grid": (2, _off),
    "one frozen A": (1, _frozen),
    "surplus": (1, _surplus),
    "one full fine-tune": (1, _full),
}


def drawn(seed: int) -> tuple[str, Case]:
    """The case of a seed, and its kind."""
    draw = Draw.of(seed)
    kind = draw.pick.choices(list(KINDS), [weight for weight, _ in KINDS.values()])[0]
    return kind, KINDS[kind][1](draw)


def judge(seed: int, case: Case, most_seconds: float = MOST_SECONDS) -> Counter[str]:
    """What is said of a case, and what of that is wrong."""
    stored = min((W_i.dtype for W_i in case.models), key=lambda dtype: torch.finfo(dtype).eps)
    solver: Solver = Lattice() if len(case.models) < 3 or seed % 3 == 0 else Auto()
    if all(torch.equal(W_i, case.models[0]) for W_i in case.models):
        # Copied, and said to be.
        return Counter(made=1)
    try:
        with time_limit(most_seconds):
            found = solve_tensor("W", Held.of(case.models), solver, None, None, stored)
    except TimeoutError:
        return Counter(made=1, slow=1)
    off = found.weight.to(stored).double().ne(case.W)
    exact = found.result.verdict is Verdict.EXACT
    certain = found.certain if found.certain is not None else torch.zeros_like(off)
    return Counter(
        made=1,
        exact=exact,
        wrong=exact and bool(off.any()),
        certain=int(certain.sum()),
        false=int((certain & off).sum()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrices", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--kind", choices=KINDS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    totals: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    wrong = []
    # What is imported and compiled costs once, and must not be interrupted.
    judge(0, _finer(Draw.of(0)), most_seconds=3600.0)
    began = time.process_time()
    for seed in range(options.first, options.first + options.matrices):
        kind, case = drawn(seed)
        if options.kind in (None, kind):
            found = judge(seed, case)
            totals[kind] += found
            if found["wrong"] or found["false"]:
                dtypes = ", ".join(sorted({str(W_i.dtype).removeprefix("torch.") for W_i in case.models}))
                wrong.append(f"{kind}, seed {seed}: {len(case.models)} models in {dtypes} {case.about} {dict(found)}")
    print(f"{'':32} {'made':>6} {'exact':>6} {'wrong':>6} {'certain':>9} {'false':>6}")
    for kind, of_kind in {**totals, "all": sum(totals.values(), Counter[str]())}.items():
        figures = (f"{of_kind[name]:{width}}" for name, width in COLUMNS.items())
        print(f"{kind:32} {' '.join(figures)}")
    slow = sum(of_kind["slow"] for of_kind in totals.values())
    print(f"{time.process_time() - began:.0f} core seconds; {slow} too slow")
    for line in wrong[:SHOWN]:
        print(line)


COLUMNS = {"made": 6, "exact": 6, "wrong": 6, "certain": 9, "false": 6}

if __name__ == "__main__":
    main()
