"""The loop of attacks on matrices: one tensor at a time from the releases to the base's checkpoint."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from detune.checkpoints import CheckpointWriter, open_checkpoint
from detune.errors import InputError
from detune.numerics.device import full_precision
from detune.problem import Stack
from detune.problem.stack import matricise
from detune.recovery.scheduler import computing_threads

__all__ = ["rebuild"]


@full_precision()
def rebuild(models: Sequence[Path], out: Path, min_models: int, solve: Callable[[str, Stack], Tensor]) -> None:
    """Write a base: what all releases agree on as it is, matrices as solved, everything else averaged.

    Args:
        models: The releases.
        out: The directory to make, in the layout of the first.
        min_models: The fewest that the attack needs.
        solve: From a tensor's name, and its matrix of every release, to the base's, `(out, in)`.

    Raises:
        InputError: Too few models, or they do not fit together.
    """
    if len(models) < min_models:
        raise InputError(f"{len(models)} releases", f"expected at least {min_models}", "add models")
    with ExitStack() as opened:
        checkpoints = [opened.enter_context(open_checkpoint(path)) for path in models]
        first = checkpoints[0]
        writer = opened.enter_context(CheckpointWriter(first, out))
        for name, info in first.tensors.items():
            if not info.dtype.is_floating_point:
                # Positions, for instance, which some versions of a library store and others do not.
                writer.copy(name)
                continue
            if any(name not in other.tensors or other.tensors[name].shape != info.shape for other in checkpoints):
                raise InputError(f"the releases do not fit together: tensor {name!r}", "expected one architecture")
            stack = [checkpoint.read(name) for checkpoint in checkpoints]
            if all(torch.equal(tensor, stack[0]) for tensor in stack[1:]):
                writer.copy(name)
                continue
            matrices = [matricise(tensor) for tensor in stack]
            if min(matrices[0].shape) == 1:
                weight = torch.stack([matrix.double() for matrix in matrices]).mean(dim=0)
            else:
                with computing_threads(matrices[0].numel()):
                    weight = solve(name, Stack.of(matrices))
            writer.write(name, weight.reshape(info.shape))
