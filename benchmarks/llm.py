"""A real language model, SmolLM2-135M-Instruct: its bits, what they cost, and whether the certificate is right.

`models`: three and five LoRAs of different ranks and targets, merged by PEFT (`llm_models.py`). Light deltas are 0.05
to 0.3 units in the last place of bf16, ordinary ones ten times as large, heavy ones thirty times.
Core seconds are processor time of all threads, reading and writing included. `bits` is the share of entries that are
the base's, over the matrices that some model changed; `vote` that of the entrywise median of the models; `limit` that
of the grid point in the middle of the models' rounding intervals when all `M_i` are known; `fitted` the same with `M_i`
from the truncated SVD of `W_i - W`, least squares that knows the base. `in range` is the share of matrices whose true
W-Error is where the certificate says; `exact` how many it calls the base's own bits, and how many of these are not.

`random`: large random matrices, r=16, n=3. `more`: sets with one model more, against the three without it.
`family`: six models: A, B, C, D with two more tokens, D's LoRA on B's merge, and a light full fine-tune.

    python benchmarks/llm.py [--only PART,...] [--matrices K] [--methods auto,intersect] ...

Expected: bits above the vote everywhere; `auto` at most ten times the core seconds of `intersect`, and at most 500 a
billion entries; in range in 95 % of the matrices; no exact matrix wrong; one model more costs at most 0.1 of W-Error.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from llm_models import (
    DTYPES,
    STRENGTHS,
    Change,
    changes,
    fully_tuned,
    merged,
    merged_twice,
    with_added_tokens,
)
from minilm import merged_models
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import detune
from detune.demo.train import base_model
from detune.metrics import bit_identical, w_error

SETS = {3: "ABC", 5: "ABCDE"}
RANK = 16
PARTS = ("models", "random", "more", "family")


@dataclass(frozen=True)
class Measured:
    """One method on one set of models.

    Attributes:
        seconds: Processor time.
        rows: The report's, of the matrices that some model changed.
        weights: What was written, by name.
    """

    seconds: float
    rows: tuple[detune.TensorResult, ...]
    weights: Mapping[str, Tensor]


def models(options: argparse.Namespace) -> None:
    """The language model, by strength, dtype, number of models and method."""
    print(
        f"{'':8} {'':7} {'':1} {'':9} {'core':>7} {'s per':>6}\n"
        f"{'deltas':8} {'merges':7} n {'method':9} {'seconds':>7} {'1e9':>6} {'bits':>7} {'vote':>7} {'limit':>7} "
        f"{'fitted':>7} {'W-Error':>7} {'in range':>9} {'exact':>12}"
    )
    for strength in options.strengths:
        for dtype in options.dtypes:
            for n in options.n:
                known = sample(changes(list(SETS[n])), options.matrices)
                paths = [merged(name, strength, dtype) for name in SETS[n]]
                with tempfile.TemporaryDirectory() as folder:
                    parts = [excerpt(path, known, Path(folder) / f"{i}.safetensors") for i, path in enumerate(paths)]
                    states = [load_file(part) for part in parts]
                    stacks = {name: [state[name] for state in states] for name in known}
                    given = bounds(known, stacks, STRENGTHS[strength])
                    for method in options.methods:
                        found = recover(parts, Path(folder) / method, method)
                        print(f"{strength:8} {dtype:7} {n} {method:9} {summary(found, known, given)}", flush=True)


def sample(known: Mapping[str, Change], count: int | None) -> dict[str, Change]:
    """Some matrices, from all depths and of all kinds; those that no adapter changes are no part of it."""
    changed = {name: change for name, change in known.items() if any(change.ranks.values())}
    if count is None or count >= len(changed):
        return changed
    names = list(changed)
    return {names[(i * len(names)) // count]: changed[names[(i * len(names)) // count]] for i in range(count)}


def excerpt(model: Path, names: Mapping[str, Change], out: Path) -> Path:
    """A checkpoint with some of a model's tensors."""
    with safe_open(model / "model.safetensors", "pt") as file:
        save_file({name: file.get_tensor(name) for name in names}, out)
    return out


def recover(parts: Sequence[Path], out: Path, method: str) -> Measured:
    """What `detune recover` does, and its processor time."""
    began = time.process_time()
    report = detune.recover(parts, out, method)
    seconds = time.process_time() - began
    (file,) = out.glob("*.safetensors")
    return Measured(seconds, tuple(row for row in report.tensors if row.verdict != "shared"), load_file(file))


@dataclass(frozen=True)
class Bounds:
    """Shares of the base's bits that need no method, or know what none can; None where they say nothing."""

    vote: float
    limit: float | None
    fitted: float | None


def bounds(known: Mapping[str, Change], stacks: Mapping[str, list[Tensor]], factor: float) -> Bounds:
    """Over all matrices, by entries."""
    vote, limit, fitted, entries = 0, 0, 0, 0
    for name, stack in stacks.items():
        W = known[name].W
        entries += W.numel()
        vote += int(torch.stack(stack).double().median(dim=0).values.to(W.dtype).eq(W).sum())
        if stack[0].dtype != torch.float32:
            deltas = [factor * M for M in known[name].deltas.values()]
            ranks = known[name].ranks.values()
            squares = [truncated(W_i.double() - W.double(), rank) for W_i, rank in zip(stack, ranks, strict=True)]
            limit += int(middle(stack, deltas, W.dtype).eq(W).sum())
            fitted += int(middle(stack, squares, W.dtype).eq(W).sum())
    return Bounds(vote / entries, limit / entries or None, fitted / entries or None)


def truncated(difference: Tensor, rank: int) -> Tensor:
    """The nearest matrix of a rank."""
    U, S, Vh = torch.linalg.svd(difference, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def middle(stack: Sequence[Tensor], deltas: Sequence[Tensor], grid: torch.dtype) -> Tensor:
    """The grid point next to the middle of what all roundings allow."""
    low, high = [], []
    for W_i, M_i in zip(stack, deltas, strict=True):
        ends = [torch.nextafter(W_i, torch.full_like(W_i, sign * math.inf)).double() for sign in (-1, 1)]
        low.append((W_i.double() + ends[0]) / 2 - M_i)
        high.append((W_i.double() + ends[1]) / 2 - M_i)
    return ((torch.stack(low).amax(dim=0) + torch.stack(high).amin(dim=0)) / 2).to(grid)


def summary(found: Measured, known: Mapping[str, Change], given: Bounds) -> str:
    """A row's figures."""
    entries = sum(known[row.name].W.numel() for row in found.rows)
    same, inside, ranged, exact, wrong = 0.0, 0, 0, 0, 0
    errors = []
    for row in found.rows:
        weight, W = found.weights[row.name], known[row.name].W
        error = w_error(weight, W)
        if math.isfinite(error):
            errors.append(error)
        same += float(bit_identical(weight.to(W.dtype), W)) * W.numel()
        if row.verdict == "exact":
            exact += 1
            wrong += math.isfinite(error)
        if row.verdict == "exact" or row.worst_w_error is not None:
            ranged += 1
            inside += within(row, error)
    in_range = f"{100 * inside / ranged:.1f} %" if ranged else "none told"
    shares = (same / entries, given.vote, given.limit, given.fitted)
    columns = " ".join(f"{100 * share:5.2f} %" if share is not None else f"{'':7}" for share in shares)
    return (
        f"{found.seconds:7.1f} {found.seconds / entries * 1e9:6.0f} {columns} "
        f"{fmean(errors) if errors else -math.inf:7.2f} {in_range:>9} {exact:3} ({wrong} wrong)"
    )


def within(row: detune.TensorResult, error: float) -> bool:
    """Whether a true W-Error is where the certificate says."""
    if row.verdict == "exact":
        return math.isinf(error)
    return (row.best_w_error is None or error >= row.best_w_error) and error <= row.worst_w_error


def random(options: argparse.Namespace) -> None:
    """Random bf16 matrices: what the default costs at any size of the deltas."""
    print(f"{'size':>5} {'deltas':>6} {'method':9} {'core s':>7} {'s per 1e9':>9} {'/ intersect':>11} {'bits':>7}")
    for size in options.sizes:
        for delta in options.deltas:
            W, stack = draw(size, delta, options.n[0])
            first = None
            for method in ("intersect", *(method for method in options.methods if method != "intersect")):
                began = time.process_time()
                recovery = detune.recover_matrix(stack, method)
                seconds = time.process_time() - began
                first = first or seconds
                bits = bit_identical(recovery.weight.to(W.dtype), W)
                print(
                    f"{size:5} {delta:6g} {method:9} {seconds:7.1f} {seconds / W.numel() * 1e9:9.0f} "
                    f"{seconds / first:11.1f} {100 * bits:5.2f} %",
                    flush=True,
                )


def draw(size: int, delta: float, n: int, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """A base and its merges; the deltas' rms in units in the last place at the base's rms."""
    generator = torch.Generator().manual_seed(seed)
    W = (0.02 * torch.randn(size, size, generator=generator)).bfloat16()
    unit = 2.0 ** (math.floor(math.log2(0.02)) - 7)
    stack = []
    for _ in range(n):
        B, A = torch.randn(size, RANK, generator=generator), torch.randn(RANK, size, generator=generator)
        stack.append(torch.addmm(W.float(), B, A, alpha=delta * unit / math.sqrt(RANK)).bfloat16())
    return W, stack


def more(options: argparse.Namespace) -> None:
    """One model more, against the three without it."""
    print(f"{'base':12} {'merges':8} {'with':20} {'W-Error':>8} {'core s':>7} {'against the three':>18}")
    for name, dtype, problems in bases(options.matrices or 8):
        without: tuple[float, float] | None = None
        for extra in (
            "nothing",
            *(extra for extra, _ in EXTRAS.items() if extra != EARLY or "A-early" in problems[0][1]),
        ):
            errors, began = [], time.process_time()
            for W, deltas in problems:
                stack = [(W.double() + deltas[key]).to(dtype) for key in "ABC"]
                if extra != "nothing":
                    stack.append(EXTRAS[extra](W.double(), deltas, dtype))
                weight = detune.recover_matrix(stack, options.methods[0]).weight
                errors.append(max(w_error(weight.to(dtype), W), EXACT))
            seconds = time.process_time() - began
            error = fmean(errors)
            without = without or (error, seconds)
            against = f"{error - without[0]:+.2f}, {seconds / without[1]:.1f} times"
            print(f"{name:12} {str(dtype)[6:]:8} {extra:20} {error:8.2f} {seconds:7.1f} {against:>18}", flush=True)


EXACT = -20.0  # what an exact matrix counts as
EARLY = "A's earlier step"
EXTRAS = {
    "A at 0.7": lambda W, M, dtype: (W + 0.7 * M["A"]).to(dtype),
    EARLY: lambda W, M, dtype: (W + M["A-early"]).to(dtype),
    "A in bf16": lambda W, M, dtype: (W + M["A"]).bfloat16(),
    "half A, half B": lambda W, M, dtype: (W + (M["A"] + M["B"]) / 2).to(dtype),
    "D on half of A": lambda W, M, dtype: (W + M["A"] / 2 + M["D"]).to(dtype),
    "D": lambda W, M, dtype: (W + M["D"]).to(dtype),
}


def bases(count: int) -> Iterator[tuple[str, torch.dtype, list[tuple[Tensor, dict[str, Tensor]]]]]:
    """Bases with deltas that were trained, in the dtype of their merges."""
    known = {
        name: change for name, change in changes(["A", "B", "C", "D", "A-early"]).items() if all(change.ranks.values())
    }
    smollm = [(change.W, {k: 10 * M for k, M in change.deltas.items()}) for change in sample(known, count).values()]
    yield "SmolLM2-135M", torch.float32, smollm
    yield "SmolLM2-135M", torch.bfloat16, smollm
    base = load_file(Path(base_model()) / "model.safetensors")
    models = [load_file(path / "model.safetensors") for path in merged_models(4)]
    names = [name for name in base if name.endswith(("query.weight", "value.weight"))][:count]
    problems = []
    for name in names:
        W = base[name].double()
        # Without the rounding of the merge, which a second one would not repeat.
        deltas = {key: truncated(M[name].double() - W, RANK) for key, M in zip("ABCD", models, strict=True)}
        problems.append((base[name], deltas))
    yield "MiniLM", torch.float32, problems


def family(options: argparse.Namespace) -> None:
    """Six light models, and how long reading them takes."""
    paths = [*(merged(name, "light", "bf16") for name in "ABC"), with_added_tokens(), merged_twice(), fully_tuned()]
    began = time.process_time()
    size = sum(len((path / "model.safetensors").read_bytes()) for path in paths)
    reading = time.process_time() - began
    began = time.process_time()
    kinship = detune.check_family(paths)
    seconds = time.process_time() - began
    for relative in kinship.models:
        print(f"  {Path(relative.spec).name:10} {relative.reason}")
    print(f"  {kinship.verdict}")
    print(f"{len(paths)} models, {size / 1e9:.1f} GB: {seconds:.1f} core seconds; reading alone {reading:.1f}")


def main() -> None:
    def listed(convert: Callable[[str], object] = str) -> Callable[[str], list[object]]:
        return lambda text: [convert(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=listed(), default=list(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--matrices", type=int, help="so many, from all depths; all otherwise")
    parser.add_argument("--methods", type=listed(), default=["auto", "intersect"])
    parser.add_argument("--strengths", type=listed(), default=list(STRENGTHS))
    parser.add_argument("--dtypes", type=listed(), default=list(DTYPES))
    parser.add_argument("--n", type=listed(int), default=list(SETS))
    parser.add_argument("--sizes", type=listed(int), default=[2048, 4096])
    parser.add_argument("--deltas", type=listed(float), default=[0.05, 0.1, 0.3, 1.0, 3.0, 10.0])
    options = parser.parse_args()
    if unknown := set(options.only) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}: expected {', '.join(PARTS)}")
    for method in options.methods:
        # What is imported and compiled costs once.
        detune.recover_matrix(draw(96, 3.0, 3)[1], method)
    for part in options.only:
        print(f"\n{part}", flush=True)
        {"models": models, "random": random, "more": more, "family": family}[part](options)


if __name__ == "__main__":
    main()
