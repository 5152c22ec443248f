"""The position of a tensor in a model, by its name."""

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Position:
    """The position of a tensor in a model.

    Attributes:
        block: The name up to its first number; empty where there is none.
        depth: Position of the block among all blocks, from 0; None without a block.
        kind: The rest of the name without "weight": which projection it is.
    """

    block: str
    depth: int | None
    kind: str


def positions(names: Iterable[str]) -> dict[str, Position]:
    """The positions of a model's tensors.

    Args:
        names: All of them, in file order.

    Returns:
        A position for each. Blocks of one prefix are ordered by their numbers, prefixes as they come.

    Example:
        >>> found = positions(["layer.10.query.weight", "layer.2.query.weight", "embed.weight"])
        >>> [(each.depth, each.kind) for each in found.values()]
        [(1, 'query'), (0, 'query'), (None, 'embed')]
    """
    parts = {name: _split(name) for name in names}
    prefixes = list(dict.fromkeys(prefix for prefix, number, _ in parts.values() if number is not None))
    blocks = sorted(
        {(prefixes.index(prefix), number) for prefix, number, _ in parts.values() if number is not None},
    )
    depths = {(prefixes[k], number): depth for depth, (k, number) in enumerate(blocks)}
    return {
        name: Position("", None, kind)
        if number is None
        else Position(f"{prefix}{number}", depths[prefix, number], kind)
        for name, (prefix, number, kind) in parts.items()
    }


def short_names(kinds: Iterable[str]) -> dict[str, str]:
    """Kinds by the fewest of their last parts that tell them apart.

    Example:
        >>> short_names(["attention.self.query", "attention.self.value"])
        {'attention.self.query': 'query', 'attention.self.value': 'value'}
    """
    wanted = list(dict.fromkeys(kinds))
    given: dict[str, str] = {}
    for kind in wanted:
        parts = kind.split(".")
        tails = (".".join(parts[-length:]) for length in range(1, len(parts) + 1))
        others = [other for other in wanted if other != kind]
        given[kind] = next(
            (tail for tail in tails if not any(f".{other}".endswith(f".{tail}") for other in others)), kind
        )
    return given


def _split(name: str) -> tuple[str, int | None, str]:
    """Prefix, first number and rest of a name."""
    found = re.match(r"(|.*?[./])(\d+)(?:[./](.*))?$", name)
    if found is None:
        return "", None, name.removesuffix(".weight") or name
    rest = found[3] or ""
    return found[1], int(found[2]), rest.removesuffix("weight").removesuffix(".") or "weight"
