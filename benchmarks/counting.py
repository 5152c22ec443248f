"""What torch is asked to do, counted: seconds depend on the machine and on who else uses it, counts do not.

`python benchmarks/counting.py` prints the counts of a few small problems beside the stored ones, which a test holds
the code against; `--store` replaces those.
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from detune.certificate.certify import certify
from detune.methods import SOLVERS
from detune.methods.auto import Auto
from detune.problem import Solver, Stack

STORED = Path(__file__).parent / "counts.json"
# Operations of a factorisation over `long * short^2` (Golub & Van Loan, Matrix Computations, 4th edition).
FACTORISATIONS = {
    "linalg_cholesky_ex": 1 / 3,
    "cholesky_inverse": 2 / 3,
    "_linalg_eigh": 9.0,
    "_linalg_svd": 20.0,
    "linalg_qr": 4.0,
}


@dataclass(frozen=True)
class Counts:
    """What a computation did.

    Attributes:
        flops: Floating-point operations of matrix products and factorisations.
        bytes: Bytes of the tensors that operations read and wrote, from wherever; views cost nothing.
    """

    flops: int
    bytes: int


@dataclass(frozen=True)
class Problem:
    """A random stack, the same every time: `n` models `(out, in)` in bf16, deltas of 1 % of the weights."""

    out: int
    columns: int
    rank: int
    n: int

    def __str__(self) -> str:
        return f"{self.out}x{self.columns} r={self.rank} n={self.n}"

    def models(self) -> list[torch.Tensor]:
        """Draw it."""
        generator = torch.Generator().manual_seed(0)
        W = (torch.randn(self.out, self.columns, generator=generator) / math.sqrt(self.columns)).bfloat16().float()
        size = 0.01 / math.sqrt(self.rank * self.columns)
        models = []
        for _ in range(self.n):
            left = torch.randn(self.out, self.rank, generator=generator)
            right = torch.randn(self.rank, self.columns, generator=generator)
            models.append(torch.addmm(W, left, right, alpha=size).bfloat16())
        return models


def _certified(solver: Solver) -> Callable[[Stack], object]:
    """What `recover` does with a matrix: the answer, and the judgement of it."""
    return lambda stack: certify(stack, solver.solve(stack), torch.bfloat16)


# `auto` without its search for bits, which has a cost of its own.
METHODS: dict[str, Callable[[Stack], object]] = {
    "mean": SOLVERS["mean"]().solve,
    "intersect": SOLVERS["intersect"]().solve,
    "intersect, certified": _certified(SOLVERS["intersect"]()),
    "auto": Auto(lattice=None).solve,
    "auto, certified": _certified(Auto(lattice=None)),
}
WATCHED = {
    f"{method} {problem}": (method, problem)
    for problem in (Problem(1152, 1024, 16, 3), Problem(1152, 1024, 16, 6))
    for method in METHODS
}


class Counter(TorchDispatchMode):
    """Counts the operations below it."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts(0, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            touched = sum(tensor.nbytes for tensor in (*read, *written))
            flops = _flops(func.overloadpacket.__name__, read, args, kwargs or {}, result)
            self.counts = Counts(self.counts.flops + flops, self.counts.bytes + touched)
        return result


def _flops(name: str, read: list[torch.Tensor], args: Any, kwargs: Any, result: Any) -> int:
    # What works in place costs what its twin does.
    product = flop_registry.get(getattr(torch.ops.aten, name.removesuffix("_"), None))
    if product is not None:
        return int(product(*args, **kwargs, out_val=result))
    if name == "_linear_pointwise":
        return 2 * read[0].numel() * read[1].shape[0]
    if name == "linalg_solve_triangular":
        return read[0].shape[-1] * read[1].numel()
    if name not in FACTORISATIONS or not read[0].numel():
        return 0
    *batch, rows, columns = read[0].shape
    return int(math.prod(batch) * FACTORISATIONS[name] * max(rows, columns) * min(rows, columns) ** 2)


def count(run: Callable[[], object]) -> Counts:
    """What a call does."""
    with Counter() as counter:
        run()
    return counter.counts


def count_watched(name: str) -> Counts:
    """What a method does with one of the problems of `WATCHED`, on a machine without units for bf16."""
    method, problem = WATCHED[name]
    models = problem.models()
    with patch("detune.problem.stack.multiplies_bfloat16", return_value=False):
        return count(lambda: METHODS[method](Stack.of(models)))


def stored() -> dict[str, Counts]:
    """The counts of `WATCHED` as they were when they were last looked at."""
    return {name: Counts(**counts) for name, counts in json.loads(STORED.read_text()).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", action="store_true", help="take today's counts for the ones to hold to")
    store = parser.parse_args().store
    before = stored() if STORED.is_file() else {}
    found = {name: count_watched(name) for name in WATCHED}
    for name, counts in found.items():
        then = before.get(name, counts)
        print(
            f"{name:42} {counts.flops / 1e9:7.3f} GFLOP ({counts.flops / max(1, then.flops):.3f} of the stored) "
            f"{counts.bytes / 1e6:7.0f} MB touched ({counts.bytes / then.bytes:.3f})"
        )
    if store:
        STORED.write_text(json.dumps({name: asdict(counts) for name, counts in found.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
