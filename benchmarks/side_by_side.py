"""Side by side in one run: `intersect` against the published method, against averages by our own I/O and by mergekit.

Published: `spectral` on full matrices, a bf16 matrix of each subset's size, rank, number of models and iterations. Few
iterations are timed and multiplied: like the whole run, they spend their second half at the full rank.

Checkpoints: whole processes, alternating, on a Mistral-7B-sized model of few layers in bf16, q, k, v and o fine-tuned
with r=64. `mean` is `detune recover --method mean`. mergekit's `linear` runs where `--mergekit` or MERGEKIT names its
command (`python -m venv DIR; DIR/bin/pip install mergekit`), and is left out elsewhere. Expected on 2 cores with n=3:
`intersect` takes at most 1.3 times as long as `mean` and half as long as mergekit; with n=8 twice as long as `mean`.
Its memory is at most the interpreter with torch plus 6 times the largest tensor in float32, whatever the layers.

    python benchmarks/side_by_side.py [--models N] [--layers N] [--repeats N] [--methods intersect,auto] [--skip PART]
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
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from counting import METHODS, Problem
from problems import verdict
from safetensors.torch import save_file

from detune.methods import Spectral
from detune.problem import Stack

HIDDEN, INTERMEDIATE, KEY_VALUE, VOCABULARY, RANK = 4096, 14336, 1024, 512, 64
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEY_VALUE, HIDDEN),
    "self_attn.v_proj": (KEY_VALUE, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
TUNED = "self_attn"
MOST_MEMORY = 6


@dataclass(frozen=True)
class Published:
    """A setting of the paper: a matrix of the subset's usual size, its rank, models and iterations."""

    subset: str
    problem: Problem
    iterations: int


PUBLISHED = (
    Published("vit", Problem(768, 768, 16, 5), 300),
    Published("stable-diffusion-1.5", Problem(1280, 1280, 32, 5), 300),
    Published("mistral-7b-v0.1-sft", Problem(4096, 4096, 64, 12), 1000),
    Published("mistral-7b-v0.1-dpo", Problem(4096, 4096, 64, 8), 1000),
)


@dataclass(frozen=True)
class Run:
    """Wall seconds, processor seconds and peak memory of a process."""

    seconds: float
    processor_seconds: float
    peak_bytes: int


def against_published(timed: int) -> None:
    """Spectral DeTuning on full matrices, and the closed form on the same."""
    print(f"spectral as published, on full matrices: {timed} iterations timed, the whole run reckoned from them")
    spectral = Spectral(iterations=timed, on_core=False)
    # Once without the clock: the first call loads libraries.
    spectral.solve(Stack.of(PUBLISHED[0].problem.models()), PUBLISHED[0].problem.rank)
    for setting in PUBLISHED:
        models = setting.problem.models()
        began = time.perf_counter()
        spectral.solve(Stack.of(models), setting.problem.rank)
        published = (time.perf_counter() - began) * setting.iterations / timed
        seconds = math.inf
        for _ in range(3):
            began = time.perf_counter()
            METHODS["intersect"](Stack.of(models))
            seconds = min(seconds, time.perf_counter() - began)
        print(
            f"  {setting.subset:22} {setting.problem!s:21} {setting.iterations:5} iterations {published:8.1f} s, "
            f"intersect {seconds:6.3f} s: {published / seconds:7.0f} times"
        )


def make(folder: Path, layers: int, n: int) -> None:
    """Write a random base and its merges."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])

    base = {
        f"model.layers.{layer}.{name}.weight": normal(*shape).bfloat16()
        for layer in range(layers)
        for name, shape in SHAPES.items()
    }
    norms = [f"model.layers.{i}.{name}_layernorm" for i in range(layers) for name in ("input", "post_attention")]
    base |= {f"{name}.weight": torch.ones(HIDDEN).bfloat16() for name in (*norms, "model.norm")}
    base |= {f"{name}.weight": normal(VOCABULARY, HIDDEN).bfloat16() for name in ("model.embed_tokens", "lm_head")}
    config = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": layers,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    _save(base, config, folder / "base")
    for i in range(n):
        model = dict(base)
        for name, W in base.items():
            if TUNED in name:
                # rms of the delta: 1 % of that of W.
                left, right = torch.randn(W.shape[0], RANK, generator=generator), normal(RANK, W.shape[1])
                model[name] = torch.addmm(W.float(), left, right, alpha=0.01 / math.sqrt(RANK)).bfloat16()
        _save(model, config, folder / f"model-{i}")


def _save(tensors: dict[str, torch.Tensor], config: dict[str, object], folder: Path) -> None:
    """An ordinary checkpoint directory."""
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def run(command: list[str], threads: int) -> Run:
    """A whole process."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    return Run(time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def commands(options: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """What is compared; the last argument is the directory that each makes."""
    models = [str(folder / f"model-{i}") for i in range(options.models)]
    recover = [sys.executable, "-m", "detune", "recover", *models, "--method"]
    compared = {name: [*recover, name, "--out", str(folder / name)] for name in ("mean", *options.methods.split(","))}
    if options.mergekit:
        linear = {
            "merge_method": "linear",
            "dtype": "bfloat16",
            "models": [{"model": model, "parameters": {"weight": 1.0}} for model in models],
        }
        config = folder / "linear.yml"
        config.write_text(json.dumps(linear))  # JSON is YAML
        quiet = ["--no-copy-tokenizer", "--quiet", "--num-threads", str(options.threads)]
        compared["mergekit"] = [options.mergekit, str(config), *quiet, str(folder / "mergekit")]
    else:
        print("mergekit is not there: left out (name its command with --mergekit)")
    return compared


def against_averages(options: argparse.Namespace) -> None:
    """Whole processes on whole checkpoints."""
    folder = Path(tempfile.mkdtemp(prefix="detune-bench-", dir=options.folder))
    try:
        # In a process of its own: a child's peak memory counts from what its parent held when it was started.
        maker = multiprocessing.get_context("spawn").Process(target=make, args=(folder, options.layers, options.models))
        maker.start()
        maker.join()
        size = (folder / "model-0" / "model.safetensors").stat().st_size
        print(f"{options.layers} layers, {options.models} models of {size / 1e9:.2f} GB, ", end="")
        print(f"{options.threads} thread(s), {options.repeats} alternating runs")
        compared = commands(options, folder)
        runs: dict[str, list[Run]] = {name: [] for name in compared}
        for _ in range(options.repeats):
            for name, command in compared.items():
                runs[name].append(run(command, options.threads))
                if len(runs[name]) == options.repeats and name in options.methods.split(","):
                    print(f"  {name:9} {accuracy(Path(command[-1]), folder / 'base')}")
                shutil.rmtree(command[-1])
        report(runs, options)
    finally:
        shutil.rmtree(folder)


def accuracy(recovered: Path, base: Path) -> str:
    """What `detune compare` says of an answer."""
    command = [sys.executable, "-m", "detune", "compare", str(recovered), str(base), "--json"]
    summary = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["summary"]
    identical = 100 * summary["bit_identical"]
    return f"mean W-Error {summary['mean_w_error']:.2f} over what was tuned, {identical:.1f} % of all entries identical"


def report(runs: dict[str, list[Run]], options: argparse.Namespace) -> None:
    """Print what was measured, as ratios."""
    for name, measured in runs.items():
        peak, processor = max(each.peak_bytes for each in measured), min(each.processor_seconds for each in measured)
        ratios = [a.seconds / b.seconds for a, b in zip(measured, runs["mean"], strict=True)]
        print(
            f"  {name:9} {_least(measured):7.2f} s, {_least(measured) / _least(runs['mean']):5.2f} times mean's "
            f"(run by run, median: {median(ratios):5.2f}); processor {processor:7.2f} s, "
            f"{processor / min(each.processor_seconds for each in runs['mean']):5.2f} times; peak {peak / 1e6:6.0f} MB"
        )
    closed = runs["intersect"]
    at_most = 1.3 if options.models < 8 else 2.0
    print(verdict("intersect / mean, least times", _least(closed) / _least(runs["mean"]), at_most))
    if "mergekit" in runs:
        print(verdict("intersect / mergekit, least times", _least(closed) / _least(runs["mergekit"]), 0.5))
    torch_alone = run([sys.executable, "-c", "import torch"], options.threads).peak_bytes
    largest = 4 * max(math.prod(shape) for shape in SHAPES.values())
    print(f"interpreter with torch {torch_alone / 1e6:.0f} MB; largest tensor in float32 {largest / 1e6:.0f} MB")
    peak = max(each.peak_bytes for each in closed)
    print(verdict("(intersect's peak - torch) / that tensor", (peak - torch_alone) / largest, MOST_MEMORY))


def _least(runs: list[Run]) -> float:
    return min(each.seconds for each in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=4, help="of the published method that are timed")
    parser.add_argument("--methods", default="intersect,auto", help="beside mean")
    parser.add_argument("--mergekit", default=os.environ.get("MERGEKIT"), help="path of mergekit-yaml")
    parser.add_argument("--folder", help="where the checkpoints are made; (models + 2) * layers * 0.44 GB")
    parser.add_argument("--skip", choices=["published", "checkpoints"])
    options = parser.parse_args()
    if "intersect" not in options.methods.split(","):
        parser.error("--methods needs intersect")
    torch.set_num_threads(options.threads)
    if options.skip != "checkpoints":
        # First: later children would count the memory of the matrices.
        against_averages(options)
    if options.skip != "published":
        against_published(options.iterations)


if __name__ == "__main__":
    main()
