"""Whether models hold the same bytes, found out without reading more of them than that takes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from detune.checkpoints import Checkpoint, Unmerged, raw
from detune.errors import InputError

# Bytes compared at a time, bytes compared first, and names listed: any numbers do.
BLOCK_BYTES = 4 * 2**20
SAMPLE_BYTES = 4096
LISTED = 4


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


def _same_bytes(models: Sequence[Checkpoint], name: str, limit: int | None = None) -> bool:
    nbytes = models[0].shown_bytes(name)
    nbytes = nbytes if limit is None else min(limit, nbytes)
    # All blocks use one piece of memory: the system takes as long to give new memory as the comparison does.
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


def require_distinct(first: Checkpoint, second: Checkpoint) -> None:
    """Refuse a model given twice, by path or by content."""
    same_place = [path.resolve() for path in first.paths] == [path.resolve() for path in second.paths]
    if same_place or _same_content(first, second):
        how = "the same path" if same_place else f"every tensor equals that of {second.spec}"
        raise InputError(f"{first.spec} is given twice", how, "give each model once: a copy adds no information")


def _same_content(first: Checkpoint, second: Checkpoint) -> bool:
    """Equal starts of all tensors are a suspicion, cheap to rule out; equal bytes are proof, or equal numbers."""
    if isinstance(one := raw(first), Unmerged) and isinstance(other := raw(second), Unmerged):
        # They may hold one base, and each an adapter of its own.
        first, second = one.stored, other.stored
    pair = (first, second)
    if first.tensors.keys() != second.tensors.keys():
        return False
    infos = [(first.tensors[name], second.tensors[name]) for name in first.tensors]
    if any(one.shape != other.shape for one, other in infos):
        return False
    if any(one.dtype != other.dtype for one, other in infos):
        return all(same_numbers(pair, name, 1) for name in first.tensors) and all(
            same_numbers(pair, name) for name in first.tensors
        )
    unknown = [name for name in first.tensors if not surely_shared(pair, name)]
    return all(_same_bytes(pair, name, SAMPLE_BYTES) for name in unknown) and all(
        _same_bytes(pair, name) for name in unknown
    )


def same_numbers(models: Sequence[Checkpoint], name: str, rows: int | None = None) -> bool:
    """Whether models hold the same numbers of a tensor, in whatever dtypes, in all or in the first rows."""
    shape = models[0].tensors[name].shape
    if rows is None or not shape:
        first, *others = (model.read(name) for model in models)
    else:
        first, *others = (model.read_rows(name, [slice(0, min(rows, shape[0]))]) for model in models)
    wide = torch.float32
    for tensor in (first, *others):
        wide = torch.promote_types(wide, tensor.dtype)
    return all(torch.equal(first.to(wide), other.to(wide)) for other in others)


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    listed = ", ".join(repr(name) for name in names[:LISTED])
    return listed + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
