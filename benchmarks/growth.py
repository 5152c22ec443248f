"""How do time, memory and operations grow with the size d, the rank r, the number of models n and the layers?

Random bf16 merges, deltas of 1 % of the weights; one of d, r, n and layers grows at a time. `auto` is without its
search for bits. An exponent is the slope of a least-squares line through the logarithms. Every point is a process of
its own; memory is the largest resident size beyond what the process held with torch and the models loaded. The last
block is `detune recover --method intersect` on whole checkpoints of 1024-wide layers, a matrix with deltas and two
without in each. Expected: time and operations at most quadratic in d (a matrix has d^2 entries), at most linear in r
and in layers, linear in n but for the products with the joint span; memory the same for any number of layers.

    python benchmarks/growth.py [PNG]
"""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from counting import METHODS, Problem, count
from safetensors.torch import save_file

from detune.problem import Stack

SERIES = {
    "d": [Problem(d, d, 16, 3) for d in (1152, 1536, 2048, 3072, 4096)],
    "r": [Problem(2048, 2048, r, 3) for r in (8, 16, 32, 64, 128)],
    "n": [Problem(2048, 2048, 16, n) for n in (3, 5, 7, 9, 13)],
}
LAYERS = (1, 2, 4, 8, 16)
LAYER_SIZE = 1024
REPEATS = 3
PLOTTED = {"seconds": "seconds", "memory_bytes": "memory", "flops": "operations", "touched_bytes": "bytes touched"}


@dataclass(frozen=True)
class Point:
    """What one size costs.

    Attributes:
        method: The solver, or `recover` for a whole checkpoint.
        grows: What grows.
        size: How large it is here.
        seconds: Least wall time of a few runs.
        memory_bytes: Largest resident size over that before.
        flops: Operations of products and factorisations; None is not counted.
        touched_bytes: Bytes that operations read and wrote; None is not counted.
    """

    method: str
    grows: str
    size: int
    seconds: float
    memory_bytes: int
    flops: int | None = None
    touched_bytes: int | None = None


def measure(method: str, grows: str, at: int) -> Point:
    """One solver and the judgement of its answer, on one problem, in this process."""
    torch.set_num_threads(1)
    problem = SERIES[grows][at]
    models, work = problem.models(), METHODS[method]
    # Forget the peak of making the problem.
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    seconds = math.inf
    for _ in range(REPEATS):
        began = time.perf_counter()
        work(Stack.of(models))
        seconds = min(seconds, time.perf_counter() - began)
    memory = _resident("VmHWM") - before
    counts = count(lambda: work(Stack.of(models)))
    size = {"d": problem.out, "r": problem.rank, "n": problem.n}[grows]
    return Point(method, grows, size, seconds, memory, counts.flops, counts.bytes)


def _resident(what: str) -> int:
    """A line of `/proc/self/status`, in bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


def solver_points() -> Iterator[Point]:
    """A process for each, which starts with little memory."""
    for grows, problems in SERIES.items():
        for method in ("intersect, certified", "auto, certified"):
            for at in range(len(problems)):
                command = [sys.executable, __file__, "--one", method, grows, str(at)]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=_environment())
                yield Point(**json.loads(output.stdout))


def layer_points() -> Iterator[Point]:
    """`detune recover` on checkpoints of more and more layers."""
    folder = Path(tempfile.mkdtemp(prefix="detune-growth-"))
    deltas = Problem(LAYER_SIZE, LAYER_SIZE, 16, 3).models()
    try:
        for layers in LAYERS:
            for i, W_i in enumerate(deltas):
                tensors = {}
                for layer in range(layers):
                    tensors[f"layers.{layer}.q.weight"] = W_i.clone()
                    tensors |= {f"layers.{layer}.{name}.weight": deltas[0].clone() for name in ("up", "down")}
                (folder / str(i)).mkdir(exist_ok=True)
                save_file(tensors, folder / str(i) / "model.safetensors", metadata={"format": "pt"})
            seconds, memory = math.inf, 0
            for _ in range(REPEATS):
                shutil.rmtree(folder / "out", ignore_errors=True)
                models = [str(folder / str(i)) for i in range(len(deltas))]
                command = [sys.executable, "-m", "detune", "recover", *models, "--out", str(folder / "out")]
                began = time.perf_counter()
                process = subprocess.Popen(
                    [*command, "--method", "intersect"], stdout=subprocess.DEVNULL, env=_environment()
                )
                _, status, usage = os.wait4(process.pid, 0)
                if status:
                    raise SystemExit(f"failed: {command}")
                seconds = min(seconds, time.perf_counter() - began)
                memory = max(memory, usage.ru_maxrss * 1024)
            yield Point("recover", "layers", layers, seconds, memory)
    finally:
        shutil.rmtree(folder)


def _environment() -> dict[str, str]:
    # Memory that was freed goes back at once, so that it is not counted.
    return {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}


def exponent(points: list[Point], what: str) -> float | None:
    """The slope of a line through the logarithms."""
    values = [getattr(point, what) for point in points]
    if None in values:
        return None
    return float(np.polyfit(np.log([point.size for point in points]), np.log(values), 1)[0])


def table(series: list[list[Point]]) -> None:
    """Print the points and the exponents."""
    print(f"{'method':9} {'grows':6} {'size':>5} {'seconds':>8} {'memory MB':>10} {'GFLOP':>8} {'touched MB':>11}")
    for points in series:
        for point in points:
            counted = "" if point.flops is None else f"{point.flops / 1e9:8.2f} {point.touched_bytes / 1e6:11.0f}"
            print(
                f"{point.method:9} {point.grows:6} {point.size:5} {point.seconds:8.3f} "
                f"{point.memory_bytes / 1e6:10.0f} {counted}"
            )
        fitted = [exponent(points, what) for what in PLOTTED]
        shown = ["" if value is None else f"{value:.2f}" for value in fitted]
        print(f"{'':9} exponent     {shown[0]:>8} {shown[1]:>10} {shown[2]:>8} {shown[3]:>11}")


def draw(series: list[list[Point]], path: Path) -> None:
    """A panel for each measure, a line for each series, everything relative to its first point."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(PLOTTED), figsize=(4 * len(PLOTTED), 5), constrained_layout=True)
    for axis, (what, title) in zip(axes, PLOTTED.items(), strict=True):
        for points in series:
            values = [getattr(point, what) for point in points]
            if None not in values:
                slope = exponent(points, what)
                first = points[0]
                axis.loglog(
                    [point.size / first.size for point in points],
                    [value / values[0] for value in values],
                    marker="o",
                    linestyle="--" if first.method.startswith("auto") else "-",
                    label=f"{first.method}, {first.grows}: {slope:.2f}",
                )
        axis.set(title=f"{title} (exponent)", xlabel="size, relative to the smallest")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    figure.savefig(path, dpi=120)


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        method, grows, at = sys.argv[2:]
        print(json.dumps(asdict(measure(method, grows, int(at)))))
        return
    points = [*solver_points(), *layer_points()]
    series: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        series.setdefault((point.method, point.grows), []).append(point)
    print("one thread; least time of three runs")
    table(list(series.values()))
    if sys.argv[1:]:
        draw(list(series.values()), Path(sys.argv[1]))


if __name__ == "__main__":
    main()
