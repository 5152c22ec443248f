"""How fast is the closed form? One 4096x4096 matrix, r=64, n=3, against averaging and against the published method.

Expected: at least 300 times faster than 1000 iterations of Spectral DeTuning in its published form (full matrices,
`torch.svd_lowrank`, float32), and at most 2.5 times the time of averaging the three matrices in float32. Our own
methods compute float32 models in float64. Fewer iterations are scaled up: like the full run, they spend their second
half at the full rank.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from problems import error, random_problem, verdict

from detune import recover_matrix
from detune.methods import Spectral
from detune.problem import Stack

THREADS = 2


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Median wall time, after one run to warm up where there are several."""
    times = []
    for _ in range(repeats + (repeats > 1)):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return median(times[-repeats:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=1000, help="of Spectral DeTuning; fewer are scaled up")
    iterations = parser.parse_args().iterations
    torch.set_num_threads(THREADS)
    problem = random_problem(4096, 4096, 64, 3, relative_size=0.01)
    models = list(problem.models.unbind())
    published = Spectral(iterations=iterations, on_core=False)
    rows = {
        "average, torch.stack(models).mean(0)": seconds(lambda: torch.stack(models).mean(0), 9),
        "average, (W1 + W2 + W3) / 3": seconds(lambda: (models[0] + models[1] + models[2]) / 3, 9),
        "average, in place on one stacked tensor": seconds(lambda: problem.models.mean(0), 9),
        "intersect (closed form)": seconds(lambda: recover_matrix(models, "intersect"), 9),
        "auto (closed form, polished)": seconds(lambda: recover_matrix(models, "auto"), 5),
        f"spectral, published form, {iterations} iterations": seconds(
            lambda: published.solve(Stack.of(models, torch.float32), rank=64), 1
        ),
    }
    print(f"4096x4096, r=64, n=3, deltas 1 % of W, float32; {THREADS} threads; median seconds")
    average, closed = rows["average, (W1 + W2 + W3) / 3"], rows["intersect (closed form)"]
    for name, value in rows.items():
        print(f"{name:45} {value:8.3f} s {value / average:9.1f} x (W1 + W2 + W3) / 3")
    spectral = list(rows.values())[-1] * 1000 / iterations
    print(f"1000 iterations of spectral / closed form: {spectral / closed:.0f}, target at least 300")
    print(verdict("closed form / (W1 + W2 + W3) / 3", closed / average, 2.5))
    for method in ("mean", "intersect", "auto"):
        print(f"W-Error of {method}, stored: {error(recover_matrix(models, method).weight.float(), problem):.2f}")


if __name__ == "__main__":
    main()
