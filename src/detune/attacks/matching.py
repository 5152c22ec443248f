"""Matching of neurons and heads: which of one release is which of another.

Adapters change a neuron or a head by little, in few of many directions: its twin is by far the most like it. The best
assignment as a whole is a linear problem (Kuhn's Hungarian method, by scipy). Where every place has a best partner of
its own, that is the answer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from detune._runtime import needs_extra

__all__ = ["match_heads", "match_neurons"]


def match_neurons(targets: Sequence[Tensor], sources: Sequence[Tensor], scaled: Sequence[bool]) -> Tensor:
    """The order in which one release's neurons are another's.

    Args:
        targets: Every matrix with neurons as rows, `(neurons, other)`, as the first release has it.
        sources: As the other has it.
        scaled: Whether neurons may have been scaled in each matrix, also by a negative number.

    Returns:
        `(neurons,)`: which of the source stands at each place of the target.
    """
    likeness = torch.zeros(len(targets[0]), len(targets[0]))
    for target, source, free in zip(targets, sources, scaled, strict=True):
        cosines = _unit(target) @ _unit(source).mT
        likeness += cosines.abs() if free else cosines
    return _assign(likeness)


def match_heads(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
) -> Tensor:
    """The order in which one release's heads are another's.

    Heads are told by what no choice of basis changes, `Q_h^T K_h` and `O_h V_h`; inner products of two such are traces
    of small matrices. Groups of query heads that share keys and values stay together.

    Args:
        targets: Queries `(heads, width, in)`, keys and values `(groups, width, in)`, and the output's columns
            `(heads, width, out)`, as the first release has them.
        sources: As the other has them.

    Returns:
        `(heads,)`: which of the source stands at each place of the target.
    """
    queries, keys, values, outputs = range(4)
    heads, groups = len(targets[queries]), len(targets[keys])
    shared = heads // groups
    likeness = _cosines(targets, sources, queries, keys) + _cosines(targets, sources, outputs, values)
    blocks = likeness.reshape(groups, shared, groups, shared).transpose(1, 2)
    within = [[_assign(block) for block in row] for row in blocks]
    total = torch.tensor(
        [
            [float(block[torch.arange(shared), order].sum()) for block, order in zip(row, orders, strict=True)]
            for row, orders in zip(blocks, within, strict=True)
        ]
    )
    group_order = _assign(total)
    return torch.cat([within[i][j] + j * shared for i, j in enumerate(group_order.tolist())])


def _cosines(targets: Sequence[Tensor], sources: Sequence[Tensor], one: int, other: int) -> Tensor:
    """Cosines between `one_h^T other_h` of the heads of both releases, `(heads, heads)`."""

    def products(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
        outer = torch.einsum("hdk,gek->hgde", first[one].float(), second[one].float())
        inner = torch.einsum("hdk,gek->hgde", first[other].float(), second[other].float())
        times = len(first[one]) // len(first[other])
        inner = inner.repeat_interleave(times, dim=0).repeat_interleave(times, dim=1)
        return (outer * inner).sum(dim=(2, 3))

    return products(targets, sources) / (_norms(targets, one, other)[:, None] * _norms(sources, one, other))


def _norms(matrices: Sequence[Tensor], one: int, other: int) -> Tensor:
    """The Frobenius norm of each `one_h^T other_h`."""
    first, second = matrices[one].float(), matrices[other].float()
    inner = (second @ second.mT).repeat_interleave(len(first) // len(second), dim=0)
    return ((first @ first.mT) * inner).sum(dim=(1, 2)).clamp(min=torch.finfo(torch.float32).tiny).sqrt()


def _assign(likeness: Tensor) -> Tensor:
    """The permutation of the largest sum, `order[i]` for row i."""
    best = likeness.argmax(dim=1)
    if len(best.unique()) == len(best):
        return best
    with needs_extra("audit"):
        from scipy.optimize import linear_sum_assignment

    return torch.from_numpy(linear_sum_assignment(likeness.numpy(), maximize=True)[1])


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows.float(), dim=1)
