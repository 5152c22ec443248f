"""Behaviour: outputs of models, and how far a recovered model's are from the original's.

Encoders are compared by their hidden states (`states`), causal language models by the texts they write (`texts`),
Stable Diffusion by the images it draws (`images`), as in Horwitz, Kahana & Hoshen 2024 (arXiv 2402.10208).
"""

import json
from pathlib import Path
from typing import Any

from detune.bench.behaviour.base import MEANINGS, Behaviour, Differences, Metric, images_in, prompts_in
from detune.bench.behaviour.images import DrawnImages
from detune.bench.behaviour.states import ImageStates, TextStates
from detune.bench.behaviour.texts import WrittenTexts
from detune.errors import InputError

__all__ = [
    "MEANINGS",
    "Behaviour",
    "Differences",
    "DrawnImages",
    "ImageStates",
    "Metric",
    "TextStates",
    "WrittenTexts",
    "behaviour_of",
]

_KNOWN = "expected a causal language model, an encoder of images or of text, or a StableDiffusionPipeline"
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "tokenizer.model")


def behaviour_of(base: Path, inputs: Path | None) -> Behaviour[Any]:
    """Tell from a model's directory what the model does, and read what it is to be compared on.

    Args:
        base: The original model, in Hugging Face layout: a `StableDiffusionPipeline` (`model_index.json`), a causal
            language model (`*ForCausalLM` in `config.json`), or an encoder with an image processor or a tokenizer.
        inputs: A folder with images, a folder with `prompts.csv`, or a CSV file with a column `prompt`.

    Returns:
        The behaviour, with the paper's settings; `dataclasses.replace` changes them.

    Raises:
        InputError: The model is of no known kind, or these are no inputs for it.
    """
    index = base / "model_index.json"
    if index.is_file():
        pipeline = _read(index).get("_class_name")
        if pipeline != "StableDiffusionPipeline":
            raise _unknown(base, f"its pipeline is {pipeline!r}")
        return DrawnImages(prompts_in(inputs))
    config = _read(base / "config.json")
    architecture = str((config.get("architectures") or ["unnamed"])[0])
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return WrittenTexts(base, prompts_in(inputs))
    # Encoder-decoders and pairs of encoders take more than one input.
    if not config.get("is_encoder_decoder") and not {"text_config", "vision_config"} & config.keys():
        if _has_image_processor(base):
            return ImageStates(base, images_in(inputs))
        if "vocab_size" in config and any((base / name).is_file() for name in _TOKENIZERS):
            return TextStates(base, prompts_in(inputs))
    raise _unknown(base, f"its architecture is {architecture}")


def _has_image_processor(base: Path) -> bool:
    """Tell an image processor from one of sound: only the former has means of colours, or says what it is."""
    file = base / "preprocessor_config.json"
    return file.is_file() and bool({"image_processor_type", "image_mean"} & _read(file).keys())


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"no model in {file.parent}", "it has neither config.json nor model_index.json", "give a model's directory"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read: {error}", "expected JSON", "copy the model again") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} is not a configuration", f"got {type(content).__name__}, expected an object")
    return content


def _unknown(base: Path, found: str) -> InputError:
    return InputError(
        f"what the model in {base} does cannot be compared", f"{found}; {_KNOWN}", "compare its weights alone"
    )
