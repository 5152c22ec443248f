"""What the adapters of `extract --denoise` keep of a full fine-tune: ranks, bytes, and what the model can do.

A small ViT that tells digits, fine-tuned in full to other questions of ten answers. Printed are the accuracies on
held-out digits of the base, of the fine-tune, and of the base with its denoised adapter merged by PEFT. Trains a
minute on one core.
"""

import argparse
import shutil
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import PeftModel
from transformers import ViTForImageClassification, ViTImageProcessorPil

import detune
from detune.adapters.changes import Kept
from detune.bench.recipes import digits, whole
from detune.bench.recipes.vit import VitMini

TASKS = ("renamed", "inverted", "noisy", "upper-half")
RECIPE = VitMini(rank=4, alpha=4, hidden=48, mlp=96, image_pixels=16, base_steps=150, steps=60, batch=16, threads=1)
STEPS, BATCH, LR = 100, 32, 5e-4


def pictures(examples: digits.Examples, processor: Any) -> torch.Tensor:
    """The images as the model reads them."""
    drawn = digits.draw(examples.pixels, processor.size["height"])
    pixels: torch.Tensor = processor(drawn, return_tensors="pt")["pixel_values"]
    return pixels


def tune(base: Path, task: str, out: Path) -> None:
    """Train all weights."""
    torch.manual_seed(0)
    model = ViTForImageClassification.from_pretrained(base).train()
    examples = digits.TASKS[task](digits.load().train)
    pixels, labels = pictures(examples, ViTImageProcessorPil.from_pretrained(base)), torch.from_numpy(examples.labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=STEPS)
    for _ in range(STEPS):
        batch = torch.randint(len(labels), (BATCH,))
        loss = torch.nn.functional.cross_entropy(model(pixels[batch]).logits, labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.save_pretrained(out)


@torch.no_grad()
def accuracy(model: Any, task: str, processor: Any) -> float:
    """Share of held-out digits that are answered rightly."""
    examples = digits.TASKS[task](digits.load().held_out)
    found = model.eval()(pictures(examples, processor)).logits.argmax(dim=1)
    return float((found == torch.from_numpy(examples.labels)).double().mean())


def main() -> None:
    """Train, denoise, merge, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("benchmarks/.cache/denoise"))
    cache = parser.parse_args().cache
    with whole(cache / "base") as partial:
        if partial:
            RECIPE.make_base(partial)
    base, processor = cache / "base", ViTImageProcessorPil.from_pretrained(cache / "base")
    print("question     base  fine-tune  denoised   matrices  rank of 48  of the change  bytes of the model")
    for task in TASKS:
        with whole(cache / task) as partial:
            if partial:
                tune(base, task, partial)
        adapters = cache / f"{task}-adapters"
        shutil.rmtree(adapters, ignore_errors=True)
        report = detune.extract([cache / task], adapters, base=base, denoise=True, card=False)
        adapter = adapters / task
        rows = [row for row in report.rows if row.reason.startswith("denoised") and row.kept is Kept.LORA]
        kept = median(float(row.reason.split()[1].rstrip("%")) for row in rows)
        plain, tuned = (ViTForImageClassification.from_pretrained(path) for path in (base, cache / task))
        merged = PeftModel.from_pretrained(ViTForImageClassification.from_pretrained(base), adapter).merge_and_unload()
        figures = [accuracy(model, task, processor) for model in (plain, tuned, merged)]
        size = (adapter / "adapter_model.safetensors").stat().st_size / (
            cache / task / "model.safetensors"
        ).stat().st_size
        print(
            f"{task:11} {figures[0]:6.1%} {figures[1]:10.1%} {figures[2]:9.1%} {len(rows):10} "
            f"{median(row.rank for row in rows):11.0f} {kept:13.0f}% {size:19.0%}"
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    main()
