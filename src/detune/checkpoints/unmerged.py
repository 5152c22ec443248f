"""Models that PEFT has put its adapters into and that were saved without merging.

Such a file holds the base as it was, `x.base_layer.weight`, and beside it the factors of adapters, of one named default
as `x.lora_A.default.weight`. A module that was trained whole is there twice, `x.original_module.weight` and
`x.modules_to_save.default.weight`.
"""

import re
from collections import defaultdict
from collections.abc import Mapping

from detune.checkpoints.quantised import Decoded
from detune.checkpoints.source import Checkpoint

__all__ = ["Unmerged", "without_adapters"]

PREFIX = "base_model.model."
BASE_LAYER = ".base_layer."
ORIGINAL = ".original_module."
# What adapters of an older PEFT, or of a layer that keeps its own names, are known by.
FACTORS = re.compile(r"(?P<module>.+)\.(?P<kind>lora_[AB]|lora_embedding_[AB])\.(?P<adapter>[^.]+)(?:\.weight)?")


class Unmerged(Decoded):
    """The base in a model that was saved without merging its adapters.

    Args:
        stored: The checkpoint as stored.
        names: The base's name for each of its tensors.

    Attributes:
        adapters: For each adapter, by its name, the stored names of its factors: module, "lora_A" or "lora_B", and
            the like, to name.
        others: Stored names of what else adapters hold.
    """

    def __init__(self, stored: Checkpoint, names: Mapping[str, str]) -> None:
        left_out = [name for name in stored.tensors if name not in names]
        super().__init__(stored, {}, frozenset(left_out), names)
        self.adapters: dict[str, dict[tuple[str, str], str]] = defaultdict(dict)
        others = []
        for name in left_out:
            match = FACTORS.fullmatch(name)
            if match is None:
                others.append(name)
            else:
                self.adapters[match["adapter"]][match["module"].removeprefix(PREFIX), match["kind"]] = name
        self.others = tuple(others)


def without_adapters(model: Checkpoint) -> Checkpoint:
    """The base in a model that holds adapters beside it; itself where it holds none."""
    factors = {match["module"] for name in model.tensors if (match := FACTORS.fullmatch(name))}
    wrapped = {name.rpartition(BASE_LAYER)[0] for name in model.tensors if BASE_LAYER in name}
    copied = {name.rpartition(ORIGINAL)[0] for name in model.tensors if ORIGINAL in name}
    if not wrapped and not any(f"{module}.weight" in model.tensors for module in factors):
        return model
    names = {}
    for name in model.tensors:
        if BASE_LAYER in name or ORIGINAL in name:
            names[name] = name.replace(BASE_LAYER, ".").replace(ORIGINAL, ".").removeprefix(PREFIX)
            continue
        owners = [name[: k.start()] for k in re.finditer(r"\.", name)]
        if not FACTORS.fullmatch(name) and not any(owner in wrapped or owner in copied for owner in owners):
            names[name] = name.removeprefix(PREFIX)
    return Unmerged(model, names)
