"""A whole checkpoint of Mistral-7B-sized layers in bf16: time and memory against a plain average by the same I/O.

Four layers made at random; q, k, v, o fine-tuned with r=64; n=3. Expected: `recover` takes at most 1.5 times the time
of `--method mean`, as whole processes, and at most the interpreter with torch plus 8 times the largest tensor in
float32. The runs alternate; needs 10 GB of disk.
"""

import argparse
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from problems import verdict
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE, KEY_VALUE, RANK = 4096, 14336, 1024, 64
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEY_VALUE, HIDDEN),
    "self_attn.v_proj": (KEY_VALUE, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
THREADS = "2"


def make(folder: Path, layers: int, n: int) -> None:
    """Write the base and its n merges."""
    torch.manual_seed(0)
    base = {
        f"model.layers.{layer}.{name}.weight": (torch.randn(shape) / math.sqrt(shape[1])).to(torch.bfloat16)
        for layer in range(layers)
        for name, shape in SHAPES.items()
    }
    save(base, folder / "base")
    for i in range(n):
        model = dict(base)
        for name, W in base.items():
            if "self_attn" in name:
                out, columns = W.shape
                M = torch.randn(out, RANK) @ torch.randn(RANK, columns)
                # rms of the delta: 1 % of that of W.
                model[name] = (W.float() + M * (0.01 / math.sqrt(RANK * columns))).to(torch.bfloat16)
        save(model, folder / f"model-{i}")


def save(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """An ordinary checkpoint directory."""
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral"}))


def run(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak memory in MB of a process."""
    began = time.perf_counter()
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": THREADS}, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {command}")
    return time.perf_counter() - began, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="detune-bench-"))
    try:
        # In a process of its own: a child's peak memory counts from what its parent held when it was started.
        maker = multiprocessing.get_context("spawn").Process(target=make, args=(folder, options.layers, options.models))
        maker.start()
        maker.join()
        models = [str(folder / f"model-{i}") for i in range(options.models)]
        detune = [sys.executable, "-m", "detune"]
        measured: dict[str, list[tuple[float, float]]] = {"mean": [], "auto": []}
        for _ in range(options.repeats):
            for method, runs in measured.items():
                shutil.rmtree(folder / method, ignore_errors=True)
                out = ["--out", str(folder / method), "--method", method]
                runs.append(run([*detune, "recover", *models, *out]))
        torch_alone = run([sys.executable, "-c", "import torch"])[1]
        report(options, folder, measured, torch_alone)
    finally:
        shutil.rmtree(folder)


def report(
    options: argparse.Namespace, folder: Path, measured: dict[str, list[tuple[float, float]]], torch_alone: float
) -> None:
    """Print what was measured."""
    size = (folder / "base" / "model.safetensors").stat().st_size
    print(
        f"{options.layers} layers, {options.models} models of {size / 1e9:.2f} GB in bf16, {THREADS} threads, ", end=""
    )
    print(f"median of {options.repeats} alternating runs, files in the page cache")
    seconds = {method: median(time for time, _ in runs) for method, runs in measured.items()}
    peak = {method: max(memory for _, memory in runs) for method, runs in measured.items()}
    for method in measured:
        print(f"{method:5} {seconds[method]:7.2f} s   peak {peak[method]:6.0f} MB")
    ratios = sorted(auto[0] / mean[0] for auto, mean in zip(measured["auto"], measured["mean"], strict=True))
    print(f"time auto / mean from {ratios[0]:.2f} to {ratios[-1]:.2f}; ", end="")
    print(verdict("median", median(ratios), 1.5))
    largest = max(math.prod(shape) for shape in SHAPES.values()) * 4 / 2**20
    print(f"interpreter with torch {torch_alone:.0f} MB; largest tensor in float32 {largest:.0f} MB")
    print(verdict("(auto's peak - torch) / that tensor", (peak["auto"] - torch_alone) / largest, 8))
    command = [sys.executable, "-m", "detune", "compare", str(folder / "auto"), str(folder / "base"), "--json"]
    summary = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["summary"]
    print(f"auto: mean W-Error {summary['mean_w_error']:.2f} over the fine-tuned matrices, ", end="")
    print(f"{100 * summary['bit_identical']:.1f} % of all entries identical")


if __name__ == "__main__":
    main()
