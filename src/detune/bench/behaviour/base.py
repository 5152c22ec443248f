"""The protocol of behaviours, their differences, and the inputs that models are compared on."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from detune.errors import InputError

__all__ = ["MEANINGS", "Behaviour", "Differences", "Metric", "images_in", "prompts_in"]

_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg"}

Observation = TypeVar("Observation")

Metric = Literal["activation", "equal_texts", "levels", "lpips", "sbert", "sbert_log10"]
"""The names of what is measured; results are held to them, as another could be that of a column of their table."""

MEANINGS: dict[Metric, str] = {
    "activation": "mean cosine distance of the hidden states, over inputs and blocks",
    "sbert": "mean distance of the sentence embeddings of the texts written",
    "lpips": "mean perceptual distance of the images drawn",
    "levels": "largest difference of the images drawn, in levels of 255",
}
"""Distances that stand for how alike two models are, in words; of several that were measured the first counts."""


@dataclass(frozen=True)
class Differences:
    """The differences of two models' behaviour.

    Attributes:
        values: Metrics by name; a distance is zero where the models do the same.
        notes: By the name of a metric that could not be had, the reason.
    """

    values: Mapping[Metric, float]
    notes: Mapping[Metric, str] = field(default_factory=dict)


class Behaviour(Protocol[Observation]):
    """A behaviour of models of one kind, a frozen dataclass of its inputs and settings.

    It is deterministic: a directory that is observed twice gives equal observations, on one machine and number of
    threads. Torch's global generator is left as it was. What an observation is, hidden states, texts or images, is the
    behaviour's own matter.
    """

    def observe(self, model_dir: Path) -> Observation:
        """Run the model in a directory on the inputs.

        Args:
            model_dir: The original or a recovered model, in Hugging Face layout. Tokenizer and image processor are
                the original's for both.

        Raises:
            InputError: The model cannot be loaded, or an input cannot be read.
            DetuneError: The extra `bench` is not installed.
        """
        ...

    def compare(self, original: Observation, recovered: Observation) -> Differences:
        """Measure how far two observations, made on the same inputs, are apart.

        Args:
            original: What `observe` saw of the original model.
            recovered: What it saw of the recovered one.

        Raises:
            DetuneError: The extra `bench` is not installed.
        """
        ...


def prompts_in(inputs: Path | None) -> tuple[str, ...]:
    """Read the prompts for a model of text.

    Args:
        inputs: A CSV file with a column `prompt`, or a folder with such a file as `prompts.csv`.

    Returns:
        The prompts in the file's order; lines without one are left out.

    Raises:
        InputError: There is no such file, it is no CSV in UTF-8, or it has no prompt.
    """
    wanted = "this model needs prompts: a CSV file with a column 'prompt', or a folder that has one as prompts.csv"
    if inputs is None:
        raise InputError("no inputs were given", wanted, "give such a file as the inputs")
    file = inputs / "prompts.csv" if inputs.is_dir() else inputs
    if not file.is_file():
        raise InputError(f"no prompts in {inputs}: {file} is not a file", wanted, "give such a file as the inputs")
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            rows = csv.DictReader(lines, strict=True)
            columns = list(rows.fieldnames or ())
            prompts = tuple(row["prompt"] for row in rows if row.get("prompt"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{file} cannot be read: {error}", "expected CSV in UTF-8", "save it as such") from error
    if "prompt" not in columns:
        raise InputError(
            f"{file} has no column 'prompt'",
            f"found {', '.join(map(repr, columns)) or 'nothing'} in its first line",
            "name the column with the prompts so",
        )
    if not prompts:
        raise InputError(f"{file} has no prompts", "its column 'prompt' is empty", "write one prompt a line")
    return prompts


def images_in(inputs: Path | None) -> tuple[Path, ...]:
    """List the images for a model of images, in the order of their names.

    Args:
        inputs: A folder with `*.png`, `*.jpg` or `*.jpeg`.

    Raises:
        InputError: There is no such folder, or it has no images.
    """
    wanted = "this model needs images: a folder with *.png or *.jpg"
    if inputs is None:
        raise InputError("no inputs were given", wanted, "give such a folder as the inputs")
    if not inputs.is_dir():
        raise InputError(f"{inputs} is not a folder", wanted, "give such a folder as the inputs")
    images = tuple(sorted(file for file in inputs.iterdir() if file.suffix.lower() in _IMAGE_SUFFIXES))
    if not images:
        found = ", ".join(sorted(file.name for file in inputs.iterdir())[:5]) or "nothing"
        raise InputError(f"no images in {inputs}", f"{wanted}; found {found}", "put some images there")
    return images
