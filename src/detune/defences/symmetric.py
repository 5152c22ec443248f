"""The core of defences by symmetry: a frame drawn for every layer, and its action on each tensor."""

import hashlib
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from detune.checkpoints import Checkpoint, round_to
from detune.defences.base import Change
from detune.errors import InputError
from detune.symmetries import Actions, Layer, act, read_layers

__all__ = ["Draw", "change_of"]

Draw = Callable[[Layer, Callable[[str], torch.Generator]], Actions]
"""From a layer, and a source of random numbers for each purpose by its name, to what is done to the layer's tensors."""


def change_of(model: Checkpoint, seed: int, draw: Draw) -> Change:
    """The change of a model by a frame for each layer.

    Each layer's numbers are drawn from the seed and its name, when one of its tensors comes along; so any order of
    tensors gives the same model, and no more than a few layers' frames are held.

    Args:
        model: The fine-tune.
        seed: Of all frames.
        draw: The frame of a layer.

    Returns:
        See `Change`: numbers that are only moved keep their bits, others are computed in float64 and rounded once.

    Raises:
        InputError: The architecture is not known, or the tensors are not those of the config.
    """
    layers = read_layers(model.root, {name: info.shape for name, info in model.tensors.items()})
    owners = {name: layer for layer in layers for name in model.tensors if name.startswith(f"{layer.name}.")}

    @lru_cache(maxsize=2)
    def actions_of(layer: Layer) -> Actions:
        return draw(layer, lambda purpose: _generator(seed, layer.name, purpose))

    def change(name: str, tensor: Tensor) -> Tensor:
        actions = actions_of(owners[name]).get(name, ()) if name in owners else ()
        if not actions:
            return tensor
        if not tensor.is_floating_point():
            raise InputError(
                f"tensor {name!r} of {model.spec} is stored as {tensor.dtype}", "expected floats", "dequantise it first"
            )
        return round_to(act(actions, tensor), tensor.dtype)

    return change


def _generator(*key: object) -> torch.Generator:
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
