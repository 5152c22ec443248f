"""The changes of tensors as adapters keep them: as a LoRA, whole, or not at all."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from detune.adapters.denoise import denoise_change
from detune.adapters.fit import fit_adapter
from detune.checkpoints import (
    Checkpoint,
    Kind,
    PeftLayer,
    PeftPlaces,
    Unmerged,
    find_places,
    folded,
    own_name,
    peft_layer,
    plain_name,
    raw,
)
from detune.checkpoints.mark import MARK
from detune.checkpoints.side_files import CARD
from detune.compatibility.model_set import Held, ModelSet, damaged
from detune.metrics import bit_identical, ulps
from detune.problem import LowRank, NonFinite, NotLowRank, Stack
from detune.problem.solving import outliers_of
from detune.problem.stack import matricise

_Noise = tuple[float | None, float | None]
"""The noise of the base's tensor and of a model's, see `Held`."""


class Kept(StrEnum):
    """The place that a changed tensor went to."""

    LORA = "LoRA"
    """Into a pair of factors."""
    WHOLE = "whole"
    """Into the adapter as it is: a bias, a norm, a head."""
    NOISE = "not kept"
    """Nowhere: it differs from the base's by storage noise alone."""
    LEFT_OUT = "left out"
    """Nowhere: PEFT has no place for it."""


@dataclass(frozen=True)
class AdapterRow:
    """One tensor of one model, where it differs from the base's.

    Attributes:
        model: The name of its adapter.
        name: The tensor's qualified name.
        shape: Its shape.
        kept: Where the difference went.
        rank: Rank of the LoRA; 0 where there is none.
        identical: Share of the entries that base and adapter, merged by PEFT, give back bit for bit.
        largest_ulps: The largest deviation of the others, in units in the last place of the model's entry.
            It is large in entries near zero, whose units are small.
        largest_deviation: The largest as a number.
        reason: Why it was not kept as a LoRA, or which part of it was; empty where all of it was.
    """

    model: str
    name: str
    shape: tuple[int, ...]
    kept: Kept
    rank: int
    identical: float
    largest_ulps: int
    largest_deviation: float
    reason: str = ""


@dataclass(frozen=True)
class AdapterChange:
    """One tensor of one model, as its adapter keeps it.

    Attributes:
        model: The model's place among those given.
        row: For the report.
        as_base: The row if PEFT cannot take the tensor after all, where it is to be kept whole.
        layer: Its factors, where it is kept as a LoRA.
    """

    model: int
    row: AdapterRow
    as_base: AdapterRow | None = None
    layer: PeftLayer | None = None


class PlacesOf:
    """The places of a model's tensors in memory; each of its components is looked at once.

    Args:
        model: The checkpoint.
    """

    def __init__(self, model: Checkpoint) -> None:
        self._model = model
        self._known: dict[str, PeftPlaces] = {}

    def of(self, name: str) -> PeftPlaces:
        """The places that PEFT can take in a tensor's component."""
        component = self._model.tensors[name].component
        if component not in self._known:
            self._known[component] = PeftPlaces(find_places(self._model, component))
        return self._known[component]


class ChangeFitter:
    """Finds what tensors become in adapters.

    Args:
        family: The fine-tuned models.
        base: What the adapters will be loaded onto.
        rank: The most that an adapter's rank can be; None finds it.
        device: Where to compute; None is the CPU.
        denoise: Whether of a change at full rank the part is kept that stands over its noise, see `denoise_change`.
    """

    def __init__(
        self,
        family: ModelSet,
        base: str,
        rank: int | None = None,
        device: torch.device | str | None = None,
        *,
        denoise: bool = False,
    ) -> None:
        self._models = family.models
        self._specs = tuple(model.spec for model in family.models)
        self._names = adapter_names(self._specs)
        self._places = PlacesOf(family.reference)
        self._base = base
        self._rank = rank
        self._device = device
        self._denoise = denoise

    def fit(self, name: str, base: Tensor, held: Held, noise: float | None = None) -> tuple[AdapterChange, ...]:
        """Find what one tensor becomes.

        Args:
            name: Its qualified name.
            base: The base's, as stored.
            held: What the models hold of it.
            noise: The base's, where that was quantised, as in `Held`.

        Returns:
            A change for each model whose tensor is not the base's.

        Raises:
            InputError: One holds NaN or Inf.
        """
        return tuple(
            self._change(i, name, base, tensor, (noise, own))
            for i, tensor, own in zip(held.models, held.tensors, held.noise, strict=True)
            # A model that holds the base beside its adapter is no merge of it.
            if not isinstance(raw(self._models[i]), Unmerged)
            if not _are_equal(base, tensor)
        )

    def saved(self, name: str) -> tuple[AdapterChange, ...]:
        """The changes of one tensor in models that were saved without merging: the adapters that they hold.

        Args:
            name: Its qualified name.

        Raises:
            InputError: A file can no longer be read.
        """
        kind = self._places.of(name).takes_low_rank(name)
        models = [(i, raw(model), model) for i, model in enumerate(self._models) if name in model.tensors]
        return tuple(
            self._saved(i, whole, model, name, kind)
            for i, whole, model in models
            if kind is not None and isinstance(whole, Unmerged) and whole.factors(own_name(model, name))
        )

    def _saved(self, i: int, whole: Unmerged, model: Checkpoint, name: str, kind: Kind) -> AdapterChange:
        A, B, scaling = whole.read_factors(own_name(model, name))
        layer = PeftLayer(A.float(), B.float() * (1.0 if scaling is None else scaling), kind)
        reason = "" if scaling is not None else "the file does not say how its product is scaled: by 1, as it stands"
        shape = model.tensors[name].shape
        return AdapterChange(
            i, AdapterRow(self._names[i], name, shape, Kept.LORA, layer.rank, 1.0, 0, 0.0, reason), layer=layer
        )

    def _change(self, i: int, name: str, base: Tensor, tensor: Tensor, noise: _Noise) -> AdapterChange:
        places = self._places.of(name)
        kind = places.takes_low_rank(name)
        is_matrix = kind is not None and tensor.is_floating_point() and min(matricise(base).shape) > 1
        M_i, how = self._fit(i, name, base, tensor, noise) if is_matrix else (None, "no matrix")
        as_base = AdapterRow(
            self._names[i],
            name,
            tuple(base.shape),
            Kept.LEFT_OUT,
            0,
            *_deviation(base, tensor),
            "PEFT has no place for it",
        )
        if kind is None or M_i is None:
            if not places.takes(name):
                return AdapterChange(i, as_base)
            # PEFT loads it into the base's module, in the base's dtype.
            loaded = _deviation(tensor.to(base.dtype), tensor)
            return AdapterChange(
                i, AdapterRow(self._names[i], name, as_base.shape, Kept.WHOLE, 0, *loaded, how), as_base
            )
        if M_i.rank == 0:
            alone = f"{'quantisation' if any(noise) else 'storage'} noise alone"
            return AdapterChange(i, replace(as_base, kept=Kept.NOISE, reason=how or alone))
        layer = peft_layer(kind, M_i.left, M_i.right, as_base.shape)
        # PEFT's merge is made from the very factors that will be written.
        merged = _deviation(layer.merged(base), tensor)
        row = AdapterRow(self._names[i], name, as_base.shape, Kept.LORA, layer.rank, *merged, how)
        return AdapterChange(i, row, layer=layer)

    def _fit(self, i: int, name: str, base: Tensor, tensor: Tensor, noise: _Noise) -> tuple[LowRank | None, str]:
        """The change at low rank and how it came to that, or None and why factors would not do."""
        W, W_i = matricise(base), matricise(tensor)
        told = ""
        try:
            try:
                M_i = fit_adapter(W, W_i, self._rank, self._device, noise)
            except NotLowRank:
                if not self._denoise:
                    return None, "no low rank"
                found = denoise_change(W, W_i, self._rank, self._device)
                M_i, told = found.change, f"denoised: {found.kept:.0%} of the change stands over its noise"
            outliers = outliers_of(Stack((W, W_i), torch.float64, W.device), ("the base", "the model"))
        except NonFinite as error:
            raise damaged(name, (self._base, self._specs[i])[error.model]) from None
        if M_i.rank * sum(W.shape) >= W.numel():
            return None, "no low rank"
        if not _has_float32_factors(M_i):
            return None, "a change of this size has no float32 factors"
        return M_i, "; ".join(filter(None, (told, outliers)))


def _are_equal(base: Tensor, tensor: Tensor) -> bool:
    """Whether two tensors are the same bits, or the same numbers in two float dtypes."""
    if base.dtype == tensor.dtype or not (base.is_floating_point() and tensor.is_floating_point()):
        return base.dtype == tensor.dtype and bit_identical(base, tensor) == 1
    return torch.equal(base.double(), tensor.double())


def _has_float32_factors(M_i: LowRank) -> bool:
    """Whether every column of the factors keeps its digits in float32, as PEFT loads them."""
    limits = torch.finfo(torch.float32)
    sizes = [factor.abs().amax(dim=0) for factor in (M_i.left, M_i.right)]
    return all(bool((size.ge(limits.tiny / limits.eps) & size.le(limits.max)).all()) for size in sizes)


def adapter_names(specs: Sequence[str]) -> tuple[str, ...]:
    """A directory name for each model: the last part of its path or Hub id, with a number where that is taken.

    Example:
        >>> adapter_names(["runs/a/final", "runs/b/final", "org/model@main", "one.safetensors"])
        ('final-1', 'final-2', 'model', 'one')
    """
    paths = [Path(spec if Path(spec).exists() else spec.partition("@")[0]) for spec in specs]
    names = [plain_name(path.resolve().name.removesuffix(".safetensors")) for path in paths]
    taken = [folded(name) for name in (*names, *_FILES)]
    given: list[str] = []
    for name in names:
        if taken.count(folded(name)) == 1:
            given.append(name)
            continue
        numbered = (f"{name}-{k}" for k in count(1))
        given.append(next(each for each in numbered if folded(each) not in taken))
        taken.append(folded(given[-1]))
    return tuple(given)


# Files beside the adapters, or that make a directory an adapter.
_FILES = (CARD, MARK, "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


class _Deviation(NamedTuple):
    """The part of an `AdapterRow` that says how far a merge is from the model."""

    identical: float
    largest_ulps: int
    largest_deviation: float


def _deviation(merged: Tensor, tensor: Tensor) -> _Deviation:
    same = bit_identical(merged, tensor)
    if same == 1 or not (merged.is_floating_point() and tensor.is_floating_point()):
        return _Deviation(same, 0, 0.0)
    merged = merged.to(tensor.dtype)
    largest = (merged.double() - tensor.double()).abs().max()
    return _Deviation(same, int(ulps(merged, tensor).max()), float(largest))
