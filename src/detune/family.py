"""The models side by side: do they fit together, and which tensors differ between them?"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from detune.checkpoints import Checkpoint, open_checkpoint
from detune.errors import InputError

BLOCK_BYTES = 4 * 2**20
SAMPLE_BYTES = 4096
LISTED = 4
# A stranger is called out once it stood out in this many matrices, and in most of those seen. Smaller ones than
# SMALLEST are full after a few ranks and tell nothing.
STRANGE_MATRICES = 3
SMALLEST = 64


class Family:
    """Several checkpoints with the same tensors. A context manager.

    Args:
        models: Specs as `open_checkpoint` takes them.
        merge_dtype: For `BASE+ADAPTER`, see `open_checkpoint`.

    Attributes:
        models: The opened checkpoints; the first gives the output its layout.

    Raises:
        InputError: A model cannot be read, is given twice, or does not fit the first.
    """

    def __init__(self, models: Sequence[str | Path], merge_dtype: torch.dtype | None = None) -> None:
        with ExitStack() as opened:
            self.models = tuple(opened.enter_context(open_checkpoint(spec, merge_dtype=merge_dtype)) for spec in models)
            for other in self.models[1:]:
                _check_fit(self.models[0], other)
            for first, second in combinations(self.models, 2):
                _check_distinct(first, second)
            self._opened = opened.pop_all()

    @property
    def n(self) -> int:
        """Number of models."""
        return len(self.models)

    @property
    def names(self) -> Iterator[str]:
        """The tensors, in the file order of the first model."""
        return iter(self.models[0].tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that all models have."""
        return self.models[0].tensors[name].shape

    def dtypes(self, name: str) -> tuple[torch.dtype, ...]:
        """The dtype in each model."""
        return tuple(model.tensors[name].dtype for model in self.models)

    def is_shared(self, name: str) -> bool:
        """Whether all models hold the same bytes, read block by block up to the first difference."""
        return self.n > 1 and len(set(self.dtypes(name))) == 1 and _same_bytes(self.models, name)

    def stack(self, name: str) -> tuple[Tensor, ...]:
        """The tensor of every model, in stored dtype and shape."""
        return tuple(model.read(name) for model in self.models)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()


class Strangers:
    """Watches for a model that differs from the others at full rank.

    One such matrix may be a re-initialised layer; most of them are another base or a full fine-tune.

    Args:
        specs: The models as the user gave them.
    """

    def __init__(self, specs: Sequence[str]) -> None:
        self._specs = specs
        self._seen = 0
        self._strange: list[tuple[str, tuple[tuple[int, int], ...]]] = []

    def watch(self, name: str, shape: tuple[int, ...], full_rank_pairs: tuple[tuple[int, int], ...]) -> None:
        """Note one differing tensor.

        Raises:
            InputError: It is the last straw.
        """
        if len(shape) < 2 or min(shape[0], math.prod(shape[1:])) < SMALLEST:
            return
        self._seen += 1
        if full_rank_pairs:
            self._strange.append((name, full_rank_pairs))
        if len(self._strange) >= STRANGE_MATRICES:
            self.settle()

    def settle(self) -> None:
        """Give the verdict on what was seen.

        Raises:
            InputError: More than half of the matrices have no low rank.
        """
        if 2 * len(self._strange) <= self._seen:
            return
        name, pairs = self._strange[0]
        models = set.intersection(*(set(pair) for _, pairs in self._strange for pair in pairs))
        where = f"in {len(self._strange)} of {self._seen} matrices that differ, first {name!r}"
        if len(models) == 1:
            raise InputError(
                f"{self._specs[models.pop()]} differs from the other models at full rank",
                where,
                "it has another base or was fine-tuned in full: leave it out",
            )
        raise InputError(
            f"{self._specs[pairs[0][0]]} and {self._specs[pairs[0][1]]} differ at full rank, and others too",
            where,
            "fewer than three of the models share a base: give fine-tunes of one base, merged from LoRA",
        )


def _same_bytes(models: Sequence[Checkpoint], name: str, limit: int | None = None) -> bool:
    nbytes = models[0].tensors[name].nbytes if limit is None else min(limit, models[0].tensors[name].nbytes)
    for start in range(0, nbytes, BLOCK_BYTES):
        length = min(BLOCK_BYTES, nbytes - start)
        first = _block(models[0], name, start, length)
        if not all(torch.equal(first, _block(other, name, start, length)) for other in models[1:]):
            return False
    return True


def _block(model: Checkpoint, name: str, start: int, length: int) -> Tensor:
    # Eight bytes at a time, where they divide: several times faster to compare.
    dtype = torch.int64 if length % 8 == 0 else torch.uint8
    return torch.frombuffer(model.read_bytes(name, start, length), dtype=dtype)


def _check_fit(reference: Checkpoint, other: Checkpoint) -> None:
    """Same names, same shapes, floats against floats."""
    missing = [name for name in reference.tensors if name not in other.tensors]
    extra = [name for name in other.tensors if name not in reference.tensors]
    if missing or extra:
        parts = [f"lacks {_some(missing)}"] * bool(missing) + [f"has in addition {_some(extra)}"] * bool(extra)
        raise InputError(
            f"{other.spec} does not fit {reference.spec}",
            f"it {' and '.join(parts)}",
            "give checkpoints of one architecture, merged and saved the same way",
        )
    for name, info in reference.tensors.items():
        if info.dtype.is_floating_point != other.tensors[name].dtype.is_floating_point:
            raise InputError(
                f"tensor {name!r} of {other.spec} is stored as {other.tensors[name].dtype}",
                f"{reference.spec} has {info.dtype}",
                "dequantise the model, or leave it out",
            )
    differing = [name for name, info in reference.tensors.items() if info.shape != other.tensors[name].shape]
    if not differing:
        return
    resized = [name for name in differing if _is_resized_vocabulary(reference, other, name)]
    if len(resized) == len(differing):
        name = resized[0]
        raise InputError(
            f"{other.spec} has a resized vocabulary",
            f"{name!r} has {other.tensors[name].shape[0]} rows, {reference.spec} has "
            f"{reference.tensors[name].shape[0]}",
            "resize the embeddings back to the base's vocabulary, or leave the model out",
        )
    shapes = [f"{name!r} {list(other.tensors[name].shape)}" for name in differing[:LISTED]]
    expected = [f"{list(reference.tensors[name].shape)}" for name in differing[:LISTED]]
    raise InputError(
        f"{other.spec} does not fit {reference.spec}: {len(differing)} of its tensors have other shapes",
        f"got {', '.join(shapes)}, expected {', '.join(expected)}",
        "give checkpoints of one architecture",
    )


def _is_resized_vocabulary(reference: Checkpoint, other: Checkpoint, name: str) -> bool:
    ours, theirs = reference.tensors[name].shape, other.tensors[name].shape
    is_vocabulary = any(part in name for part in ("embed", "wte", "lm_head", "decoder"))
    return is_vocabulary and len(ours) == len(theirs) and ours[1:] == theirs[1:]


def _check_distinct(first: Checkpoint, second: Checkpoint) -> None:
    """Refuse a model given twice, by path or by content."""
    same_place = [path.resolve() for path in first.paths] == [path.resolve() for path in second.paths]
    if same_place or _same_content(first, second):
        how = "the same path" if same_place else f"every tensor equals that of {second.spec}"
        raise InputError(f"{first.spec} is given twice", how, "give each model once: a copy adds no information")


def _same_content(first: Checkpoint, second: Checkpoint) -> bool:
    """Equal starts of all tensors are a suspicion, cheap to rule out; equal bytes are proof."""
    if any(first.tensors[name].dtype != second.tensors[name].dtype for name in first.tensors):
        return False
    pair = (first, second)
    return all(_same_bytes(pair, name, SAMPLE_BYTES) for name in first.tensors) and all(
        _same_bytes(pair, name) for name in first.tensors
    )


def _some(names: Sequence[str]) -> str:
    listed = ", ".join(repr(name) for name in names[:LISTED])
    return listed + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
