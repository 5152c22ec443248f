"""Names matched: which tensor of one model is which of another's, where they are saved under other names.

Wrappers put words in front of names, or between them: `module.` (DataParallel), `_orig_mod.` (torch.compile), `bert.`
(the model inside its head), `base_model.model.` (PEFT), `0_Transformer/` (sentence-transformers of old). What stays the
same is how a name ends, and the tensor's shape.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

__all__ = ["Shape", "TwoWays", "align_names", "bare"]

Shape = tuple[int, ...]

# Parts that torch puts into names, which say nothing about the model.
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# Prefixes that are exchanged for one another must leave names alike in two parts, and two names: `weight` alone is what
# all names end with, and one name is no pattern (definition of an alignment).
LEAST_PARTS = 2
LEAST_NAMES = 2


class TwoWays(Exception):
    """Names align in two ways.

    Attributes:
        name: A name of the reference.
        candidates: What it may be in the other model.
    """

    def __init__(self, name: str, candidates: Sequence[str]) -> None:
        super().__init__(name)
        self.name = name
        self.candidates = tuple(candidates)


@dataclass(frozen=True)
class _Exchange:
    """The parts in front of the common end of two names.

    Attributes:
        expected: In the reference.
        found: In the other model.
    """

    expected: str
    found: str

    @property
    def is_addition(self) -> bool:
        """Whether one of the two only has more in front."""
        return not self.expected or not self.found


def align_names(reference: Mapping[str, Shape], other: Mapping[str, Shape]) -> dict[str, str]:
    """Find the tensors of another model.

    A name stands for itself where both have it. The rest is aligned by what the names end in and by shapes, prefix by
    prefix, the one that most names have first; an embedding may have another number of rows.

    Args:
        reference: Shapes by name.
        other: The names of the other model.

    Returns:
        Name in the reference to name in the other model, of those that have one there.

    Raises:
        TwoWays: Several names could be meant.

    Example:
        >>> align_names({"a.w": (2, 3), "a.b": (2,)}, {"module.a.w": (2, 3), "module.a.b": (2,)})
        {'a.w': 'module.a.w', 'a.b': 'module.a.b'}
    """
    aligned = {name: name for name in reference if name in other}
    expected = {bare(name): name for name in reference if name not in aligned}
    found = {bare(name): name for name in other if name not in aligned}
    for name in [name for name in expected if name in found]:
        aligned[expected.pop(name)] = found.pop(name)
    while expected and found:
        exchanged = _most_common(expected, found, reference, other)
        if not exchanged:
            break
        for name, its in exchanged.items():
            aligned[expected.pop(name)] = found.pop(its)
    return {name: aligned[name] for name in reference if name in aligned}


def bare(name: str) -> str:
    """A name without what torch's wrappers have put into it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _most_common(
    expected: Mapping[str, str], found: Mapping[str, str], reference: Mapping[str, Shape], other: Mapping[str, Shape]
) -> dict[str, str]:
    """The names that the most common exchange of prefixes aligns; none where no exchange is to be trusted."""
    pairs = _exchanges(expected, found, reference, other)
    trusted = [p for e, p in pairs.items() if e.is_addition or len(p) >= LEAST_NAMES]
    if not trusted:
        return {}
    most = max(map(len, trusted))
    best = [aligned for aligned in trusted if len(aligned) == most]
    for one, another in combinations(best, 2):
        _require_agreement(one, another, expected, found)
    return best[0]


def _exchanges(
    expected: Mapping[str, str], found: Mapping[str, str], reference: Mapping[str, Shape], other: Mapping[str, Shape]
) -> dict[_Exchange, dict[str, str]]:
    """The exchanges of prefixes that align some names, each with what it aligns."""
    by_end: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in found:
        for end in _ends(name):
            by_end[end].append(name)
    pairs: dict[_Exchange, dict[str, str]] = defaultdict(dict)
    for name, own in expected.items():
        for end in _ends(name):
            # A last part alone says something only where it is all of a name.
            near = by_end.get(end, ()) if len(end) >= LEAST_PARTS or end[0] == name else end if end[0] in found else ()
            alike = [each for each in near if may_be_one(reference[own], other[found[each]])]
            for each in alike:
                exchange = _Exchange(*(".".join(_parts(n)[: -len(end)]) for n in (name, each)))
                if exchange.is_addition or len(end) >= LEAST_PARTS:
                    pairs[exchange][name] = each
            if alike:
                break
    return pairs


def _require_agreement(
    one: Mapping[str, str], another: Mapping[str, str], expected: Mapping[str, str], found: Mapping[str, str]
) -> None:
    """Refuse two ways to align names that do not agree.

    Raises:
        TwoWays: A name has two partners.
    """
    for name in one:
        if another.get(name, one[name]) != one[name]:
            raise TwoWays(expected[name], [found[one[name]], found[another[name]]])
    its = {candidate: name for name, candidate in one.items()}
    for name, candidate in another.items():
        if its.get(candidate, name) != name:
            raise TwoWays(found[candidate], [expected[its[candidate]], expected[name]])


def may_be_one(shape: Shape, other: Shape) -> bool:
    """Whether two shapes may be one tensor's: equal but for the number of rows of an embedding."""
    return shape == other or (len(shape) == len(other) > 1 and shape[1:] == other[1:])


def _ends(name: str) -> list[tuple[str, ...]]:
    """The ends of a name, from the whole of it to its last part."""
    parts = _parts(name)
    return [parts[k:] for k in range(len(parts))]


def _parts(name: str) -> tuple[str, ...]:
    """The parts of a name: a slash follows the directory of a pipeline's component."""
    return tuple(re.split("[./]", name))
