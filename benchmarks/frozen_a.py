"""One frozen A for all fine-tunes: what is lost inside its row space at any n, and what it costs the task.

Expected: inside A's row space no method gets closer than the mean; outside, any single model has the base. Task
accuracy within 1 % of ordinary LoRA's. Training sixteen adapters takes some ten minutes; they are kept in
`benchmarks/.cache`.
"""

import math
from pathlib import Path
from statistics import fmean

import torch
from safetensors.torch import load_file

from detune import recover_matrix
from detune.attacks.prior import guessed
from detune.bench.defences.families import FROZEN, quality, trained_families
from detune.checkpoints import open_checkpoint
from detune.errors import DetuneError
from detune.problem import Stack

CACHE = Path(__file__).parent / ".cache" / "defences" / "models"
METHODS = ("mean", "intersect")


def main() -> None:
    families = trained_families(CACHE, on_step=print)
    frozen = families["frozen-a"]
    base = open_checkpoint(frozen.base)
    models = [open_checkpoint(path) for path in frozen.models]
    spaces = row_spaces()
    print(f"{len(spaces)} matrices 384x384, one A of rank {FROZEN.rank}; mean W-Error, lower is closer")
    print(f"{'n':>2} {'method':>10} {'inside A':>9} {'outside A':>10}")
    for n in (3, 5, 8):
        found: dict[str, list[tuple[float, float]]] = {method: [] for method in (*METHODS, "prior")}
        for name, A in spaces.items():
            stack = [model.read(name) for model in models[:n]]
            W = base.read(name).double()
            for method in METHODS:
                try:
                    weight = recover_matrix(stack, method).weight
                except DetuneError:
                    continue  # counted below
                found[method].append(errors(weight.double() - W, A))
            found["prior"].append(errors(guessed(Stack.of(stack)) - W, A))
        for method, pairs in found.items():
            if len(pairs) < len(spaces):
                print(f"{n:2} {method:>10}   no answer for {len(spaces) - len(pairs)} of {len(spaces)} matrices")
            if pairs:
                inside, outside = (fmean(column) for column in zip(*pairs, strict=True))
                print(f"{n:2} {method:>10} {inside:9.2f} {outside:10.2f}")
    hits = {name: quality(families[name].models, families[name].texts).hits for name in ("ordinary", "frozen-a")}
    difference = hits["frozen-a"] - hits["ordinary"]
    unsure = float(difference.std() / len(difference) ** 0.5)
    ordinary, frozen_accuracy = (float(values.mean()) for values in hits.values())
    print(f"task accuracy over {len(difference)} held-out passages of 8 tasks, told from seven others:")
    print(f"   ordinary LoRA {ordinary:.4f}, frozen A {frozen_accuracy:.4f}: ", end="")
    print(f"{frozen_accuracy / ordinary - 1:+.1%} (standard error {unsure / ordinary:.1%})")


def row_spaces() -> dict[str, torch.Tensor]:
    """Orthonormal rows A of each matrix, as the adapter that all trainings started from has them."""
    adapter = load_file(CACHE / "frozen-a" / "start" / "adapter_model.safetensors")
    return {
        name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight"): A.double()
        for name, A in adapter.items()
        if ".lora_A." in name
    }


def errors(error: torch.Tensor, A: torch.Tensor) -> tuple[float, float]:
    """W-Error inside A's row space and outside: both over the entries that they have."""
    inside = error @ A.mT
    outside = error - inside @ A
    outer = outside.square().sum() / (error.shape[0] * (error.shape[1] - A.shape[0]))
    return math.log10(float(inside.square().mean())), math.log10(float(outer))


if __name__ == "__main__":
    main()
