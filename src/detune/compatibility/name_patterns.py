"""Tensors whose names differ only in their numbers: tables show them in one row, with their ranks as a span."""

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Protocol, TypeVar

__all__ = ["by_pattern", "counted", "grouped", "pattern_of", "span", "spans"]


class _Named(Protocol):
    @property
    def name(self) -> str: ...


class _Ranked(Protocol):
    @property
    def ranks(self) -> Sequence[int | None]: ...


Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)
Row = TypeVar("Row", bound=_Named)


def pattern_of(name: str) -> str:
    """The name with a star for each number.

    Example:
        >>> pattern_of("model.layers.11.mlp.up_proj.weight")
        'model.layers.*.mlp.up_proj.weight'
    """
    return re.sub(r"\d+", "*", name)


def grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """The items with each key, in their order."""
    groups: dict[Key, list[Item]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(groups)


def by_pattern(rows: Iterable[Row], key: Callable[[Row], object]) -> dict[tuple[str, object], list[Row]]:
    """Put rows together whose names have one pattern.

    Args:
        rows: In any order.
        key: What else rows of a group have in common.

    Returns:
        The rows of each group, by its pattern and the key; one alone keeps its own name.
    """
    groups = grouped(rows, lambda row: (pattern_of(row.name), key(row)))
    return {(group[0].name if len(group) == 1 else pattern, k): group for (pattern, k), group in groups.items()}


def counted(pattern: str, rows: Sequence[object]) -> str:
    """A pattern with the number of its rows, where there is more than one.

    Example:
        >>> counted("layer.*.weight", [1, 2, 3])
        'layer.*.weight ×3'
    """
    return f"{pattern} ×{len(rows)}" if len(rows) > 1 else pattern


def spans(rows: Sequence[_Ranked]) -> list[str]:
    """The ranks of each model over some tensors; a dash where it does not have them, or not the family's."""
    found = []
    for ranks in zip(*(row.ranks for row in rows if row.ranks), strict=False):
        known = [rank for rank in ranks if rank is not None]
        found.append(span(known) or "-")
    return found


def span(numbers: Iterable[int]) -> str:
    """The smallest and the largest of some numbers.

    Example:
        >>> span([8, 16, 8]), span([4, 4]), span([])
        ('8-16', '4', '')
    """
    known = sorted(set(numbers))
    return "" if not known else f"{known[0]}" if len(known) == 1 else f"{known[0]}-{known[-1]}"
