"""A recovered checkpoint against the truth, tensor by tensor."""

import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detune._runtime import OnStart
from detune.checkpoints import Checkpoint, open_checkpoint
from detune.documents import document, to_json
from detune.errors import InputError
from detune.metrics import bit_identical, w_error


@dataclass(frozen=True)
class ComparisonRow:
    """One tensor.

    Attributes:
        name: Its qualified name.
        shape: Its shape.
        w_error: `log10` of the mean squared error; `-inf` where equal.
        bit_identical: Share of entries equal bit for bit.
    """

    name: str
    shape: tuple[int, ...]
    w_error: float
    bit_identical: float


@dataclass(frozen=True)
class Comparison:
    """All tensors of two checkpoints.

    Attributes:
        recovered: The one compared, as the user gave it.
        truth: What it was compared with.
        rows: Every tensor that both have, in the truth's file order.
        only_recovered: Names that the truth lacks.
        only_truth: Names that the recovered checkpoint lacks.
    """

    recovered: str
    truth: str
    rows: tuple[ComparisonRow, ...]
    only_recovered: tuple[str, ...]
    only_truth: tuple[str, ...]

    @property
    def differing(self) -> tuple[ComparisonRow, ...]:
        """The tensors that are not equal in every bit."""
        return tuple(row for row in self.rows if row.bit_identical < 1)

    @property
    def summary(self) -> dict[str, Any]:
        """Figures over all tensors; W-Errors over those that differ, and null where none does."""
        errors = [row.w_error for row in self.differing if math.isfinite(row.w_error)]
        entries = sum(math.prod(row.shape) for row in self.rows)
        same = sum(row.bit_identical * math.prod(row.shape) for row in self.rows)
        worst = max(self.differing, key=lambda row: row.w_error, default=None)
        return {
            "tensors": len(self.rows),
            "identical_tensors": len(self.rows) - len(self.differing),
            "mean_w_error": statistics.fmean(errors) if errors else None,
            "worst_w_error": worst.w_error if worst and errors else None,
            "worst_tensor": worst.name if worst else None,
            "bit_identical": same / entries if entries else 1.0,
        }

    def to_json(self) -> str:
        """The comparison as JSON; `-inf` becomes null."""
        return to_json(document("detune-compare/1", asdict(self) | {"summary": self.summary}))


def compare(
    recovered: str | Path,
    truth: str | Path,
    *,
    on_start: OnStart | None = None,
    on_tensor: Callable[[str, ComparisonRow | None], None] | None = None,
) -> Comparison:
    """W-Error and share of bit-identical entries of every tensor.

    Args:
        recovered: A checkpoint, as `detune.checkpoints.open_checkpoint` takes it.
        truth: The base it should equal.
        on_start: For progress: called once with the tensors, and what is read of each in bytes.
        on_tensor: Called with a tensor's name and None when it is begun, and with its row when it is done.

    Returns:
        A row for each tensor, and a summary.

    Raises:
        InputError: One cannot be read, their shapes differ, or they have no names in common.

    Example:
        >>> compare("recovered", "base").summary["mean_w_error"]  # doctest: +SKIP
        -16.9
    """
    with open_checkpoint(recovered) as ours, open_checkpoint(truth) as theirs:
        common = [name for name in theirs.tensors if name in ours.tensors]
        if not common:
            raise InputError(
                f"{ours.spec} and {theirs.spec} have no tensor in common",
                f"got {next(iter(ours.tensors))!r} ..., expected {next(iter(theirs.tensors))!r} ...",
                "give checkpoints of one architecture, saved from the same class",
            )
        if on_start:
            on_start({name: ours.shown_bytes(name) + theirs.shown_bytes(name) for name in common})
        rows = []
        for name in common:
            if on_tensor:
                on_tensor(name, None)
            rows.append(_row(ours, theirs, name))
            if on_tensor:
                on_tensor(name, rows[-1])
        return Comparison(
            ours.spec,
            theirs.spec,
            tuple(rows),
            tuple(name for name in ours.tensors if name not in theirs.tensors),
            tuple(name for name in theirs.tensors if name not in ours.tensors),
        )


def _row(ours: Checkpoint, theirs: Checkpoint, name: str) -> ComparisonRow:
    shape, expected = ours.tensors[name].shape, theirs.tensors[name].shape
    if shape != expected:
        raise InputError(
            f"tensor {name!r} of {ours.spec} has shape {list(shape)}",
            f"{theirs.spec} has {list(expected)}",
            "give checkpoints of one architecture",
        )
    recovered, truth = ours.read(name), theirs.read(name)
    for model, tensor in ((ours, recovered), (theirs, truth)):
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise InputError(
                f"tensor {name!r} of {model.spec} holds NaN or Inf", "expected finite weights", "copy it again"
            )
    return ComparisonRow(name, expected, w_error(recovered, truth), bit_identical(recovered, truth))


def _is_finite(tensor: Tensor) -> bool:
    # A sum shows NaN and Inf at a fiftieth of the time of a look at all entries; it may overflow itself.
    if tensor.element_size() > 1 and bool(torch.isfinite(tensor.sum())):
        return True
    return bool(torch.isfinite(tensor).all())
