"""Vocabularies of different sizes: tensors with a row for each token, of which models share the first.

Fine-tunes add tokens, or pad their number to a multiple. Rows that models share are compared and solved as the base's;
rows that each has by itself are not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from detune.checkpoints import Checkpoint, Part, TensorInfo, View

__all__ = [
    "cut_vocabulary",
    "first_own_row",
    "held_rows",
    "is_vocabulary",
    "resized_rows",
    "vocabulary_sizes",
]

# Names of embeddings and heads, with a row for each token.
VOCABULARY = ("embed", "wte", "lm_head", "decoder", "predictions")
# Rows at the end that are looked at for tokens that every model has added: any numbers do that end above the tokens
# anybody adds; if more differ, they were trained.
LOOKED_AT = (1, 32, 1024)


def vocabulary_sizes(layout: Checkpoint, model: Checkpoint, names: Mapping[str, str]) -> set[tuple[int, int] | None]:
    """Numbers of tokens, in the layout and in the model, where they differ.

    Args:
        layout: The model that the other is held against.
        model: The other.
        names: Its own name for each of the layout's.
    """
    return {
        resized_rows(layout.tensors[name], model.tensors[own])
        for name, own in names.items()
        if is_vocabulary(name) and len(layout.tensors[name].shape) > 1
    } - {None}


def is_vocabulary(name: str) -> bool:
    """Whether a tensor is called as those are that have a row for each token."""
    return any(part in name for part in VOCABULARY)


def resized_rows(expected: TensorInfo, info: TensorInfo) -> tuple[int, int] | None:
    """The numbers of rows of two tensors that have only those different."""
    ours, theirs = expected.shape, info.shape
    alike = bool(ours) and len(ours) == len(theirs) and ours[1:] == theirs[1:]
    return (ours[0], theirs[0]) if alike and ours[0] != theirs[0] else None


def first_own_row(holders: Sequence[View], name: str) -> int | None:
    """The row from which on each model has its own, of those that all have; None where there are none such, or many.

    Tokens that every model has added by itself are no rows of the base's, and need not be looked at with the others.
    """
    rows = min((holder.tensors[name].shape[0] for holder in holders), default=0)
    alike = {(holder.tensors[name].shape[1:], holder.tensors[name].dtype) for holder in holders}
    if len(holders) < 2 or len(alike) != 1 or len(holders[0].tensors[name].shape) != 2:
        return None
    for count in LOOKED_AT:
        start = max(0, rows - count)
        shared = _equal_rows(holders, name, slice(start, rows)).nonzero()
        if len(shared):
            first = start + int(shared[-1]) + 1
            return first if first < rows else None
    return None


def cut_vocabulary(info: TensorInfo, shapes: Sequence[Sequence[int]], own: int | None) -> dict[str, Part]:
    """Cut a tensor where a model's rows end, by name; one that all have with as many rows stays whole.

    Args:
        info: The tensor of the layout.
        shapes: Its shape in each model.
        own: The row from which on each has its own, see `first_own_row`.
    """
    name = info.name
    fewer = {shape[0] for shape in shapes if shape and shape[0] < info.shape[0] and shape[1:] == info.shape[1:]}
    starts = sorted({*fewer, own or 0} - {0})
    if not starts:
        return {name: Part(name)}
    cuts = (0, *starts, info.shape[0])
    return {
        f"{name}[{start}:{stop}]": Part(name, start, stop, added=own is not None and start >= own)
        for start, stop in pairwise(cuts)
    }


def held_rows(piece: Part, expected: Sequence[int], rows: int, own: str) -> Part | None:
    """A piece of the layout's tensor in a model; None where the model's rows end before the piece does.

    Args:
        piece: Of `cut_vocabulary`.
        expected: Shape of the layout's tensor.
        rows: Rows of the model's.
        own: The model's name for it.
    """
    stop = piece.rows(expected).stop
    return replace(piece, tensor=own, stop=stop) if rows >= stop else None


def _equal_rows(holders: Sequence[View], name: str, rows: slice) -> Tensor:
    """A mask of the rows that have the same bytes in all models, `(rows,)`, bool."""
    first, *others = (holder.read_rows(name, [rows]).contiguous().view(torch.uint8).flatten(1) for holder in holders)
    return torch.stack([first.eq(other).all(dim=1) for other in others]).all(dim=0)
