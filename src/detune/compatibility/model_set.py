"""The models side by side: do they fit together, and which tensors differ between them?"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from itertools import combinations
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import torch
from torch import Tensor

from detune.checkpoints import Checkpoint, Excerpt, Part, Unmerged, is_on_hub, open_checkpoint, raw
from detune.compatibility.common_tensors import find_common_tensors, view_of
from detune.compatibility.low_rank_test import SMALLEST
from detune.compatibility.quantisation_levels import level_noise
from detune.compatibility.reading import Reading
from detune.compatibility.shared import is_shared, require_distinct
from detune.errors import InputError
from detune.problem.stack import matricise

# Rows of each matrix that are looked at where a model is on the Hub: enough for adapters of rank 448 in any two
# models (derived: 7/8 of the rows are twice that).
ROWS_ON_HUB = 1024


class Models:
    """Checkpoints that may or may not fit together. A context manager.

    Args:
        specs: Specs as `open_checkpoint` takes them, or checkpoints that are open already and are left open.
        merge_dtype: For `BASE+ADAPTER`, see `open_checkpoint`.
        rows: Rows of each matrix to look at, see `open_checkpoint`; None is all.
        like: The model whose layout the others are held against, one of them or another; None is that of most.

    Attributes:
        models: The models, each by the names and in the pieces that all have; see `common_tensors`.
        common: The tensors that they have in common, and how each fits the layout.
        reference: The model of the layout by these names and in these pieces.

    Raises:
        InputError: A model cannot be read, is given twice, or its names fit in two ways.
    """

    def __init__(
        self,
        specs: Sequence[str | Path | Checkpoint],
        merge_dtype: torch.dtype | None = None,
        rows: int | None = None,
        like: str | Path | Checkpoint | None = None,
    ) -> None:
        with ExitStack() as opened:

            def opening(spec: str | Path | Checkpoint) -> Checkpoint:
                if isinstance(spec, Checkpoint):
                    return spec
                return opened.enter_context(open_checkpoint(spec, merge_dtype=merge_dtype, rows=rows))

            models = [opening(spec) for spec in specs]
            place = None
            if like is not None:
                layout = opening(like)
                paths = [[path.resolve() for path in model.paths] for model in (*models, layout)]
                place = paths.index(paths[-1])
                models += [layout] * (place == len(models))
            self.common = find_common_tensors(models, place)
            shown = self.common.shown(models)
            self.models = shown[: len(specs)]
            self.reference = shown[self.common.layout]
            self._check()
            self._opened = opened.pop_all()

    def _check(self) -> None:
        for first, second in combinations(self.models, 2):
            require_distinct(first, second)

    @property
    def layout(self) -> Checkpoint:
        """The model whose files, names, shapes and dtypes the output has, as it is stored."""
        return raw(self.reference)

    @property
    def has_base(self) -> bool:
        """Whether a model holds the base itself, beside an adapter that was not merged."""
        return any(isinstance(raw(model), Unmerged) for model in self.models)

    @property
    def paths(self) -> list[Path]:
        """The paths that belong to the models and must not be overwritten."""
        return [path for model in (*self.models, self.reference) for path in model.places]

    @property
    def reading(self) -> Reading | None:
        """The share of the models that was read so far; None where they are looked at whole."""
        excerpts = [model for model in self.models if isinstance(model, Excerpt)]
        if not excerpts:
            return None
        read_bytes = sum(model.read_total_bytes for model in excerpts)
        return Reading(excerpts[0].rows, read_bytes, sum(model.total_bytes for model in self.models))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()


class Why(StrEnum):
    """A reason to copy a tensor, and compute nothing."""

    SHARED = "identical in all models"
    BASE = "the base's own, saved beside an adapter that was not merged"
    ALONE = "no other model has it"
    NOBODY = "no model has it: that of the layout stands in"


@dataclass(frozen=True)
class Held:
    """One tensor, or one matrix of a stack, as the models of a family hold it.

    Attributes:
        tensors: The tensor of each model that has it, as read.
        models: The places of these models in the family.
        noise: For each, the root mean square error of an entry, where that is more than its dtype tells; None where it
            is not.
        added: Whether each has these rows of its own, see `Part`.
    """

    tensors: tuple[Tensor, ...]
    models: tuple[int, ...]
    noise: tuple[float | None, ...]
    added: bool = False

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "Held":
        """Take tensors for what all models of a family hold, with the noise of their dtypes."""
        return cls(tuple(tensors), tuple(range(len(tensors))), (None,) * len(tensors))


class ModelSet(Models):
    """Several checkpoints of one architecture; one of them gives the output its layout.

    Raises:
        InputError: A model cannot be read, is given twice, or does not fit the others.
    """

    def _check(self) -> None:
        for why in self.common.misfits.values():
            raise why
        super()._check()

    @property
    def n(self) -> int:
        """Number of models."""
        return len(self.models)

    @property
    def parts(self) -> Mapping[str, Part]:
        """The tensors, and the pieces of tensors, that are matrices of their own, in the file order of the layout."""
        return self.common.pieces

    @property
    def names(self) -> Iterator[str]:
        """The names of the `parts`."""
        return iter(self.parts)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that all models have."""
        return self.reference.tensors[name].shape

    def holders(self, name: str) -> tuple[int, ...]:
        """The places of the models that have it."""
        return tuple(i for i, model in enumerate(self.models) if name in model.tensors)

    def dtypes(self, name: str) -> tuple[torch.dtype, ...]:
        """The dtype in each model that has it, or that of the layout."""
        holders = [self.models[i] for i in self.holders(name)] or [self.reference]
        return tuple(model.tensors[name].dtype for model in holders)

    def read_bytes(self, name: str) -> int:
        """The bytes that are read of a tensor, of all models that have it."""
        return sum(self.models[i].shown_bytes(name) for i in self.holders(name))

    def view(self, model: Checkpoint) -> Checkpoint:
        """Another model by the family's names.

        Raises:
            InputError: It is of another architecture.
        """
        return view_of(model, self.layout, self.parts)

    def copied(self, name: str) -> Why | None:
        """The reason why a tensor is copied; None where it is not. Reads block by block up to the first difference."""
        holders = [self.models[i] for i in self.holders(name)]
        if not holders:
            return Why.NOBODY
        if any(isinstance(raw(model), Unmerged) for model in holders):
            return Why.BASE
        if self.n > 1 and len(holders) == 1:
            return Why.ALONE
        return Why.SHARED if is_shared(holders, name) else None

    def original(self, name: str) -> Checkpoint | None:
        """The model that such a tensor is copied from; None where that is the layout."""
        holders = [self.models[i] for i in self.holders(name)]
        based = [model for model in holders if isinstance(raw(model), Unmerged)]
        chosen = (based or [model for model in holders if raw(model) is self.layout] or holders or [self.reference])[0]
        return None if raw(chosen) is self.layout else chosen

    def held(self, name: str) -> Held:
        """The tensor as the models hold it."""
        holders = self.holders(name)
        models = [self.models[i] for i in holders]
        tensors = tuple(model.read(name) for model in models)
        return Held(tensors, holders, noise_of(models, name, tensors), self.parts[name].added)


def noise_of(
    models: Sequence[Checkpoint], name: str, tensors: Sequence[Tensor], *, based: bool = False
) -> tuple[float | None, ...]:
    """The noise of models' numbers where they were quantised.

    Args:
        models: The models.
        name: The tensor's name.
        tensors: What was read of it in each.
        based: Whether the first is the base of the others: it need not be quantised where they are.

    Returns:
        For each the root mean square error of an entry: told by the format, or seen where the numbers of all models lie
        on levels; None where it is the rounding to the dtype. One that lies on levels alone is another's base.
    """
    told = tuple(model.noise(name) for model in models)
    if any(noise is not None for noise in told) or any(tensor.ndim < 2 for tensor in tensors):
        return told
    seen: list[float | None] = []
    for tensor in tensors[based:]:
        seen.append(level_noise(matricise(tensor)))
        if seen[-1] is None:
            return told
    return (level_noise(matricise(tensors[0])), *seen) if based else tuple(seen)


def rows_to_read(specs: Sequence[str | Path], rows: int | Literal["auto", "all"]) -> int | None:
    """The number of rows of each matrix to look at.

    Args:
        specs: The models.
        rows: A number, "all", or "auto": `ROWS_ON_HUB` if any model is on the Hub, all otherwise.

    Returns:
        The number; None is all.

    Raises:
        InputError: Too few to tell a low rank from a full one.
    """
    if rows == "auto":
        return ROWS_ON_HUB if any(is_on_hub(spec) for spec in specs) else None
    if rows == "all":
        return None
    if rows < SMALLEST:
        raise InputError(f"{rows} rows of each matrix", f"expected {SMALLEST} at least", "leave --rows out")
    return rows


def damaged(name: str, spec: str) -> InputError:
    """The error for a tensor with NaN or Inf."""
    return InputError(
        f"tensor {name!r} of {spec} holds NaN or Inf",
        "expected finite weights",
        "that model is damaged: leave it out or copy it again",
    )
