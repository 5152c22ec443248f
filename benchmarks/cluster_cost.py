"""What recovering a model of 8, 70 or 405 billion parameters costs, from rates measured on one core.

Three merges of one layer's q, k and gate projections (Mistral-7B's shapes, LoRA of rank 16 in all) are recovered in a
process of its own; its CPU time, of reading, hashing and writing too, is divided by the entries. Light deltas have a
thousandth of the weights' root mean square, about 0.13 units in the last place of bf16, as preference optimisation or a
short fine-tune leaves them; ordinary ones ten times that. The base is in bf16, whatever the merges are stored as. The
models are those of Llama 3 (arXiv 2407.21783, table 3) with every linear layer fine-tuned and embeddings shared, which
are only copied. What is not measured: the time of a network file system, which must give the bytes read, and workers
that wait for each other at the end. Matrices four times as wide are taken to cost the same for each entry. Needs 1.5 GB
of disk.
"""

import argparse
import math
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

RANK, N = 16, 3
SHAPES = {"k": (1024, 4096), "q": (4096, 4096), "gate": (14336, 4096)}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
METHODS = ("intersect", "auto")
DELTAS = {"light": 0.001, "ordinary": 0.01}  # of the weights' root mean square
CORES = 64


@dataclass(frozen=True)
class Architecture:
    """A decoder with grouped queries: 8 key-value heads of 128."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int = 128_256
    key_value: int = 1024

    @property
    def matrix_entries(self) -> int:
        """Of the linear layers."""
        attention = 2 * self.hidden * (self.hidden + self.key_value)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def shared_entries(self) -> int:
        """Of the embedding and the head."""
        return 2 * self.vocabulary * self.hidden

    @property
    def largest_entries(self) -> int:
        """Of the largest matrix that is solved."""
        return self.hidden * self.intermediate


MODELS = (
    Architecture("8B", 32, 4096, 14336),
    Architecture("70B", 80, 8192, 28672),
    Architecture("405B", 126, 16384, 53248),
)


@dataclass(frozen=True)
class Rate:
    """What one core needs.

    Attributes:
        cpu_seconds: For a billion entries.
        copies: Peak memory above the interpreter with torch, in float32 copies of the largest matrix.
    """

    cpu_seconds: float
    copies: float


def make(folder: Path, dtype: torch.dtype, relative_size: float, shapes: dict[str, tuple[int, int]]) -> list[Path]:
    """Write the merges."""
    paths = [folder / f"model-{i}" for i in range(N)]
    states: list[dict[str, torch.Tensor]] = [{} for _ in paths]
    generator = torch.Generator().manual_seed(0)
    for name, (rows, columns) in shapes.items():
        W = (torch.randn(rows, columns, generator=generator) / math.sqrt(columns)).bfloat16()
        for state in states:
            M = torch.randn(rows, RANK, generator=generator) @ torch.randn(RANK, columns, generator=generator)
            state[name] = (W.float() + M * (relative_size / math.sqrt(RANK * columns))).to(dtype)
    for path, state in zip(paths, states, strict=True):
        path.mkdir(parents=True)
        save_file(state, path / "model.safetensors")
    return paths


def recover(folder: str, method: str) -> None:
    """In a process of its own: recover, and print CPU seconds and the bytes of memory that came on top."""
    torch.set_num_threads(1)
    import detune

    # What is imported and compiled costs once.
    draw = torch.Generator().manual_seed(0)
    W = torch.randn(96, 96, generator=draw).bfloat16()
    deltas = [torch.randn(96, 2, generator=draw) @ torch.randn(2, 96, generator=draw) / 50 for _ in range(N)]
    detune.recover_matrix([(W.float() + M).bfloat16() for M in deltas], method)

    def peak() -> int:
        # Not getrusage: its peak is at first that of the process that started this one.
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])

    before, began = peak(), time.process_time()
    detune.recover(sorted(Path(folder).glob("model-*")), Path(folder) / f"out-{method}", method)
    print(time.process_time() - began, peak() - before)


def measure(folder: Path, method: str, repeats: int, shapes: dict[str, tuple[int, int]]) -> Rate:
    """The best of several runs."""
    entries = sum(map(math.prod, shapes.values()))
    rates = []
    for _ in range(repeats):
        shutil.rmtree(folder / f"out-{method}", ignore_errors=True)
        command = [sys.executable, __file__, "--recover", str(folder), method]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        cpu_seconds, more_bytes = map(float, printed.split()[-2:])
        largest_bytes = 4 * max(map(math.prod, shapes.values()))
        rates.append(Rate(cpu_seconds / entries * 1e9, more_bytes / largest_bytes))
    return min(rates, key=lambda rate: rate.cpu_seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="a part of them")
    parser.add_argument("--recover", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.recover:
        recover(*arguments.recover)
        return
    shapes = {name: SHAPES[name] for name in arguments.shapes.split(",")}
    print(f"{N} merges of rank {RANK}; {CORES} cores at work, and a file system that keeps up with them\n")
    print("model  stored as  deltas   method     read      written  core hours    hours  GB/s read  memory a worker")
    for name, dtype in DTYPES.items():
        for deltas, relative_size in DELTAS.items():
            with tempfile.TemporaryDirectory() as folder:
                make(Path(folder), dtype, relative_size, shapes)
                for method in METHODS:
                    show((name, deltas, method), dtype, measure(Path(folder), method, arguments.repeats, shapes))


def show(case: tuple[str, str, str], dtype: torch.dtype, rate: Rate) -> None:
    """A row for each model; the case is how the models are stored, their deltas, the method."""
    stored, deltas, method = case
    for model in MODELS:
        entries = model.matrix_entries + model.shared_entries
        # Once to solve, and once for the hashes in the report.
        read_bytes = 2 * N * entries * dtype.itemsize
        core_hours = rate.cpu_seconds * model.matrix_entries / 1e9 / 3600
        hours = core_hours / CORES
        print(
            f"{model.name:6} {stored:10} {deltas:8} {method:10} {read_bytes / 1e12:5.2f} TB"
            f"  {entries * dtype.itemsize / 1e12:5.3f} TB {core_hours:11.1f} {hours:8.3f}"
            f" {read_bytes / 1e9 / hours / 3600:10.1f}  {rate.copies * 4 * model.largest_entries / 1e9:12.1f} GB"
        )
    print(
        f"       measured: {rate.cpu_seconds:.0f} core seconds a billion entries, {rate.copies:.1f} copies\n",
        flush=True,
    )


if __name__ == "__main__":
    main()
