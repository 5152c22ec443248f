"""The models side by side: do they fit together, and which tensors differ between them?"""

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


class Models:
    """Checkpoints that may or may not fit together. A context manager.

    Args:
        specs: Specs as `open_checkpoint` takes them, or checkpoints that are open already and are left open.
        merge_dtype: For `BASE+ADAPTER`, see `open_checkpoint`.

    Attributes:
        models: The opened checkpoints.

    Raises:
        InputError: A model cannot be read, or is given twice.
    """

    def __init__(self, specs: Sequence[str | Path | Checkpoint], merge_dtype: torch.dtype | None = None) -> None:
        with ExitStack() as opened:
            self.models = tuple(
                spec
                if isinstance(spec, Checkpoint)
                else opened.enter_context(open_checkpoint(spec, merge_dtype=merge_dtype))
                for spec in specs
            )
            self._check()
            self._opened = opened.pop_all()

    def _check(self) -> None:
        for first, second in combinations(self.models, 2):
            _check_distinct(first, second)

    @property
    def paths(self) -> list[Path]:
        """What on disk belongs to the models and must not be overwritten."""
        return [path for model in self.models for path in model.paths]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()


class Family(Models):
    """Several checkpoints with the same tensors; the first gives the output its layout.

    Raises:
        InputError: A model cannot be read, is given twice, or does not fit the first.
    """

    def _check(self) -> None:
        for other in self.models[1:]:
            why = misfit(self.models[0], other)
            if why is not None:
                raise why
        super()._check()

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
        return is_shared(self.models, name)

    def stack(self, name: str) -> tuple[Tensor, ...]:
        """The tensor of every model, in stored dtype and shape."""
        return tuple(model.read(name) for model in self.models)


def is_shared(models: Sequence[Checkpoint], name: str) -> bool:
    """Whether models, two at least, hold the same bytes of a tensor that has one shape in all of them."""
    dtypes = {model.tensors[name].dtype for model in models}
    return len(models) > 1 and len(dtypes) == 1 and _same_bytes(models, name)


def damaged(name: str, spec: str) -> InputError:
    """The error for a tensor with NaN or Inf."""
    return InputError(
        f"tensor {name!r} of {spec} holds NaN or Inf",
        "expected finite weights",
        "that model is damaged: leave it out or copy it again",
    )


def misfit(reference: Checkpoint, other: Checkpoint) -> InputError | None:
    """Why a model does not fit another: same names, same shapes, floats against floats; None where it does."""
    missing = [name for name in reference.tensors if name not in other.tensors]
    extra = [name for name in other.tensors if name not in reference.tensors]
    if missing or extra:
        parts = [f"lacks {some(missing)}"] * bool(missing) + [f"has in addition {some(extra)}"] * bool(extra)
        return InputError(
            f"{other.spec} does not fit {reference.spec}",
            f"it {' and '.join(parts)}",
            "give checkpoints of one architecture, merged and saved the same way",
        )
    for name, info in reference.tensors.items():
        if info.dtype.is_floating_point != other.tensors[name].dtype.is_floating_point:
            return InputError(
                f"tensor {name!r} of {other.spec} is stored as {other.tensors[name].dtype}",
                f"{reference.spec} has {info.dtype}",
                "dequantise the model, or leave it out",
            )
    differing = [name for name, info in reference.tensors.items() if info.shape != other.tensors[name].shape]
    return _other_shapes(reference, other, differing) if differing else None


def _other_shapes(reference: Checkpoint, other: Checkpoint, differing: Sequence[str]) -> InputError:
    if all(is_resized_vocabulary(reference, other, name) for name in differing):
        name = differing[0]
        return InputError(
            f"{other.spec} has a resized vocabulary",
            f"{name!r} has {other.tensors[name].shape[0]} rows, {reference.spec} has "
            f"{reference.tensors[name].shape[0]}",
            "resize the embeddings back to the base's vocabulary, or leave the model out",
        )
    shapes = [f"{name!r} {list(other.tensors[name].shape)}" for name in differing[:LISTED]]
    expected = [f"{list(reference.tensors[name].shape)}" for name in differing[:LISTED]]
    return InputError(
        f"{other.spec} does not fit {reference.spec}: {len(differing)} of its tensors have other shapes",
        f"got {', '.join(shapes)}, expected {', '.join(expected)}",
        "give checkpoints of one architecture",
    )


def is_resized_vocabulary(reference: Checkpoint, other: Checkpoint, name: str) -> bool:
    """Whether an embedding or a head differs only in its number of rows, one for each token."""
    ours, theirs = reference.tensors[name].shape, other.tensors[name].shape
    is_vocabulary = any(part in name for part in ("embed", "wte", "lm_head", "decoder"))
    return is_vocabulary and len(ours) == len(theirs) and ours[1:] == theirs[1:]


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


def _check_distinct(first: Checkpoint, second: Checkpoint) -> None:
    """Refuse a model given twice, by path or by content."""
    same_place = [path.resolve() for path in first.paths] == [path.resolve() for path in second.paths]
    if same_place or _same_content(first, second):
        how = "the same path" if same_place else f"every tensor equals that of {second.spec}"
        raise InputError(f"{first.spec} is given twice", how, "give each model once: a copy adds no information")


def _same_content(first: Checkpoint, second: Checkpoint) -> bool:
    """Equal starts of all tensors are a suspicion, cheap to rule out; equal bytes are proof."""
    ours, theirs = (
        {name: (info.dtype, info.shape) for name, info in model.tensors.items()} for model in (first, second)
    )
    if ours != theirs:
        return False
    pair = (first, second)
    return all(_same_bytes(pair, name, SAMPLE_BYTES) for name in first.tensors) and all(
        _same_bytes(pair, name) for name in first.tensors
    )


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    listed = ", ".join(repr(name) for name in names[:LISTED])
    return listed + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
