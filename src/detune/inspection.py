"""What changed between the models, at which rank, and whether that can be recovered. Writes nothing."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from detune.clusters import select
from detune.errors import InputError
from detune.family import Family, Models
from detune.report import InputRow, Report, Status
from detune.solvers import Auto, NotLowRank, Stack
from detune.solvers.differences import find_differences
from detune.solving import solve_tensor
from detune.walk import Answer, OnTensor, matricise, walk


def inspect(
    models: Sequence[str | Path],
    *,
    rank: int | None = None,
    device: torch.device | str | None = None,
    merge_dtype: torch.dtype | None = None,
    on_tensor: OnTensor | None = None,
) -> Report:
    """Look at what differs between models, without writing anything.

    Args:
        models: At least two, as `detune.checkpoints.open_checkpoint` takes them.
        rank: The most that any adapter's rank can be; None finds it.
        device: Where to compute; None is the CPU.
        merge_dtype: For `BASE+ADAPTER`: merge in this dtype instead of the base's.
        on_tensor: Called with the tensor's name and None when it is begun, and with its row when it is done.

    Returns:
        A report whose rows have the ranks found, and the verdict on what `recover` would write.

    Raises:
        InputError: The models cannot be read, or too few of them fit together and share a base.
    """
    started = time.perf_counter()
    if len(models) < 2:
        raise InputError(f"{len(models)} model given", "inspect compares at least two", "add models")
    with Models(models, merge_dtype) as given:
        selection = select(given.models, min(3, len(models)))
        family = Family([given.models[i] for i in selection.members])
        rows = walk(family, lambda name: None, lambda name, tensors: _look(tensors, rank, device), on_tensor)
        inputs = tuple(
            InputRow(model.spec, model.hashes(), selection.reason(i)) for i, model in enumerate(given.models)
        )
    command = {"name": "inspect", "argv": sys.argv, "rank": rank or "auto", "device": str(device or "cpu")}
    return Report(command, inputs, tuple(rows), time.perf_counter() - started)


def _look(tensors: tuple[Tensor, ...], rank: int | None, device: torch.device | str | None) -> Answer:
    if len(tensors) > 2:
        # What `recover` would do, to the end: a rank alone does not show whether the answer fits.
        answer, _ = solve_tensor(tensors, Auto(), rank, device)
        return answer
    if not all(tensor.is_floating_point() for tensor in tensors):
        return Answer(Status.NOT_DETERMINED, "none", "not floating point")
    stack = Stack.of([matricise(tensor) for tensor in tensors], device=device)
    if min(stack.shape) == 1:
        stack.require_finite(torch.stack([W_i.double().sum() for W_i in stack.matrices]))
        return Answer(Status.AVERAGED, "mean", "a vector cannot be low-rank: it can only be averaged")
    difference = find_differences(stack, rank).of(0, 1)
    if difference.full_rank:
        why = NotLowRank((difference.pair,), stack.shape)
        return Answer(Status.NOT_DETERMINED, "none", str(why))
    reason = f"the difference has rank {difference.rank}; a third model is needed to split it"
    return Answer(Status.NOT_DETERMINED, "none", reason)
