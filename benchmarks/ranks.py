"""Are the ranks found exactly? 100 random sets of merged LoRAs, ranks unknown and mixed, the weakest direction of every
LoRA at 3 times the noise floor.

The noise floor of a model is the largest singular value of what storing did to its matrix, `W_i - (W + M_i)`, measured
on the very matrix: not an average, and not the difference of two models, whose noise is sqrt(2) times that. W lies on
the grid of the storage dtype, as published bases do. The other singular values are up to 100 times the smallest,
log-uniform. Row spaces: `A_i = sqrt(c) A + sqrt(1 - c) N_i` with one shared start A, so that the cosines between two
models' row spaces are about c, 0, 0.5 or 0.9.

Expected: all ranks of all models exact in 100 of 100 sets.
"""

import argparse
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from detune.fitting.differences import find_differences
from detune.fitting.rank_refinement import refine_ranks, weakest_directions
from detune.fitting.subspaces import find_spaces
from detune.problem import Stack

SIZES = {96: 0.3, 128: 0.25, 192: 0.2, 256: 0.13, 384: 0.07, 512: 0.03, 768: 0.02}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OVERLAPS = (0.0, 0.5, 0.9)
MOST_RANK = 32
SPREAD = 100.0
RATIO = 3.0
SWEEP = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0)


@dataclass(frozen=True)
class RankSet:
    """Merges of LoRAs with known ranks.

    Attributes:
        models: `(n, out, in)`, stored dtype.
        ranks: Of the `M_i`.
        overlap: Cosine between row spaces that the shared start gives.
        ratio: The least of `sigma_min(M_i)` over the model's noise floor.
        visible: By how many floors the root of the misfit rises when the least visible direction is left out and all
            other factors may make up for it (for given true spaces of one side, the side where it is less).
    """

    models: Tensor
    ranks: tuple[int, ...]
    overlap: float
    ratio: float
    visible: float

    @property
    def dtype(self) -> str:
        """Name of the storage dtype."""
        return str(self.models.dtype).removeprefix("torch.")


def draw(seed: int, ratio: float = RATIO, most_entries: int | None = None) -> RankSet:
    """A random set.

    Args:
        seed: Of everything but the dtype and the overlap, which take turns.
        ratio: The smallest singular value of every `M_i` over its model's noise floor.
        most_entries: Leave out sizes that could give larger matrices.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = {s: p for s, p in SIZES.items() if most_entries is None or s * s <= most_entries}
    out, columns = (_choose(sizes, generator) for _ in range(2))
    n = int(torch.randint(3, 9, (1,), generator=generator))
    dtype, overlap = DTYPES[seed % 3], OVERLAPS[seed // 3 % 3]
    # Any three models then have at most half of the smaller side.
    most = min(MOST_RANK, min(out, columns) // 6)
    ranks = tuple(min(most, int(math.exp(float(_uniform(generator, 1)) * math.log(most + 1)))) for _ in range(n))
    W = (_normal(generator, out, columns) / columns**0.5).to(dtype).double()
    shared = _normal(generator, columns, max(ranks))
    models, merges, left, right = [], [], [], []
    for r in ranks:
        A = overlap**0.5 * shared[:, :r] + (1 - overlap) ** 0.5 * _normal(generator, columns, r)
        U, V = torch.linalg.qr(_normal(generator, out, r))[0], torch.linalg.qr(A)[0]
        # Singular vectors of B A are any basis of A's row space, not the rows of A themselves.
        V = V @ torch.linalg.qr(_normal(generator, r, r))[0]
        sigma = torch.exp(_uniform(generator, r) * math.log(SPREAD))
        merge = _merge(W, U * (sigma / sigma.min()), V, ratio, dtype)
        models.append(merge.W_i)
        merges.append(merge)
        left.append(U)
        right.append(V)
    by_row = weakest_directions(right, [merge.F for merge in merges])
    by_column = weakest_directions(left, [right[i] @ (merge.F.mT @ left[i]) for i, merge in enumerate(merges)])
    visible = min(min(by_row[i].rise, by_column[i].rise) / merge.floor for i, merge in enumerate(merges))
    least = min(merge.size / merge.floor for merge in merges)
    return RankSet(torch.stack(models), ranks, overlap, least, visible)


@dataclass(frozen=True)
class Merge:
    """`W_i = round(W + F V^T)`.

    Attributes:
        W_i: As stored.
        F: Left factor of the delta, `(out, r)`.
        size: Smallest singular value of the delta.
        floor: Largest singular value of what rounding did.
    """

    W_i: Tensor
    F: Tensor
    size: float
    floor: float


def _merge(W: Tensor, F: Tensor, V: Tensor, ratio: float, dtype: torch.dtype) -> Merge:
    """Merge `size F V^T`, whose smallest singular value is `ratio` floors; that of `F V^T` is 1.

    What rounding does depends on the size, so it is found by iteration.
    """
    M = F @ V.mT
    size = ratio * float(W.abs().mean()) * torch.finfo(dtype).eps * sum(side**0.5 for side in W.shape) / 12**0.5
    for _ in range(60):
        W_i = (W + size * M).to(dtype)
        floor = float(torch.linalg.matrix_norm(W_i.double() - W - size * M, 2))
        if ratio <= size / floor <= 1.02 * ratio:
            break
        size *= max(0.8, min(1.25, 1.01 * ratio * floor / size))
    return Merge(W_i, size * F, size, floor)


def found(models: Tensor) -> tuple[int, ...]:
    """The ranks that the method `auto` works with."""
    spaces = refine_ranks(find_spaces(find_differences(Stack.of(models))))
    return tuple(V_i.shape[1] for V_i in spaces.bases)


def _choose(weights: dict[int, float], generator: torch.Generator) -> int:
    index = torch.multinomial(torch.tensor(list(weights.values())), 1, generator=generator)
    return list(weights)[int(index)]


def _uniform(generator: torch.Generator, count: int) -> Tensor:
    return torch.rand(count, generator=generator, dtype=torch.float64)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _sets(seeds: range, ratio: float, most_entries: int | None = None) -> Iterator[tuple[int, RankSet]]:
    for seed in seeds:
        yield seed, draw(seed, ratio, most_entries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--sweep-sets", type=int, default=45, help="sets for each ratio of the sweep")
    options = parser.parse_args()
    torch.set_num_threads(1)
    by_dtype, by_overlap, by_n, by_visible = (defaultdict[object, list[bool]](list) for _ in range(4))
    exact: list[bool] = []
    least = float("inf")
    for seed, case in _sets(range(options.first, options.first + options.sets), RATIO):
        ranks = found(case.models)
        exact.append(ranks == case.ranks)
        by_dtype[case.dtype].append(exact[-1])
        by_overlap[case.overlap].append(exact[-1])
        by_n[len(case.ranks)].append(exact[-1])
        least = min(least, case.ratio)
        if not exact[-1]:
            shape = tuple(case.models.shape[1:])
            print(
                f"missed: seed {seed}, {shape}, {case.dtype}, overlap {case.overlap}, visible {case.visible:.2f}: "
                f"{case.ranks}, found {ranks}",
                flush=True,
            )
        by_visible["below 1.5" if case.visible < 1.5 else "1.5 to 2" if case.visible < 2 else "above 2"].append(
            exact[-1]
        )
    print(f"{len(exact)} sets, smallest singular value over the floor from {least:.2f}: {sum(exact)} exact")
    for name, groups in (("dtype", by_dtype), ("overlap", by_overlap), ("models", by_n), ("visible", by_visible)):
        print(f"by {name:7} " + ", ".join(f"{key}: {sum(v)}/{len(v)}" for key, v in sorted(groups.items(), key=str)))
    if not options.sweep_sets:
        return
    print(f"share of sets with all ranks exact, {options.sweep_sets} sets of at most 192x192 for each ratio")
    print(f"{'ratio':>6} " + " ".join(f"overlap {overlap}" for overlap in OVERLAPS))
    for ratio in SWEEP:
        groups = {overlap: [] for overlap in OVERLAPS}
        for _, case in _sets(range(10_000, 10_000 + options.sweep_sets), ratio, 192 * 192):
            groups[case.overlap].append(found(case.models) == case.ranks)
        print(f"{ratio:6} " + " ".join(f"{sum(v) / len(v):11.2f}" for v in groups.values()), flush=True)


if __name__ == "__main__":
    main()
