"""The modules that stored tensors belong to, and what PEFT can do with them."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch

from detune.checkpoints.aliases import InMemory, modules_in_memory
from detune.checkpoints.source import Checkpoint, TensorInfo

__all__ = ["Kind", "Place", "find_places"]

# Names of embeddings where no library knows the model.
_EMBEDDINGS = ("embed", "wte", "wpe")


class Kind(StrEnum):
    """The kind of module that PEFT takes a tensor for."""

    LINEAR = "linear"
    """A weight `(out, in)`."""
    TRANSPOSED = "transposed"
    """A weight `(in, out)`: GPT-2's Conv1D."""
    EMBEDDING = "embedding"
    """A weight `(tokens, out)`."""
    KERNEL = "kernel"
    """A weight `(out, in, *kernel)` of a convolution."""
    BIAS = "bias"
    """A bias of any module."""
    OTHER = "other"
    """No LoRA: a norm's weight, a buffer, a parameter that stands alone."""


@dataclass(frozen=True)
class Place:
    """The place of a stored tensor in the model that an adapter is loaded into.

    Attributes:
        module: Name of its module in memory.
        parameter: Its name there.
        kind: What PEFT can do with it.
        whole: Names of all tensors of the module, if PEFT can take it whole (`modules_to_save`); empty if it has
            modules inside.
    """

    module: str
    parameter: str
    kind: Kind
    whole: tuple[str, ...]


def find_places(model: Checkpoint, component: str = "") -> Mapping[str, Place]:
    """Place the tensors of a checkpoint, or of one component of it, in the model in memory.

    Args:
        model: The checkpoint, with its `config.json`.
        component: Its directory with a slash, `unet/`; empty for the checkpoint's own.

    Returns:
        Qualified name to place. transformers is asked where the tensors go; for a model that it does not know the
        names and shapes have to tell, and every tensor stays where it is stored.
    """
    infos = {name.removeprefix(component): info for name, info in model.tensors.items() if info.component == component}
    known = modules_in_memory(model.root / component, infos)
    if known:
        return {component + name: _known(place, infos[name]) for name, place in known.items()}
    return {component + name: _guessed(name, infos) for name in infos}


def _known(place: InMemory, info: TensorInfo) -> Place:
    owner = place.owner
    whole = () if any(True for _ in owner.children()) else tuple(owner.state_dict())
    kind = Kind.BIAS if place.parameter == "bias" else Kind.OTHER
    if place.parameter == "weight" and info.shape == tuple(owner.get_parameter("weight").shape):
        kind = _kind(owner)
    return Place(place.module, place.parameter, kind, whole)


def _kind(owner: torch.nn.Module) -> Kind:
    from transformers.pytorch_utils import Conv1D

    if isinstance(owner, torch.nn.Linear):
        return Kind.LINEAR
    if isinstance(owner, Conv1D):
        return Kind.TRANSPOSED
    if isinstance(owner, torch.nn.Embedding):
        return Kind.EMBEDDING
    # PEFT does not merge grouped convolutions.
    convolution = isinstance(owner, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d) and owner.groups == 1
    return Kind.KERNEL if convolution else Kind.OTHER


def _guessed(name: str, infos: Mapping[str, TensorInfo]) -> Place:
    module, _, parameter = name.rpartition(".")
    siblings = tuple(other.rpartition(".")[2] for other in infos if other.rpartition(".")[0] == module)
    has_modules = any(other.startswith(f"{module}.") and "." in other.removeprefix(f"{module}.") for other in infos)
    whole = siblings if module and not has_modules else ()
    if parameter == "bias":
        return Place(module, parameter, Kind.BIAS, whole)
    dimensions = len(infos[name].shape)
    if parameter != "weight" or not module or dimensions < 2:
        return Place(module, parameter, Kind.OTHER, whole)
    if dimensions > 2:
        return Place(module, parameter, Kind.KERNEL, whole)
    embedding = any(part in module.rpartition(".")[2] for part in _EMBEDDINGS)
    return Place(module, parameter, Kind.EMBEDDING if embedding else Kind.LINEAR, whole)
