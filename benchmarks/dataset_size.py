"""How well the size of a LoRA's training set is read off its singular values (DSiRe), on LoRAs that are trained here.

A small ViT trained on digits; for each of some questions, a LoRA on each of some numbers of images, all in as many
steps with the same settings, each with a seed of its own. Errors are those of references that are held out: with all
LoRAs of their question (the next release has a question of its own), and alone. Trains some minutes on one core.
`trained.csv` in the cache is a table for `detune audit --trained`, without the first three questions.
"""

import argparse
import csv
from collections.abc import Sequence
from math import log
from pathlib import Path
from statistics import fmean

import torch
from safetensors.torch import load_file

from detune.audit.dataset_size import Reference, estimate_size, held_out_errors, spectrum_of
from detune.bench.recipes import whole
from detune.bench.recipes.vit import VitMini

TASKS = ("parity", "prime", "loops", "modulo-four", "renamed", "inverted", "upper-half", "rotation")
SIZES = (16, 32, 64, 128, 256, 512, 1024)
RECIPE = VitMini(rank=4, alpha=4, hidden=48, mlp=96, image_pixels=16, base_steps=150, steps=60, batch=16, threads=1)


def trained(cache: Path) -> list[Reference]:
    """The LoRAs; what the cache has is not trained again."""
    with whole(cache / "base") as partial:
        if partial:
            RECIPE.make_base(partial)
    references = []
    for i, task in enumerate(TASKS):
        for j, size in enumerate(SIZES):
            adapter = cache / f"{task}-{size}"
            with whole(adapter) as partial:
                if partial:
                    seed = 100 * i + j
                    RECIPE.train_adapter(cache / "base", task, partial, rank=RECIPE.rank, seed=seed, images=size)
            factors = load_file(adapter / "adapter_model.safetensors")
            names = [name.removesuffix(".lora_A.weight") for name in factors if name.endswith(".lora_A.weight")]
            spectra = {
                name: spectrum_of(factors[f"{name}.lora_A.weight"], factors[f"{name}.lora_B.weight"]) for name in names
            }
            references.append(Reference(spectra, size, task))
    return references


def line(name: str, errors: Sequence[float]) -> None:
    """Print how large errors are: in factors of two, and how many are none, or one step of the sizes at most."""
    octaves = [abs(error) / log(2) for error in errors]
    exact, near = (fmean(octave < limit for octave in octaves) for limit in (0.5, 1.5))
    print(f"{name:44} {fmean(octaves):5.2f} {exact:8.0%} {near:14.0%}")


def main() -> None:
    """Train, and print how close the estimates come."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("benchmarks/.cache/dataset-size"))
    cache = parser.parse_args().cache
    references = trained(cache)
    with (cache / "trained.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(("adapter", "examples", "group"))
        rows.writerows((f"{one.group}-{one.examples}", one.examples, one.group) for one in references[3 * len(SIZES) :])
    print(f"{len(TASKS)} questions, {len(SIZES)} sizes from {SIZES[0]} to {SIZES[-1]} images, {RECIPE.steps} steps\n")
    print("size      norm of the LoRA, mean over its layers: median of the questions [lowest, highest]")
    for size in SIZES:
        norms = sorted(
            fmean(float(values.norm()) for values in one.spectra.values()) for one in references if one.examples == size
        )
        print(f"{size:<8} {norms[len(norms) // 2]:6.3f} [{norms[0]:.3f}, {norms[-1]:.3f}]")
    print("\nestimated from the other LoRAs                  octaves off   right   within a step")
    norms = [
        Reference({name: values.norm()[None] for name, values in one.spectra.items()}, one.examples, one.group)
        for one in references
    ]
    line("spectrum (DSiRe), the question held out", held_out_errors(references))
    line("norm alone, the question held out", held_out_errors(norms))
    line("spectrum (DSiRe), the LoRA alone held out", held_out_errors(references, by_group=False))
    middle = SIZES[len(SIZES) // 2]
    line(f"always {middle}", [log(middle / one.examples) for one in references])
    inside = []
    for task in TASKS:
        others = [one for one in references if one.group != task]
        for one in references:
            if one.group == task:
                found = estimate_size(one.spectra, others)
                inside.append((found.low <= one.examples <= found.high, found.high / found.low))
    widths = sorted(width for _, width in inside)
    print(
        f"\nranges that are to hold nine of ten: {fmean(hit for hit, _ in inside):.0%} of {len(inside)} do; "
        f"from end to end a factor of {widths[len(widths) // 2]:.0f} in the median"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
