"""The tensors of a model that defences change: the weights of its linear layers, where adapters are."""

import hashlib
from collections.abc import Mapping

import torch

from detune.checkpoints import Checkpoint, Kind, find_places

__all__ = ["generator_of", "linear_weights"]

_LINEAR = (Kind.LINEAR, Kind.TRANSPOSED)


def linear_weights(model: Checkpoint) -> Mapping[str, Kind]:
    """The weights of all linear layers by qualified name, and how each lies: `(out, in)` or `(in, out)`.

    Args:
        model: With its `config.json`; of a model that transformers does not know, names and shapes tell.
    """
    components = dict.fromkeys(info.component for info in model.tensors.values())
    places = {name: place for component in components for name, place in find_places(model, component).items()}
    return {
        name: places[name].kind
        for name, info in model.tensors.items()
        if name in places and places[name].kind in _LINEAR and info.dtype.is_floating_point
    }


def generator_of(seed: int, name: str) -> torch.Generator:
    """Random numbers for one tensor, whatever the order in which tensors are asked for.

    Args:
        seed: The release's.
        name: The tensor's.
    """
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
