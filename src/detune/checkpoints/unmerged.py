"""Models that PEFT has put its adapters into and that were saved without merging.

Such a file holds the base as it was, `x.base_layer.weight`, and beside it the factors of adapters, of one named default
as `x.lora_A.default.weight`. A module that was trained whole is there twice, `x.original_module.weight` and
`x.modules_to_save.default.weight`.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from detune.checkpoints.layout import read_json
from detune.checkpoints.lora_formats import Scaling, check_config, rank_of
from detune.checkpoints.quantised import Decoded
from detune.checkpoints.source import Checkpoint
from detune.errors import InputError

__all__ = ["Unmerged", "without_adapters"]

PREFIX = "base_model.model."
BASE_LAYER = ".base_layer."
ORIGINAL = ".original_module."
# The magnitude that DoRA has beside the factors.
MAGNITUDE = "lora_magnitude_vector"
# Names of the factors of an older PEFT, or of a layer that keeps its own names.
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
                continue
            found, place = self.adapters[match["adapter"]], (match["module"].removeprefix(PREFIX), match["kind"])
            if place in found:
                raise _twice(stored, name, found[place])
            found[place] = name
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
            InputError: A file can no longer be read, the configuration is malformed, or the two are no LoRA of it.
        """
        factors = self.factors(name)
        if factors is None:
            raise KeyError(name)
        path, module, shape = self.root / "adapter_config.json", name.rpartition(".")[0], self.tensors[name].shape
        rank = rank_of(self.stored, self.root, module, *factors)
        scaling = _scaling(path, module, rank) if path.is_file() else None
        A, B = (self.stored.read(own) for own in factors)
        # The update of an embedding, and of GPT-2's layers, is transposed.
        update = (B.shape[0], *A.shape[1:])
        fits = shape in (update, update[::-1] if len(update) == 2 else update)
        if not fits or not all(each.is_floating_point() for each in (A, B)) or not _are_finite(A, B, scaling):
            raise InputError(
                f"the factors of {name!r} in {self.spec} are no LoRA of it",
                f"they are {A.dtype} {tuple(A.shape)} and {B.dtype} {tuple(B.shape)}, the tensor has {tuple(shape)}: "
                "expected finite numbers that make one of its shape",
                "copy the model again",
            )
        if any(own.startswith((f"{PREFIX}{module}.{MAGNITUDE}", f"{module}.{MAGNITUDE}")) for own in self.others):
            raise InputError(
                f"the adapter of {name!r} in {self.spec} is more than plain LoRA",
                "it has a magnitude for each row, as DoRA does",
                "merge it with PEFT's merge_and_unload and give the merged model",
            )
        return A, B, scaling


def _scaling(path: Path, module: str, rank: int) -> float:
    """The factor of the product of a module's factors, as a configuration says it."""
    config = read_json(path)
    if not isinstance(config, dict):
        raise InputError(f"{path} is malformed", "expected a table", "copy the model again")
    check_config(config, path)
    # Files of people who merge by hand need not say r.
    settings = {"r": rank, **config}
    return Scaling.read(settings, [module], path).of(module, rank, path)[1]


def _are_finite(A: Tensor, B: Tensor, scaling: float | None) -> bool:
    scaled = B.float() * (1.0 if scaling is None else scaling)
    return bool(A.isfinite().all()) and bool(scaled.isfinite().all())


def _twice(model: Checkpoint, name: str, other: str) -> InputError:
    return InputError(
        f"{model.spec} holds two tensors for one place of the base", f"they are {other!r} and {name!r}", "remove one"
    )


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
    owners_of: dict[str, str] = {}
    for own, name in names.items():
        if owners_of.setdefault(name, own) != own:
            raise _twice(model, own, owners_of[name])
    return Unmerged(model, names)
