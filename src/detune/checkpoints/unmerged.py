"""Models that PEFT has put its adapters into and that were saved without merging.

Such a file holds the base as it was, `x.base_layer.weight`, and beside it the factors of adapters, of one named default
as `x.lora_A.default.weight`. A module that was trained whole is there twice, `x.original_module.weight` and
`x.modules_to_save.default.weight`.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor

from detune.checkpoints.layout import read_json
from detune.checkpoints.quantised import Decoded
from detune.checkpoints.source import Checkpoint
from detune.errors import InputError

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

    @property
    def adapter(self) -> str | None:
        """The adapter that counts: PEFT's default, or else the first; None where there are no factors."""
        return "default" if "default" in self.adapters else next(iter(self.adapters), None)

    def factors(self, name: str) -> tuple[str, str] | None:
        """The stored names of a tensor's A and B in that adapter; None where it has none.

        Args:
            name: A key of `tensors`.
        """
        module, _, parameter = name.rpartition(".")
        found = self.adapters.get(self.adapter or "", {})
        for kinds in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
            if parameter == "weight" and all((module, kind) in found for kind in kinds):
                return found[module, kinds[0]], found[module, kinds[1]]
        return None

    def read_factors(self, name: str) -> tuple[Tensor, Tensor, float | None]:
        """Read a tensor's A and B, and by what their product is scaled; None where nothing says it.

        Args:
            name: A key of `tensors` that has factors.

        Raises:
            InputError: A file can no longer be read, or the configuration is malformed.
        """
        factors = self.factors(name)
        if factors is None:
            raise KeyError(name)
        A, B = (self.stored.read(own) for own in factors)
        path = self.root / "adapter_config.json"
        if not path.is_file():
            return A, B, None
        config = read_json(path)
        alpha = config.get("lora_alpha") if isinstance(config, dict) else None
        if not isinstance(alpha, int | float):
            raise InputError(f"{path} has no lora_alpha", f"got {alpha!r}", "copy the model again")
        return A, B, alpha / (math.sqrt(A.shape[0]) if config.get("use_rslora") else A.shape[0])


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
