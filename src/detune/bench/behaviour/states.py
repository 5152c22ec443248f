"""Encoders, of images and of text, by their hidden states.

The models run in float64, so that two that are nearly equal differ by what their weights do, not by rounding. The
states are those after each block. The embeddings before the first are left out: no LoRA touches them. (The paper's
script takes the first twelve of the thirteen states of ViT-B, so the embeddings and not the last block's.)
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detune._runtime import global_seed, needs_extra, quiet
from detune.bench.behaviour.base import Differences
from detune.bench.behaviour.loading import load, loading
from detune.checkpoints import load_pretrained
from detune.errors import InputError, reason_of

__all__ = ["ImageStates", "States", "TextStates"]

_BATCH = 16
_LENGTH_TOKENS = 128  # of a prompt; what is longer is cut off

States = tuple[Tensor, ...]
"""The hidden states after each block, float64, inputs along the first dimension; 64 images of ViT-B take 0.9 GiB."""


@dataclass(frozen=True)
class ImageStates:
    """Hidden states of an encoder of images.

    Attributes:
        processor_dir: The model whose image processor prepares the images for both: the original.
        images: Image files.
    """

    processor_dir: Path
    images: tuple[Path, ...]

    def observe(self, model_dir: Path) -> States:
        """Return the states after each block; see `Behaviour.observe`.

        Args:
            model_dir: The model to run.

        Returns:
            Per block, shape (images, tokens, width) for a transformer, float64.

        Raises:
            InputError: An image, the model or its processor cannot be read.
            DetuneError: The extra `bench` is not installed.
        """
        with needs_extra("bench"):
            from PIL import Image
            from transformers import AutoImageProcessor

        def batches() -> Iterator[dict[str, Tensor]]:
            # Pillow's backend, whether torchvision is there or not: the two do not resize alike.
            with loading(f"the image processor in {self.processor_dir}"):
                processor = load_pretrained(AutoImageProcessor, self.processor_dir, backend="pil")
            for start in range(0, len(self.images), _BATCH):
                files = self.images[start : start + _BATCH]
                pixels = processor([_open(file, Image) for file in files], return_tensors="pt")["pixel_values"]
                yield {"pixel_values": pixels.double()}

        return _run(model_dir, batches())

    def compare(self, original: States, recovered: States) -> Differences:
        """Return `activation`, the activation distance; see `Behaviour.compare`.

        Args:
            original: States of the original model.
            recovered: States of the recovered one.
        """
        return _compare(original, recovered)


@dataclass(frozen=True)
class TextStates:
    """Hidden states of an encoder of text.

    Attributes:
        tokenizer_dir: The model whose tokenizer cuts the prompts up for both: the original.
        prompts: Texts; what is longer than 128 tokens is cut off.
    """

    tokenizer_dir: Path
    prompts: tuple[str, ...]

    def observe(self, model_dir: Path) -> States:
        """Return the states after each block, zero where a prompt is padded; see `Behaviour.observe`.

        Args:
            model_dir: The model to run.

        Returns:
            Per block, shape (prompts, tokens of the longest, width), float64.

        Raises:
            InputError: The model or the tokenizer cannot be read.
            DetuneError: The extra `bench` is not installed.
        """
        with needs_extra("bench"):
            from transformers import AutoTokenizer

        def batches() -> Iterator[dict[str, Tensor]]:
            with loading(f"the tokenizer in {self.tokenizer_dir}"):
                tokenizer = load_pretrained(AutoTokenizer, self.tokenizer_dir)
            # Padded to the longest of all, not of each batch: the states of a block make one tensor.
            tokens = tokenizer(
                list(self.prompts), padding=True, truncation=True, max_length=_LENGTH_TOKENS, return_tensors="pt"
            )
            for start in range(0, len(self.prompts), _BATCH):
                yield {name: ids[start : start + _BATCH] for name, ids in tokens.items()}

        return _run(model_dir, batches())

    def compare(self, original: States, recovered: States) -> Differences:
        """Return `activation`, the activation distance; see `Behaviour.compare`.

        Args:
            original: States of the original model.
            recovered: States of the recovered one.
        """
        return _compare(original, recovered)


def _run(model_dir: Path, batches: Iterator[dict[str, Tensor]]) -> States:
    from transformers import AutoModel

    # The head is left out, as no LoRA is merged into it. The seed is for a pooler that the checkpoint lacks.
    with quiet(), global_seed(0), torch.no_grad():
        model = load(AutoModel, model_dir, torch.float64, unused="pooler")
        seen = [_states(model, batch) for batch in batches]
    return tuple(torch.cat(layer) for layer in zip(*seen, strict=True))


def _states(model: Any, batch: dict[str, Tensor]) -> States:
    states: States = model(**batch, output_hidden_states=True).hidden_states[1:]
    mask = batch.get("attention_mask")
    return states if mask is None else tuple(state * mask.unsqueeze(-1) for state in states)


def _open(file: Path, pillow: Any) -> Any:
    try:
        with pillow.open(file) as image:
            return image.convert("RGB")
    except OSError as error:  # Pillow's own errors are of this kind
        raise InputError(
            f"{file} cannot be read: {reason_of(error)}", "expected an image", "replace or remove it"
        ) from error


def _compare(original: States, recovered: States) -> Differences:
    from detune.metrics.activation import activation_distance

    return Differences({"activation": activation_distance(original, recovered)})
