"""From models on disk to their tree: some rows of some matrices are read, and nothing else."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from detune._runtime import use_threads
from detune.checkpoints import Checkpoint, Excerpt
from detune.compatibility.groups import tells
from detune.compatibility.low_rank_test import sample
from detune.compatibility.mismatch import CLOSE
from detune.compatibility.model_set import Models, damaged, rows_to_read
from detune.compatibility.name_patterns import grouped, pattern_of
from detune.compatibility.quantisation_levels import level_noise
from detune.errors import InputError
from detune.lineage.describe import describe_tree
from detune.lineage.geometry import Geometry
from detune.lineage.tree import Lineage, Node
from detune.problem.outliers import Outliers
from detune.problem.stack import Stack, matricise

# Matrices looked at, of all kinds in turn, and rows and columns of each: any numbers do, they bound the time.
MATRICES = 12
SIZE = 256


def find_lineage(
    models: Sequence[str | Path],
    *,
    merge_dtype: torch.dtype | None = None,
    rows: int | Literal["auto", "all"] = "auto",
) -> Lineage:
    """Draw the tree of some models: which is whose parent, and which ancestors are none of them. Writes nothing.

    Args:
        models: At least two, as `detune.checkpoints.open_checkpoint` takes them. They need not fit together.
        merge_dtype: For `BASE+ADAPTER`: merge in this dtype instead of the base's.
        rows: Where a model is on the Hub, see `detune.check_family`; of some matrices 256 rows are looked at.

    Returns:
        The tree, with what each edge is, how sure its direction is, and what an ancestor can be recovered from. Several
        trees where bases differ, and none where no matrix does.

    Raises:
        InputError: A model cannot be read, is given twice, or holds NaN or Inf where it was looked at.

    Example:
        >>> lineage = find_lineage(["base", "sft", "dpo-a", "dpo-b"])  # doctest: +SKIP
        >>> [(node.name, node.parent, node.edge) for node in lineage.nodes]  # doctest: +SKIP
        [('base', None, ''), ('sft', 'base', 'LoRA of rank 16'), ('dpo-a', 'sft', 'LoRA of rank 8'), ...]
    """
    started = time.perf_counter()
    if len(models) < 2:
        raise InputError(f"{len(models)} model given", "a tree has at least two", "add models")
    with Models(models, merge_dtype, rows_to_read(models, rows)) as given, use_threads(1):
        fitting = [i for i in given.common.fitting if i < len(models)]
        chosen = [given.models[i] for i in fitting]
        names = [name for name in given.common.pieces if all(_tells(model, name) for model in chosen)]
        geometry = _look(chosen, names)
        tokens = [_tokens(given, i) for i in fitting]
        unrelated = tuple(given.models[i].spec for i in given.common.misfits if i < len(models))
        specs = [model.spec for model in chosen]
        nodes: list[Node] = []
        if geometry is None:
            return Lineage((), unrelated, 0, time.perf_counter() - started)
        short = _short_names(specs)
        for places in _trees(geometry):
            nodes += describe_tree(
                geometry.part(places),
                [(specs[i], short[i]) for i in places],
                [tokens[i] for i in places],
                {node.name for node in nodes} | set(short),
            )
    return Lineage(tuple(nodes), unrelated, len(geometry.blocks), time.perf_counter() - started)


def _look(models: Sequence[Checkpoint], names: Sequence[str]) -> Geometry | None:
    """Read a block of some matrices that are not the same in all models; None where there are none."""
    blocks, noise = [], []
    for name in _in_turn(names):
        rows = [
            matricise((model if isinstance(model, Excerpt) else Excerpt(model, SIZE)).read(name)) for model in models
        ]
        found = [sample(each, SIZE) for each in rows]
        if all(torch.equal(found[0], each) for each in found[1:]):
            continue
        for model, block in zip(models, found, strict=True):
            if not bool(torch.isfinite(block).all()):
                raise damaged(name, model.spec)
        blocks.append(_tame(found))
        noise.append([model.noise(name) or level_noise(each) for model, each in zip(models, rows, strict=True)])
        if len(blocks) == MATRICES:
            break
    return Geometry(blocks, noise) if blocks else None


def _tame(block: list[Tensor]) -> list[Tensor]:
    """A block of every model, with what the others hold in place of outliers: one alone would decide distances."""
    stack = Stack(tuple(block), torch.float64, block[0].device)
    outliers = Outliers.of(stack)
    return (
        block if outliers is None else list(outliers.filled(stack, outliers.foretold(stack, lambda part: ())).matrices)
    )


def _tells(model: Checkpoint, name: str) -> bool:
    return name in model.tensors and tells(model, name)


def _in_turn(names: Sequence[str]) -> Iterator[str]:
    """The tensors in an order in which patterns take turns, and in each those far apart come first."""
    shuffled = [[group[k] for k in _far_apart(len(group))] for group in grouped(names, pattern_of).values()]
    for k in range(max(map(len, shuffled), default=0)):
        yield from (group[k] for group in shuffled if k < len(group))


def _far_apart(count: int) -> list[int]:
    """All places in an order such that the first few are spread: by their digits in base 2, from behind."""
    bits = max(1, (count - 1).bit_length())
    return sorted(range(count), key=lambda place: f"{place:0{bits}b}"[::-1])


def _tokens(given: Models, model: int) -> int:
    """The number of tokens of a model, less those of the layout."""
    fit = given.common.fits[model]
    layout = given.layout.tensors
    return max((rows - layout[name].shape[0] for name, rows in fit.resized.items()), default=0, key=abs) if fit else 0


def _short_names(specs: Sequence[str]) -> list[str]:
    """The last part of each path, where that is enough."""
    short = [Path(spec).name or spec for spec in specs]
    return [name if short.count(name) == 1 else spec for name, spec in zip(short, specs, strict=True)]


def _trees(geometry: Geometry) -> list[list[int]]:
    """The models by what their weights have in common at all, the largest tree first."""
    trees: list[list[int]] = []
    for i in range(geometry.n):
        near = [tree for tree in trees if any(float(geometry.cosines[i, j]) > CLOSE for j in tree)]
        trees = [tree for tree in trees if tree not in near] + [sorted(sum(near, [i]))]
    return sorted(trees, key=lambda tree: (-len(tree), tree))
