"""The models side by side: do they fit together, and which tensors differ between them?"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import torch
from torch import Tensor

from detune.checkpoints import Checkpoint, Excerpt, is_on_hub, open_checkpoint
from detune.compatibility.low_rank_test import SMALLEST
from detune.compatibility.reading import Reading
from detune.errors import InputError

# Rows of each matrix that are looked at where a model is on the Hub: enough for adapters of rank 448 in any two models.
ROWS_ON_HUB = 1024
BLOCK_BYTES = 4 * 2**20
SAMPLE_BYTES = 4096
LISTED = 4


class Models:
    """Checkpoints that may or may not fit together. A context manager.

    Args:
        specs: Specs as `open_checkpoint` takes them, or checkpoints that are open already and are left open.
        merge_dtype: For `BASE+ADAPTER`, see `open_checkpoint`.
        rows: Rows of each matrix to look at, see `open_checkpoint`; None is all.

    Attributes:
        models: The opened checkpoints.

    Raises:
        InputError: A model cannot be read, or is given twice.
    """

    def __init__(
        self,
        specs: Sequence[str | Path | Checkpoint],
        merge_dtype: torch.dtype | None = None,
        rows: int | None = None,
    ) -> None:
        with ExitStack() as opened:
            self.models = tuple(
                spec
                if isinstance(spec, Checkpoint)
                else opened.enter_context(open_checkpoint(spec, merge_dtype=merge_dtype, rows=rows))
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
        return [path for model in self.models for path in model.places]

    @property
    def reading(self) -> Reading | None:
        """How much of the models was read so far; None where they are looked at whole."""
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


class ModelSet(Models):
    """Several checkpoints with the same tensors; the first gives the output its layout.

    Raises:
        InputError: A model cannot be read, is given twice, or does not fit the first.
    """

    def _check(self) -> None:
        for other in self.models[1:]:
            why = incompatibility(self.models[0], other)
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
    """Whether models, two at least, hold the same bytes of a tensor that has one shape in all of them.

    Of excerpts, that is said of the rows that they show.
    """
    dtypes = {model.tensors[name].dtype for model in models}
    return len(models) > 1 and len(dtypes) == 1 and (surely_shared(models, name) or _same_bytes(models, name))


def surely_shared(models: Sequence[Checkpoint], name: str) -> bool:
    """Whether it is known without reading that models hold the same bytes of a tensor."""
    keys = {model.content_key(name) for model in models}
    return len(keys) == 1 and None not in keys


def rows_to_read(specs: Sequence[str | Path], rows: int | Literal["auto", "all"]) -> int | None:
    """How many rows of each matrix to look at.

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


def incompatibility(reference: Checkpoint, other: Checkpoint) -> InputError | None:
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
    nbytes = models[0].shown_bytes(name)
    nbytes = nbytes if limit is None else min(limit, nbytes)
    # The same memory for all blocks: the system takes as long to give new memory as the comparison does.
    ours, theirs = (memoryview(bytearray(min(BLOCK_BYTES, nbytes))) for _ in range(2))
    for start in range(0, nbytes, BLOCK_BYTES):
        length = min(BLOCK_BYTES, nbytes - start)
        first = _block(models[0], name, start, length, ours)
        if not all(torch.equal(first, _block(other, name, start, length, theirs)) for other in models[1:]):
            return False
    return True


def _block(model: Checkpoint, name: str, start: int, length: int, memory: memoryview) -> Tensor:
    # Eight bytes at a time, where they divide: several times faster to compare.
    dtype = torch.int64 if length % 8 == 0 else torch.uint8
    return torch.frombuffer(model.read_bytes(name, start, length, memory), dtype=dtype)


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
    unknown = [name for name in first.tensors if not surely_shared(pair, name)]
    return all(_same_bytes(pair, name, SAMPLE_BYTES) for name in unknown) and all(
        _same_bytes(pair, name) for name in unknown
    )


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    listed = ", ".join(repr(name) for name in names[:LISTED])
    return listed + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
