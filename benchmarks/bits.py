"""How many of a bf16 base's bits come back? Random 768x768 matrices, r=16, the rank not told.

`limit` is the share that the most likely grid point reaches when the true M_i are given. Expected: `lattice` reaches
98.5 % of it with bf16 merges of any size; every bit with float32 merges of three models, of two with deltas up to 0.6
steps, and of one with deltas up to 0.3. A step is the distance between neighbours of the base's grid at its root mean
square; deltas are given as their root mean square in steps. `snapped` is plain Spectral DeTuning, rounded to the grid.
"""

import argparse
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import matplotlib
import torch
from minilm import merged_models
from torch import Tensor

from detune.checkpoints import open_checkpoint
from detune.demo.train import base_model
from detune.errors import DetuneError
from detune.methods import Auto, Lattice, Single, Spectral
from detune.metrics import w_error
from detune.numerics.float_grid import interval, nearest, spacing
from detune.problem import Recovery, Stack

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FIGURE = Path(__file__).parents[1] / "docs" / "bits.png"
SIZE, RANK, SCALE = 768, 16, 0.02
GRID = torch.bfloat16
HALF_MERGES = {"delta": "0.2,1,10", "n": "3,5,8,15"}
FINE_MERGES = {
    1: (0.1, 0.2, 0.3, 0.35, 0.4, 0.45, 0.5),
    2: (0.3, 0.6, 1.0, 1.5, 2.0, 3.0, 4.0),
    3: (0.3, 1.0, 10.0),
}
GOAL = 0.985


@dataclass(frozen=True)
class Problem:
    """A base on the grid, its deltas, and its merges."""

    W: Tensor
    deltas: tuple[Tensor, ...]
    stack: Stack

    @classmethod
    def of(cls, W: Tensor, deltas: Iterable[Tensor], merge: torch.dtype) -> "Problem":
        deltas = tuple(deltas)
        return cls(W, deltas, Stack.of([(W + M_i).to(merge) for M_i in deltas]))

    @classmethod
    def random(cls, delta: float, n: int, merge: torch.dtype, seed: int = 0) -> "Problem":
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        W = nearest(SCALE * draw(SIZE, SIZE), GRID)
        size = delta * float(spacing(torch.tensor(SCALE), GRID)) / RANK**0.5
        return cls.of(W, [size * draw(SIZE, RANK) @ draw(RANK, SIZE) for _ in range(n)], merge)

    @classmethod
    def trained(cls, n: int) -> "Iterator[tuple[str, Problem]]":
        """The query and value matrices of all-MiniLM-L6-v2, cast to bf16, with the deltas of LoRAs of one seed."""
        base, models = open_checkpoint(base_model()), [open_checkpoint(path) for path in merged_models()[:n]]
        for name in base.tensors:
            if name.endswith(("query.weight", "value.weight")):
                W = base.read(name).double()
                layer, kind = name.split(".")[2], name.split(".")[-2]
                yield (
                    f"layer {layer} {kind}",
                    cls.of(nearest(W, GRID), [m.read(name).double() - W for m in models], GRID),
                )

    def share(self, weight: Tensor) -> float:
        return float(nearest(weight, GRID).eq(self.W).double().mean())

    @property
    def limit(self) -> float:
        """With the true M_i the feasible grid points are equally likely; the one next to the middle stands for them."""
        return self.share_given(self.deltas)

    @property
    def least_squares(self) -> float:
        """That share with M_i from the truncated SVD of `W_i - W`: least squares that knows W."""
        svds = [torch.linalg.svd(W_i.double() - self.W) for W_i in self.stack.matrices]
        return self.share_given([(U[:, :RANK] * S[:RANK]) @ Vh[:RANK] for U, S, Vh in svds])

    def share_given(self, deltas: Iterable[Tensor]) -> float:
        deltas, ends = list(deltas), [interval(W_i) for W_i in self.stack.matrices]
        low = torch.stack([low - M_i for (low, _), M_i in zip(ends, deltas, strict=True)]).amax(dim=0)
        high = torch.stack([high - M_i for (_, high), M_i in zip(ends, deltas, strict=True)]).amin(dim=0)
        return self.share((low + high) / 2)

    def wrong(self, recovery: Recovery) -> int:
        assert recovery.bits is not None
        return int((recovery.bits.certain & (recovery.weight.double() != self.W)).sum())


def half_merges(deltas: str, models: str) -> None:
    print(f"bf16 merges{'':24} shares of bit-exact entries{'':30} log10 MSE")
    names = (
        "limit",
        "lattice",
        "of limit",
        "auto",
        "snapped",
        "certain",
        "wrong",
        "lattice",
        "expected",
        "auto",
        "spectral",
    )
    print(f"{'delta':>6} {'n':>3} " + " ".join(f"{name:>9}" for name in names))
    worst = 1.0
    for delta in map(float, deltas.split(",")):
        for n in map(int, models.split(",")):
            problem = Problem.random(delta, n, GRID)
            lattice, auto = Lattice().solve(problem.stack), Auto().solve(problem.stack)
            spectral = Spectral().solve(problem.stack, RANK).weight
            assert lattice.bits is not None
            reached = problem.share(lattice.weight) / problem.limit
            worst = min(worst, reached)
            shares = (problem.limit, problem.share(lattice.weight), reached, problem.share(auto.weight))
            figures = [f"{x:9.4f}" for x in (*shares, problem.share(spectral), lattice.bits.share)]
            figures.append(f"{problem.wrong(lattice):9}")
            figures.append(f"{w_error(lattice.weight, problem.W):9.2f} {math.log10(lattice.bits.expected.mse):9.2f}")
            figures.append(f"{w_error(auto.weight, problem.W):9.2f} {w_error(spectral, problem.W):9.2f}")
            print(f"{delta:6.1f} {n:3} " + " ".join(figures), flush=True)
    print(f"smallest share of the limit: {worst:.4f}, target at least {GOAL}: {'met' if worst >= GOAL else 'MISSED'}")


def trained_merges(n: int) -> None:
    print(f"\ntrained LoRAs of one seed on all-MiniLM-L6-v2 in bf16, {n} merges in bf16, matrices 384x384")
    print("`squares`: M_i by least squares with W known")
    print(f"{'matrix':20} {'limit':>7} {'squares':>7} {'auto':>7} {'of limit':>8} {'certain':>7} {'wrong':>5}")
    rows = []
    for name, problem in Problem.trained(n):
        recovery = Auto().solve(problem.stack)
        share, on_grid = problem.share(recovery.weight), recovery.bits is not None
        certain, wrong = (recovery.bits.share, problem.wrong(recovery)) if recovery.bits else (0.0, 0)
        rows.append((problem.limit, problem.least_squares, share, share / problem.limit, certain, wrong))
        print(f"{name:20} {_figures(rows[-1])}{'' if on_grid else '  no grid'}", flush=True)
    print(f"{'mean':20} {_figures([fmean(column) for column in zip(*rows, strict=True)])}")
    met = sum(row[3] >= GOAL for row in rows)
    print(f"at least {GOAL} of the limit: {met} of {len(rows)}")


def _figures(row: Sequence[float]) -> str:
    limit, least_squares, share, of_limit, certain, wrong = row
    return f"{limit:7.4f} {least_squares:7.4f} {share:7.4f} {of_limit:8.4f} {certain:7.4f} {wrong:5.0f}"


def fine_merges(seeds: int) -> None:
    print(f"\nfloat32 merges, {seeds} sets each: bit-exact share, least and mean; certain share; certain and wrong")
    _, axes = plt.subplots(figsize=(6, 4))
    for n, deltas in FINE_MERGES.items():
        curve = []
        for delta in deltas:
            shares, certain, wrong, refused = [], [], 0, 0
            for seed in range(seeds):
                problem = Problem.random(delta, n, torch.float32, seed)
                try:
                    recovery = Lattice().solve(problem.stack)
                except DetuneError:
                    recovery, refused = Single().solve(problem.stack), refused + 1
                shares.append(problem.share(recovery.weight))
                if recovery.bits is not None:
                    certain.append(recovery.bits.share)
                    wrong += problem.wrong(recovery)
            curve.append(sum(shares) / seeds)
            sure = f"{sum(certain) / len(certain):.4f}" if certain else "-"
            print(
                f"n={n} delta={delta:5.2f}: {min(shares):.6f} {curve[-1]:.6f}; {sure}; {wrong}"
                + (f"; {refused} refused" if refused else ""),
                flush=True,
            )
        axes.plot(deltas, curve, "o-", label=f"{n} model{'s' * (n > 1)}")
    axes.set(xscale="log", xlabel="rms of the deltas, in steps of the base's bf16 grid", ylabel="bit-exact share")
    axes.set_title("float32 merges of a bf16 base, 768x768, r=16")
    axes.legend()
    axes.grid(alpha=0.3)
    plt.savefig(FIGURE, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1, help="sets for each point of the float32 curves")
    parser.add_argument("--only", choices=["half", "trained", "fine"])
    parser.add_argument("--delta", default=HALF_MERGES["delta"], help="sizes of the deltas of the bf16 merges")
    parser.add_argument("--n", default=HALF_MERGES["n"], help="numbers of models of the bf16 merges")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only in ("half", None):
        half_merges(options.delta, options.n)
    if options.only in ("trained", None):
        trained_merges(8)
    if options.only in ("fine", None):
        fine_merges(options.seeds)


if __name__ == "__main__":
    main()
