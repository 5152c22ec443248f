"""How close does a GPU come to the time that copying the models to it takes? Three bf16 models of one matrix.

The models are in main memory, as `recover` reads them. Every pass over them costs at least their bytes over the
bandwidth of a pinned copy: times are given in such copies. Finding the ranks is one pass, the closed form two or three.
The difference from the CPU's answer is in units of the deltas' root mean square.

Expected: finding the ranks of 4096x14336 takes at most twice as long as copying the models once. Without a GPU nothing
is measured, and that is what is printed.
"""

import time
from collections.abc import Callable
from functools import partial

import torch
from problems import random_problem, verdict
from torch import Tensor

from detune import recover_matrix
from detune.fitting.differences import find_differences
from detune.problem import Stack

SHAPES = ((1024, 4096), (4096, 4096), (4096, 14336))
RANK, MODELS, REPEATS = 64, 3, 7
METHODS = ("mean", "intersect", "auto")


def main() -> None:
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was measured")
        return
    print(f"{torch.cuda.get_device_name()}; {MODELS} bf16 models, r={RANK}; best of {REPEATS}")
    print(f"{'shape':>11} {'':>9} {'seconds':>9} {'copies a time':>13} {'difference':>10}")
    for shape in SHAPES:
        measure(shape)


def measure(shape: tuple[int, int]) -> None:
    problem = random_problem(*shape, RANK, MODELS, relative_size=0.1, dtype=torch.bfloat16)
    models = list(problem.models)
    copy = seconds(partial(upload_whole, [W_i.pin_memory() for W_i in models]))
    bandwidth = problem.models.numel() * problem.models.element_size() / copy / 1e9
    name = "x".join(map(str, shape))
    print(f"{name:>11} {'copy':>9} {copy:9.4f} {1:13.2f} {'':10} {bandwidth:.1f} GB/s")
    ranks = seconds(lambda: find_differences(Stack.of(models, device="cuda")))
    print(f"{'':11} {'ranks':>9} {ranks:9.4f} {ranks / copy:13.2f}")
    size = float((problem.models.double() - problem.W.double()).square().mean().sqrt())
    for method in METHODS:
        there = seconds(partial(recover_matrix, models, method, device="cuda"))
        ours, theirs = (recover_matrix(models, method, device=device).weight for device in ("cuda", "cpu"))
        difference = float((ours.cpu().double() - theirs.double()).square().mean().sqrt()) / size
        print(f"{'':11} {method:>9} {there:9.4f} {there / copy:13.2f} {difference:10.1e}")
    if shape == SHAPES[-1]:
        print(verdict("finding the ranks / copying the models once", ranks / copy, 2.0))


def upload_whole(pinned: list[Tensor]) -> list[Tensor]:
    return [W_i.to("cuda", non_blocking=True) for W_i in pinned]


def seconds(run: Callable[[], object]) -> float:
    """The best wall time, to the end of the device's work, after one run to warm up."""
    times = []
    for _ in range(REPEATS + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])


if __name__ == "__main__":
    main()
