"""Changes of a transformer's weights that leave its outputs as they are.

What an architecture allows is told by its config and the names of its tensors; each has a file here and a row in
`ARCHITECTURES`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detune.errors import InputError, parsing
from detune.files import MAX_JSON_BYTES, read_regular
from detune.symmetries import bert, llama, vit
from detune.symmetries.action import Action, act
from detune.symmetries.base import Attention, Describe, FeedForward, Layer, NormInto
from detune.symmetries.frame import Actions, HeadFrame, NeuronFrame, NormFrame, complex_blocks, expand, join

__all__ = [
    "ARCHITECTURES",
    "Action",
    "Actions",
    "Attention",
    "FeedForward",
    "HeadFrame",
    "Layer",
    "NeuronFrame",
    "NormFrame",
    "NormInto",
    "act",
    "complex_blocks",
    "expand",
    "find_layers",
    "join",
    "read_layers",
]

# Keys are the `model_type` of a config. XLM-R and its like are RoBERTa; Mistral is Llama with a window.
ARCHITECTURES: dict[str, Describe] = {
    "bert": bert.describe,
    "roberta": bert.describe,
    "vit": vit.describe,
    "llama": llama.describe,
    "mistral": llama.describe,
}


def find_layers(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> tuple[Layer, ...]:
    """The layers of a model, with what is free in each.

    Args:
        config: Its `config.json`.
        shapes: Shapes of its tensors, by name; names may have a prefix, as in checkpoints of a model with a head.

    Returns:
        The layers, the first one first.

    Raises:
        InputError: The architecture is not known here, or the tensors are not those of its config.
    """
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise InputError(
            f"no symmetries are known of model_type {kind!r}",
            f"known are {', '.join(ARCHITECTURES)}",
            "add a file in detune/symmetries and a row in ARCHITECTURES",
        )
    layers = ARCHITECTURES[kind](config, shapes)
    for layer in layers:
        layer.check(shapes)
    return layers


def read_layers(directory: Path, shapes: Mapping[str, Sequence[int]]) -> tuple[Layer, ...]:
    """Find the layers of a checkpoint on disk.

    Args:
        directory: Where its `config.json` is.
        shapes: Shapes of its tensors, by name.

    Raises:
        InputError: There is none, or see `find_layers`.
    """
    path = directory / "config.json"
    try:
        config = dict(json.loads(read_regular(path, MAX_JSON_BYTES)))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(
            f"cannot read {path}",
            f"{type(error).__name__}, expected the config that tells the architecture",
            "give a model's directory as save_pretrained wrote it",
        ) from error
    with parsing(path):
        return find_layers(config, shapes)
