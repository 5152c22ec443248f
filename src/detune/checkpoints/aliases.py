"""Names of weights in memory, where transformers stores them under other names.

Since version 5 some models have other module names than their checkpoints, and an adapter trained on such a
model has the new ones: `layers.0.attention.q_proj` for what a ViT checkpoint calls
`encoder.layer.0.attention.attention.query`.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from detune.checkpoints.pretrained import load_pretrained, model_class_of

__all__ = ["InMemory", "modules_in_memory", "names_in_memory"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class InMemory:
    """The place of a stored tensor in the model that transformers makes of the checkpoint.

    Attributes:
        module: Name of its module, `encoder.layer.0.attention.self.query`.
        parameter: Its name in the module, `weight`.
        owner: The module itself, on the meta device.
    """

    module: str
    parameter: str
    owner: torch.nn.Module


def names_in_memory(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """Rename stored weights as transformers does when it loads them.

    Only renamed weights are covered, not those that loading fuses or splits.

    Args:
        directory: A model's directory, with its `config.json`.
        names: Names as stored.

    Returns:
        Name in memory to name as stored; empty where transformers is absent or does not know the model.
    """
    # The table of names is not a stable interface, and a model may be anything. Whatever goes wrong here, the
    # caller finds no name and says so.
    try:
        return _renamed(_on_meta(directory), names)
    except Exception as error:
        logger.debug("transformers has no other names for %s: %s", directory, error)
        return {}


def modules_in_memory(directory: Path, names: Iterable[str]) -> dict[str, InMemory]:
    """Find the module of every stored weight, in the class that the model's configuration names.

    Args:
        directory: A model's directory, with its `config.json`.
        names: Names as stored.

    Returns:
        Name as stored to its place; without those that loading fuses or splits. Empty where transformers is absent or
        does not know the model.
    """
    try:
        model = _on_meta(directory)
        tensors = {name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
        prefix = f"{model.base_model_prefix}."
        places = {}
        for alias, stored in _renamed(model, names).items():
            # A checkpoint of the body alone loads into a model with a head, and the other way round.
            for name in (alias, prefix + alias, alias.removeprefix(prefix)):
                if name in tensors:
                    module, _, parameter = name.rpartition(".")
                    places[stored] = InMemory(module, parameter, model.get_submodule(module))
                    break
    except Exception as error:
        logger.debug("transformers does not know the modules of %s: %s", directory, error)
        return {}
    return places


def _on_meta(directory: Path) -> Any:
    """The model of a directory's configuration, without its weights."""
    import transformers

    config = load_pretrained(transformers.AutoConfig, directory)
    with torch.device("meta"):
        return model_class_of(config)(config)


def _renamed(model: Any, names: Iterable[str]) -> dict[str, str]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    renamings = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]
    aliases: dict[str, str] = {}
    for stored in names:
        name = stored
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        aliases[name] = stored
    return aliases
