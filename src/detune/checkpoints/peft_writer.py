"""Writing a LoRA as PEFT does: `adapter_model.safetensors` and `adapter_config.json`.

| what changed | where it goes | how PEFT puts it back |
| --- | --- | --- |
| a weight, at low rank | `x.lora_A.weight`, `x.lora_B.weight` (`x.lora_embedding_A` and `B`) | adds B @ A |
| a bias | `x.bias`, or `x.base_layer.bias` beside a LoRA, with `bias: all` | loads it over the base's |
| anything else of a module without parts | every tensor of the module, with `modules_to_save` | takes the module |
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from detune.checkpoints.blocks import memory_of
from detune.checkpoints.entries import Entry
from detune.checkpoints.merged_checkpoint import merge
from detune.checkpoints.modules import Kind, Place
from detune.checkpoints.safetensors_file import encode_safetensors_header

__all__ = ["PeftLayer", "PeftPlaces", "PeftWriter", "pack_layers", "peft_layer", "unpack_layers"]

_ROOT = "base_model.model."
_LOW_RANK = (Kind.LINEAR, Kind.TRANSPOSED, Kind.EMBEDDING, Kind.KERNEL)


@dataclass(frozen=True)
class PeftLayer:
    """The factors of one layer as PEFT stores them; its scaling is 1.

    Attributes:
        A: `(r, in)`, or `(r, in, *kernel)`, float32.
        B: `(out, r)`, or `(out, r, 1, ...)`, float32.
        kind: Kind of its weight.
    """

    A: Tensor
    B: Tensor
    kind: Kind

    @property
    def rank(self) -> int:
        """The rank of the product `B @ A`."""
        return self.A.shape[0]

    def merged(self, weight: Tensor) -> Tensor:
        """Merge into the base's weight as PEFT's `merge_and_unload` does on the CPU."""
        return merge(
            weight.clone(),
            self.A,
            self.B,
            transposed=self.kind in (Kind.TRANSPOSED, Kind.EMBEDDING),
            is_embedding=self.kind is Kind.EMBEDDING,
        )


def peft_layer(kind: Kind, left: Tensor, right: Tensor, shape: tuple[int, ...]) -> PeftLayer:
    """Put the factors of a change `left @ right.T` into PEFT's form.

    Args:
        kind: Kind of the weight, one that takes a LoRA.
        left: `(rows, r)` where rows is the weight's first dimension.
        right: `(columns, r)`, columns being all its other dimensions together.
        shape: The weight's.

    Returns:
        The layer, on the CPU.
    """
    left, right = (factor.to("cpu", torch.float32) for factor in (left, right))
    if kind in (Kind.TRANSPOSED, Kind.EMBEDDING):
        return PeftLayer(left.T.contiguous(), right.contiguous(), kind)
    A, B = right.T.contiguous(), left.contiguous()
    if kind is Kind.KERNEL:
        A, B = A.reshape(-1, *shape[1:]), B.reshape(*B.shape, *(1 for _ in shape[2:]))
    return PeftLayer(A, B, kind)


def pack_layers(layers: Mapping[int, PeftLayer]) -> bytes:
    """Put the factors of one tensor in several models together, as a safetensors file has them.

    Args:
        layers: By model.
    """
    return save(
        {f"{i}.{name}": factor for i, layer in layers.items() for name, factor in (("A", layer.A), ("B", layer.B))}
    )


def unpack_layers(data: bytes, kind: Kind) -> dict[int, PeftLayer]:
    """Take apart what `pack_layers` put together.

    Args:
        data: What it returned.
        kind: Kind of the weight.

    Returns:
        The factors by model.
    """
    factors = load(data)
    models = sorted({int(key.partition(".")[0]) for key in factors})
    return {i: PeftLayer(factors[f"{i}.A"], factors[f"{i}.B"], kind) for i in models}


class PeftPlaces:
    """The tensors of a base that PEFT can take.

    Args:
        places: Where they are in memory.

    Attributes:
        places: As given.
        stored: Their names, by module and parameter in memory.
    """

    def __init__(self, places: Mapping[str, Place]) -> None:
        self.places = places
        self.stored = {(place.module, place.parameter): name for name, place in places.items()}

    def takes_low_rank(self, name: str) -> Kind | None:
        """The kind of a tensor that PEFT can add a LoRA to; None for any other."""
        place = self.places.get(name)
        return place.kind if place is not None and place.kind in _LOW_RANK else None

    def takes(self, name: str) -> bool:
        """Whether PEFT can take a tensor as the model has it, with the rest of its module where it wants that."""
        place = self.places.get(name)
        if place is None:
            return False
        if place.kind is Kind.BIAS:
            return True
        return bool(place.whole) and all((place.module, parameter) in self.stored for parameter in place.whole)


class PeftWriter:
    """Writes one adapter, a layer at a time, into a directory of its own.

    Args:
        directory: Where it goes; made when there is something to write.
        known: What PEFT can take of the base.
        base: What the adapter is loaded onto: a directory or a Hub id.
    """

    def __init__(self, directory: Path, known: PeftPlaces, base: str) -> None:
        self._directory = directory
        self._places = known.places
        self._stored = known.stored
        self._base = base
        self._entries: list[Entry] = []
        self._ranks: dict[str, int] = {}
        self._transposed = False
        self._biases: list[str] = []
        # Insertion-ordered sets of modules.
        self._whole: dict[str, None] = {}

    def add_layer(self, name: str, layer: PeftLayer) -> None:
        """Write the LoRA of one tensor.

        Args:
            name: A tensor that takes one.
            layer: Its factors.
        """
        module = self._places[name].module
        suffixes = ("lora_embedding_A", "lora_embedding_B")
        if layer.kind is not Kind.EMBEDDING:
            suffixes = ("lora_A.weight", "lora_B.weight")
        for suffix, factor in zip(suffixes, (layer.A, layer.B), strict=True):
            self._append(f"{module}.{suffix}", factor)
        self._ranks[module] = layer.rank
        self._transposed |= layer.kind is Kind.TRANSPOSED

    def keep(self, name: str) -> None:
        """Take a tensor as the model has it, with the rest of its module where PEFT wants that.

        Args:
            name: A tensor that PEFT takes.
        """
        place = self._places[name]
        if place.kind is Kind.BIAS:
            self._biases.append(name)
        else:
            self._whole[place.module] = None

    def finish(self, read: Callable[[str], Tensor]) -> tuple[str, ...]:
        """Write what was kept, the header and the configuration.

        Args:
            read: Gives a tensor of the model by its qualified name.

        Returns:
            The tensors that were kept and cannot be written after all: PEFT loads no adapter without a LoRA, and finds
            modules to save by the end of their name, which may be that of a layer with a LoRA too.
        """
        kept = [*self._biases, *(self._stored[m, p] for m in self._whole for p in self._parameters(m))]
        if not self._ranks:
            return tuple(kept)
        lost = self._settle_modules()
        for module in self._whole:
            for parameter in self._parameters(module):
                self._append(f"{module}.{parameter}", read(self._stored[module, parameter]))
        for name in self._biases:
            module = self._places[name].module
            if module not in self._whole:
                layer = ".base_layer" * (module in self._ranks)
                self._append(f"{module}{layer}.bias", read(name))
        self._write_file()
        (self._directory / "adapter_config.json").write_text(json.dumps(self._config(), indent=2) + "\n")
        return lost

    def _parameters(self, module: str) -> tuple[str, ...]:
        return next(place.whole for place in self._places.values() if place.module == module)

    def _settle_modules(self) -> tuple[str, ...]:
        """Let every module whose name ends like that of one to save come along; those that cannot are lost."""
        lost: list[str] = []
        modules = {place.module: place for place in self._places.values()}
        for module in tuple(self._whole):
            alike = [other for other in modules if other.endswith(module)]
            fit = all(
                other not in self._ranks
                and modules[other].whole
                and all((other, parameter) in self._stored for parameter in modules[other].whole)
                for other in alike
            )
            if fit:
                self._whole |= dict.fromkeys(alike)
            else:
                del self._whole[module]
                lost += [self._stored[module, parameter] for parameter in self._parameters(module)]
        return tuple(lost)

    @property
    def _spool(self) -> Path:
        return self._directory / "adapter_model.data"

    def _append(self, key: str, tensor: Tensor) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        tensor = tensor.detach().contiguous()
        self._entries.append(Entry(_ROOT + key, tensor.dtype, tuple(tensor.shape), 0))
        with self._spool.open("ab") as file:
            file.write(memory_of(tensor))

    def _write_file(self) -> None:
        # The header comes first and is known last.
        with (self._directory / "adapter_model.safetensors").open("wb") as file, self._spool.open("rb") as data:
            file.write(encode_safetensors_header(self._entries, {"format": "pt"}))
            shutil.copyfileobj(data, file)
        self._spool.unlink()

    def _config(self) -> dict[str, Any]:
        (usual, _), *_ = Counter(self._ranks.values()).most_common(1)
        others = {module: rank for module, rank in self._ranks.items() if rank != usual}
        return {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": self._base,
            "inference_mode": True,
            # alpha = r: the factors are scaled by 1, which changes no bit.
            "r": usual,
            "lora_alpha": usual,
            "rank_pattern": others,
            "alpha_pattern": others,
            # Whole names: a short one could also fit layers that did not change.
            "target_modules": list(self._ranks),
            "modules_to_save": list(self._whole) or None,
            "bias": "all" if self._biases else "none",
            "fan_in_fan_out": self._transposed,
            "lora_dropout": 0.0,
            "init_lora_weights": True,
            "use_rslora": False,
            "use_dora": False,
        }
