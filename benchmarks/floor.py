"""How far is a recovery from what the machine allows? The bytes and operations that must be, at this machine's rates.

The attention matrices of Mistral-7B-sized layers, bf16 merges of r=64, `intersect`. For each stage the floor is the
longer of two times: the bytes that must move at the rate of a memory copy (or of a file read or written again, from the
page cache), and the operations that must be done at the rate of a large matrix product. What must be:

- read: every stored byte once;
- sketch: the stored matrices once more; test vectors, as many as the two ranks, through folded rows, forth and back;
- solve: float64 products and factorisations of the bases;
- final step: the stored matrices once more, and the answer; one product with every model's row space, and one back;
- write: the answer in float32 once, and in bf16.

    python benchmarks/floor.py [--models N] [--threads N]
"""

import argparse
import math
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from counting import Counts, Problem, count
from safetensors.torch import save_file

from detune.checkpoints import CheckpointWriter, open_checkpoint
from detune.fitting.differences import FOLDED_ROWS, find_differences
from detune.fitting.least_squares import w_step_given_rows
from detune.fitting.subspaces import find_spaces
from detune.numerics.linalg import product
from detune.problem import Stack

RANK = 64
SHAPES = {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096)}
STAGES = ("read", "sketch", "solve", "final step", "write")
REPEATS = 5


@dataclass(frozen=True)
class Ceilings:
    """This machine's rates: bytes a second (copies read and write: both count), operations a second."""

    copy: float
    read: float
    write: float
    float32: float
    float64: float

    @classmethod
    def measured(cls, folder: Path) -> "Ceilings":
        """The best of a few runs of each."""
        values = torch.randn(1 << 25)
        copied = torch.empty_like(values)
        path = folder / "ceiling"
        memory = memoryview(values.numpy()).cast("B")
        block = bytearray(1 << 24)

        def write() -> None:
            with path.open("wb", buffering=0) as file:
                for start in range(0, len(memory), len(block)):
                    file.write(memory[start : start + len(block)])

        def read() -> None:
            with path.open("rb", buffering=0) as file:
                while file.readinto(block):
                    pass

        write_seconds = least_seconds(write)
        read_seconds = least_seconds(read)
        rates = []
        for dtype in (torch.float32, torch.float64):
            A = torch.randn(2048, 2048, dtype=dtype)
            rates.append(2 * 2048**3 / least_seconds(lambda A=A: product(A, A)))
        path.unlink()
        return cls(
            2 * values.nbytes / least_seconds(lambda: copied.copy_(values)),
            values.nbytes / read_seconds,
            values.nbytes / write_seconds,
            *rates,
        )


@dataclass
class Stage:
    """What a stage must do, did and took, over all matrices.

    Attributes:
        must: Bytes and operations that no method of this kind does without.
        floor_seconds: The time that those take at the ceilings.
        seconds: The time it took.
        did: Operations and bytes of tensors, as counted.
    """

    must: Counts = field(default_factory=lambda: Counts(0, 0))
    floor_seconds: float = 0.0
    seconds: float = 0.0
    did: Counts = field(default_factory=lambda: Counts(0, 0))

    def add(self, must: Counts, floor_seconds: float, seconds: float, did: Counts) -> None:
        """Take in a matrix."""
        self.must = _sum(self.must, must)
        self.did = _sum(self.did, did)
        self.floor_seconds += floor_seconds
        self.seconds += seconds


def _sum(a: Counts, b: Counts) -> Counts:
    return Counts(a.flops + b.flops, a.bytes + b.bytes)


def least_seconds(run: Callable[[], object]) -> float:
    """The least time of a few runs."""
    least = math.inf
    for _ in range(REPEATS):
        began = time.perf_counter()
        run()
        least = min(least, time.perf_counter() - began)
    return least


def required(out: int, columns: int, n: int) -> dict[str, Counts]:
    """What each stage must do for one matrix."""
    entries, pairs = out * columns, n if n % 2 else n + 1
    rows = min(out, FOLDED_ROWS[torch.bfloat16])
    through = 2 * rows * columns * 2 * RANK
    # A pair's basis from its sketch, and a model's space from two of those: Gram matrices and products, thrice each.
    bases = pairs * 3 * 2 * columns * (2 * RANK) ** 2 // 2 + n * 3 * 2 * columns * 2 * RANK * RANK
    return {
        "read": Counts(0, 2 * n * entries),
        "sketch": Counts((n - 1 + pairs) * through, 2 * n * entries),
        "solve": Counts(bases, 0),
        "final step": Counts(4 * entries * n * RANK, 2 * n * entries + 4 * entries),
        "write": Counts(0, 6 * entries),
    }


def floors(must: dict[str, Counts], ceilings: Ceilings, entries: int) -> dict[str, float]:
    """The time of each stage at the ceilings."""
    return {
        "read": must["read"].bytes / ceilings.read,
        "sketch": max(must["sketch"].bytes / ceilings.copy, must["sketch"].flops / ceilings.float32),
        "solve": must["solve"].flops / ceilings.float64,
        "final step": max(must["final step"].bytes / ceilings.copy, must["final step"].flops / ceilings.float32),
        "write": must["write"].bytes / ceilings.copy + 2 * entries / ceilings.write,
    }


def measure(folder: Path, n: int, ceilings: Ceilings) -> dict[str, Stage]:
    """Every stage on every matrix of one layer."""
    stages = {name: Stage() for name in STAGES}
    for name, (out, columns) in SHAPES.items():
        for i, W_i in enumerate(Problem(out, columns, RANK, n).models()):
            (folder / str(i)).mkdir(exist_ok=True)
            save_file({name: W_i}, folder / str(i) / "model.safetensors", metadata={"format": "pt"})
        checkpoints = [open_checkpoint(folder / str(i)) for i in range(n)]
        tensors = [checkpoint.read(name) for checkpoint in checkpoints]
        # A stack remembers its noise: a new one for every run.
        differences = find_differences(Stack.of(tensors))
        spaces = find_spaces(differences)
        answer = w_step_given_rows(spaces.stack, spaces.bases)

        def write(checkpoints=checkpoints, name=name, answer=answer) -> None:
            shutil.rmtree(folder / "out", ignore_errors=True)
            with CheckpointWriter(checkpoints[0], folder / "out") as writer:
                writer.write(name, answer.weight)

        runs: dict[str, Callable[[], object]] = {
            "read": lambda c=checkpoints, name=name: [checkpoint.read(name) for checkpoint in c],
            "sketch": lambda tensors=tensors: find_differences(Stack.of(tensors)),
            "solve": lambda differences=differences: find_spaces(differences),
            "final step": lambda spaces=spaces: w_step_given_rows(spaces.stack, spaces.bases),
            "write": write,
        }
        must = required(out, columns, n)
        floor = floors(must, ceilings, out * columns)
        for stage, run in runs.items():
            did = count(run) if stage in ("sketch", "solve", "final step") else must[stage]
            stages[stage].add(must[stage], floor[stage], least_seconds(run), did)
    return stages


def report(stages: dict[str, Stage], ceilings: Ceilings, n: int, threads: int) -> None:
    """Print the page."""
    print(f"{threads} thread(s): copy {ceilings.copy / 1e9:.1f} GB/s (read + write), ", end="")
    print(f"file read {ceilings.read / 1e9:.1f} GB/s, file write {ceilings.write / 1e9:.1f} GB/s, ", end="")
    print(f"product {ceilings.float32 / 1e9:.0f} GFLOP/s in float32, {ceilings.float64 / 1e9:.0f} in float64")
    shapes = ", ".join(f"{name} {out}x{columns}" for name, (out, columns) in SHAPES.items())
    print(f"one layer: {shapes}; r={RANK}, n={n}")
    print("            must: MB  GFLOP  floor s | did: GFLOP  touched MB | measured s  measured / floor")
    for name, stage in stages.items():
        print(
            f"{name:10} {stage.must.bytes / 1e6:9.0f} {stage.must.flops / 1e9:6.1f} {stage.floor_seconds:8.3f} | "
            f"{stage.did.flops / 1e9:10.1f} {stage.did.bytes / 1e6:11.0f} | "
            f"{stage.seconds:10.3f} {stage.seconds / stage.floor_seconds:17.1f}"
        )
    floor, seconds = (sum(getattr(s, what) for s in stages.values()) for what in ("floor_seconds", "seconds"))
    print(f"{'all':10} {'':9} {'':6} {floor:8.3f} | {'':10} {'':11} | {seconds:10.3f} {seconds / floor:17.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = Path(tempfile.mkdtemp(prefix="detune-floor-"))
    try:
        ceilings = Ceilings.measured(folder)
        report(measure(folder, options.models, ceilings), ceilings, options.models, options.threads)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
