"""Units of work: tensors cut into pieces."""

from collections.abc import Iterable
from itertools import groupby

from detune.compatibility.model_set import ModelSet

# A piece is this large at most, in bytes to be read: what a killed worker may do again, and how progress is told. Any
# number does.
LARGEST_BYTES = 2**30
# A piece is 32 MiB at least: it costs a message and the opening of files. Any number does.
SMALLEST_BYTES = 2**25
# Pieces between these bounds, so that workers end together: any number does that is several times theirs.
PIECES = 64


def make_units(family: ModelSet, names: Iterable[str]) -> list[tuple[str, ...]]:
    """Cut tensors into runs that lie together in one weight file, of about equal size.

    Args:
        family: The models.
        names: The tensors to cut, in file order.

    Returns:
        The names of each piece, in file order: whoever takes one reads each of its files once, from front to back.
    """
    read_bytes = {name: family.read_bytes(name) for name in names}
    wanted_bytes = min(max(sum(read_bytes.values()) // PIECES, SMALLEST_BYTES), LARGEST_BYTES)
    units = []
    for _, group in groupby(read_bytes, key=lambda name: family.reference.tensors[name].file):
        within = list(group)
        total_bytes = sum(read_bytes[name] for name in within)
        pieces = -(-total_bytes // wanted_bytes) or 1
        # A tensor belongs to the piece that its middle falls into.
        cut: dict[int, list[str]] = {}
        before_bytes = 0
        for name in within:
            middle = before_bytes + read_bytes[name] // 2
            cut.setdefault(middle * pieces // max(total_bytes, 1), []).append(name)
            before_bytes += read_bytes[name]
        units += [tuple(piece) for piece in cut.values()]
    return units
