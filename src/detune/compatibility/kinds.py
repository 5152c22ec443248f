"""Tensors by kind, as tables show them: those whose names differ only in their numbers, and ranks as spans."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

__all__ = ["by_kind", "pattern_of", "span", "spans"]


class _Named(Protocol):
    @property
    def name(self) -> str: ...


class _Ranked(Protocol):
    @property
    def ranks(self) -> Sequence[int | None]: ...


Row = TypeVar("Row", bound=_Named)


def by_kind(rows: Iterable[Row], key: Callable[[Row], object]) -> dict[tuple[str, object], list[Row]]:
    """Put rows together whose names differ only in numbers.

    Args:
        rows: In any order.
        key: What else rows of a kind have in common.

    Returns:
        The rows of each kind, by its pattern and the key; one alone keeps its own name.
    """
    kinds: dict[tuple[str, object], list[Row]] = defaultdict(list)
    for row in rows:
        kinds[re.sub(r"\d+", "*", row.name), key(row)].append(row)
    return {(group[0].name if len(group) == 1 else pattern, k): group for (pattern, k), group in kinds.items()}


def pattern_of(pattern: str, rows: Sequence[object]) -> str:
    """The pattern of a kind with the number of its rows, where there is more than one.

    Example:
        >>> pattern_of("layer.*.weight", [1, 2, 3])
        'layer.*.weight ×3'
    """
    return f"{pattern} ×{len(rows)}" if len(rows) > 1 else pattern


def spans(rows: Sequence[_Ranked]) -> list[str]:
    """The ranks of each model over tensors of a kind; a dash where it does not have them, or not the family's."""
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
