"""The fine-tunes that defences are tried on: trained LoRAs of all-MiniLM-L6-v2, one for each domain of texts.

Three families of the same trainings: ordinary ones, ones that start from one frozen A, and the ordinary adapters on a
base whose weights lie on the grid of bf16.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from detune._runtime import OnPart, OnStart, telling
from detune.bench.recipes import whole
from detune.checkpoints import CheckpointWriter, open_checkpoint
from detune.defences import FrozenA
from detune.demo.texts import DOMAINS, passages
from detune.demo.train import STEPS, Cloze, base_model, cloze, merge, train_lora
from detune.errors import InputError, OutputError

__all__ = ["FineTuneFamily", "given_family", "quality", "trained_families"]

# A frozen A leaves half as much to train for a rank: twice the rank and twice the rate make up for it.
FROZEN = FrozenA(rank=32, alpha=64)
FROZEN_LR = 2e-3

HELD_OUT = 160
"""Passages from the end of each domain that no fine-tune is trained on."""

FAMILIES = ("ordinary", "frozen-a", "bf16-base")


@dataclass(frozen=True)
class FineTuneFamily:
    """Fine-tunes of one base, as they are before a defence.

    Attributes:
        name: One of `FAMILIES`, or "given".
        base: The truth.
        models: The fine-tunes, merged.
        texts: For each, passages of its task that it was not trained on; then of tasks that no model is for.
    """

    name: str
    base: Path
    models: tuple[Path, ...]
    texts: tuple[tuple[str, ...], ...]


def trained_families(
    out: Path,
    families: Collection[str] = FAMILIES,
    models: int | None = None,
    *,
    domains: Sequence[str] = DOMAINS,
    steps: int = STEPS,
    held_out: int = HELD_OUT,
    on_start: OnStart | None = None,
    on_part: OnPart | None = None,
) -> dict[str, FineTuneFamily]:
    """Train the fine-tunes; what `out` has is kept.

    Args:
        out: The folder to fill.
        families: Which of `FAMILIES`; the base on a grid takes the ordinary family's adapters.
        models: How many of each to train, the first ones; None trains one for each domain.
        domains: Domains of `detune.demo.texts.DOMAINS`, one for each model.
        steps: Steps of training.
        held_out: Passages of each domain that are not trained on.
        on_start: For progress: called once with the trainings and merges that are still to be done.
        on_part: Called with the name of each of these when it is begun, and when it is done.

    Returns:
        The families by name.

    Raises:
        OutputError: `out` holds fine-tunes that were made otherwise.
        DetuneError: The extra `demo` is not installed.
    """
    _claim(out, {"domains": list(domains), "steps": steps, "held_out": held_out})
    base, on_grid, start = base_model(), out / "bf16-base" / "base", out / "frozen-a" / "start"
    trainings: dict[str, dict[str, Any]] = {"ordinary": {}} if {"ordinary", "bf16-base"} & set(families) else {}
    if "frozen-a" in families:
        trainings["frozen-a"] = {"start": start, "lr": FROZEN_LR}
        with whole(start) as partial:
            if partial:
                FROZEN.start(base, partial, seed=0)
    if "bf16-base" in families:
        with whole(on_grid) as partial:
            if partial:
                _round_base(base, partial)
    training = {
        f"training on {domain}, {family}": out / family / f"adapter-{domain}"
        for domain in domains[:models]
        for family in trainings
    }
    merging = {
        f"merging {domain}, {family}": out / family / domain for domain in domains[:models] for family in families
    }
    if on_start:
        on_start({part: 1 for part, path in (training | merging).items() if not path.is_dir()})
    for domain in domains[:models]:
        for family, options in trainings.items():
            part = f"training on {domain}, {family}"
            with whole(training[part]) as partial:
                if partial:
                    with telling(on_part, part):
                        train_lora(base, _passages(domain)[:-held_out], partial, steps=steps, **options)
        for family in families:
            trained = out / ("frozen-a" if family == "frozen-a" else "ordinary") / f"adapter-{domain}"
            part = f"merging {domain}, {family}"
            with whole(merging[part]) as partial:
                if partial:
                    with telling(on_part, part):
                        merge(on_grid if family == "bf16-base" else base, trained, partial)
    texts = tuple(_passages(domain)[-held_out:] for domain in domains)
    return {
        family: FineTuneFamily(
            family,
            on_grid if family == "bf16-base" else base,
            tuple(out / family / domain for domain in domains[:models]),
            texts,
        )
        for family in families
    }


def given_family(base: Path, models: Sequence[Path], held_out: int = HELD_OUT) -> FineTuneFamily:
    """Fine-tunes of a user's own, all measured on some passages of every domain.

    Args:
        base: The truth.
        models: Encoders with tokenizers, in Hugging Face layout.
        held_out: Number of passages.

    Raises:
        InputError: Fewer than three models.
    """
    if len(models) < 3:
        raise InputError(f"{len(models)} models given", "expected at least three", "add models")
    texts = tuple(text for domain in DOMAINS for text in _passages(domain)[-(held_out // len(DOMAINS)) :])
    return FineTuneFamily("given", base, tuple(models), (texts,) * len(models))


def quality(models: tuple[Path, ...], texts: tuple[tuple[str, ...], ...]) -> Cloze:
    """Task quality of several models, each on its own passages: the hits of all of them."""
    return Cloze(torch.cat([cloze(model, own).hits for model, own in zip(models, texts, strict=True)]))


@cache
def _passages(domain: str) -> tuple[str, ...]:
    return tuple(passages(domain))


def _round_base(base: Path, out: Path) -> None:
    """Round every number of a model to bf16 and store it as float32."""
    with open_checkpoint(base) as model, CheckpointWriter(model, out) as writer:
        for name in model.tensors:
            tensor = model.read(name)
            writer.write(name, tensor.bfloat16().to(tensor.dtype) if tensor.is_floating_point() else tensor)


def _claim(out: Path, settings: dict[str, object]) -> None:
    mark = out / "fine-tunes.json"
    text = json.dumps(settings)
    if mark.is_file() and mark.read_text(encoding="utf-8") != text:
        raise OutputError(
            f"{out} holds other fine-tunes",
            f"made with {mark.read_text(encoding='utf-8')}, expected {text}",
            "choose another directory, or remove it",
        )
    if not mark.is_file():
        out.mkdir(parents=True, exist_ok=True)
        mark.write_text(text, encoding="utf-8")
