"""Does float32, in which Spectral DeTuning was published, limit it? LoRAs of different seeds, fifteen models.

Expected: yes, where it converges at all. `auto` with three models beside it. Needs the subset that `make lowra` builds.
"""

import math
from statistics import fmean

import torch
from lowra import CACHE

from detune.bench.run import draw
from detune.bench.subsets import open_subset
from detune.methods import Auto, Spectral
from detune.problem import Stack

EVERY = 6  # layers


def main() -> None:
    torch.set_num_threads(1)
    subset = open_subset(str(CACHE / "vit-mini-different-seeds"))
    errors: dict[str, list[float]] = {}
    for layer in subset.layers():
        if layer.index % EVERY:
            continue
        models = [layer.merged(i) for i in range(len(layer.loras))]
        rank = layer.rank(range(len(models)))
        three = [models[i] for i in draw(len(models), 3, 0)]
        answers = {
            "spectral, 15 models, float32": Spectral().solve(Stack.of(models, torch.float32), rank),
            "spectral, 15 models, float64": Spectral().solve(Stack.of(models, torch.float64), rank),
            "auto, 3 models": Auto().solve(Stack.of(three), rank),
        }
        for name, answer in answers.items():
            error = (answer.weight.float().double() - layer.weight.double()).square().mean()
            errors.setdefault(name, []).append(math.log10(float(error)))
    print(f"{subset.name}, every {EVERY}th of {subset.rows} layers: W-Error")
    for name, values in errors.items():
        print(f"{name:30} {fmean(values):7.2f}")


if __name__ == "__main__":
    main()
