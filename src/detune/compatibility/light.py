"""Who changed a tensor, by its bits: where deltas are below a step of half precision, a rank hardly shows.

A merge whose delta is below half a step returns the base's own number; it changes the entries of small weights alone.
Of three models, the entries in which j and k both differ from i lie on one side of it where model i is the one that
changed, and on either side as often as on the other where it is not and the changes of j and k have nothing in common.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median

import torch
from torch import Tensor

from detune.checkpoints import Checkpoint, Excerpt
from detune.compatibility.model_set import noise_of
from detune.compatibility.name_patterns import grouped, pattern_of
from detune.compatibility.shared import is_shared
from detune.numerics.float_grid import HALVES
from detune.problem.stack import matricise

# Rows of a matrix that are looked at: four thousand entries even of 64 columns, of which a share is known to a per cent
# (derived).
ROWS = 64
# Models are light that differ in less than two entries of three, each from the others: where two models changed a
# share c of the entries each, they differ in about 1 - (1 - c)^2 of them, so that most of each one's are the base's own
# (derived: c = 0.42).
LIGHT = 2 / 3
# A model left a matrix alone that seems to have changed fewer entries than a fifth of what the others did. On four
# LoRAs of a language model and their base (`benchmarks/llm_models.py`), three at a time, a model that left one alone
# had -0.04 to 0.21 of it, at most 0.14 in nineteen matrices of twenty, by what the others have in common; one that
# changed it had 0.33 and more where the others had changed up to three times as much
# (measured).
LEFT_ALONE = 0.2
# Entries of all models together that are looked at: any number does, it bounds memory.
ENTRIES = 1 << 18
# Tensors of a pattern whose ranks are looked for although deltas are light: any number does, it bounds time.
EACH = 3
BELOW_A_STEP = "deltas are below a step of half precision, where a full fine-tune cannot be told from LoRA"


@dataclass(frozen=True)
class BitChange:
    """The differences of models' versions of a tensor, bit by bit.

    Attributes:
        changed: For each model whether it changed the tensor, as far as the others show.
        light: Whether all are in half precision and so close that most entries are the base's own.
    """

    changed: tuple[bool, ...]
    light: bool


def find_bit_change(models: Sequence[Checkpoint], name: str) -> BitChange:
    """Compare some rows of a tensor that is not identical in all models.

    Args:
        models: Those that have it, in one shape; two at least.
        name: The tensor.

    Returns:
        Who changed it. Two models of which one left it alone cannot be told apart: both count as changed.
    """
    rows = [matricise(_some_rows(model).read(name)) for model in models]
    # Quantised models are equal in most entries for another reason.
    light = is_light(rows) and not any(noise_of(models, name, rows))
    groups = _identical(models, rows, name)
    largest = max(groups, key=len)
    if len(largest) > 1:
        changed = tuple(i not in largest for i in range(len(models)))
    elif light and len(models) > 2:
        changed = changed_in_part(rows)
    else:
        changed = (True,) * len(models)
    return BitChange(changed, light)


def is_light(matrices: Sequence[Tensor]) -> bool:
    """Whether matrices in half precision, two at least, are equal in a third of the entries, each to the others.

    That is on average over the others: among many models a pair beyond it is no sign that their deltas are larger.
    """
    dtypes = {matrix.dtype for matrix in matrices}
    if len(dtypes) > 1 or not dtypes <= set(HALVES) or min(matrices[0].shape) == 1:
        return False
    # As integers: processors compare those several times as fast as numbers in half precision.
    bits = _some_entries([matrix[:ROWS] for matrix in matrices]).view(torch.int16)
    differing = [0] * len(bits)
    for i, j in combinations(range(len(bits)), 2):
        count = int(bits[i].ne(bits[j]).count_nonzero())
        differing[i] += count
        differing[j] += count
    return max(differing) < LIGHT * bits[0].numel() * (len(bits) - 1)


def changed_in_part(matrices: Sequence[Tensor]) -> tuple[bool, ...]:
    """For each of three versions or more of a matrix, no two alike, whether it differs from what the others share.

    Args:
        matrices: `(rows, in)` each, some rows of all.
    """
    n = len(matrices)
    flat = _some_entries(matrices).float()
    sizes = []
    for i in range(n):
        others = [j for j in range(n) if j != i]
        apart = (flat[others] - flat[i]).sign()
        products = (apart @ apart.mT)[*torch.triu_indices(n - 1, n - 1, 1)]
        sizes.append(float(products.median().clamp(min=0)))
    return tuple(sizes[i] > LEFT_ALONE * median(size for j, size in enumerate(sizes) if j != i) for i in range(n))


def _some_entries(matrices: Sequence[Tensor]) -> Tensor:
    """Entries at the same places of all matrices, at regular distances, `(n, entries)`: fewer of each of more."""
    every = max(1, len(matrices) * matrices[0].numel() // ENTRIES)
    return torch.stack([matrix.flatten()[::every] for matrix in matrices])


def some_of_each_pattern(shapes: Mapping[str, Sequence[int]]) -> set[str]:
    """Choose a few tensors of each pattern and shape, the first, the last and some between.

    Args:
        shapes: Shape of each tensor, in order.
    """
    groups = grouped(shapes, lambda name: (pattern_of(name), tuple(shapes[name])))
    return {names[round(k * (len(names) - 1) / (EACH - 1))] for names in groups.values() for k in range(EACH)}


def _some_rows(model: Checkpoint) -> Checkpoint:
    return model if isinstance(model, Excerpt) else Excerpt(model, ROWS)


def _identical(models: Sequence[Checkpoint], rows: Sequence[Tensor], name: str) -> list[list[int]]:
    """The models by the bytes that they hold."""
    groups: list[list[int]] = []
    for i, own in enumerate(rows):
        for group in groups:
            first = group[0]
            alike = own.dtype == rows[first].dtype and torch.equal(own, rows[first])
            if alike and is_shared([models[first], models[i]], name):
                group.append(i)
                break
        else:
            groups.append([i])
    return groups
