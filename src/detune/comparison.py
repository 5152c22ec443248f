"""A recovered checkpoint against the truth, tensor by tensor."""

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from detune.checkpoints import open_checkpoint
from detune.errors import InputError
from detune.family import check_fit
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
        rows: Every tensor, in file order.
    """

    recovered: str
    truth: str
    rows: tuple[ComparisonRow, ...]

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
        rows = [asdict(row) | {"w_error": row.w_error if math.isfinite(row.w_error) else None} for row in self.rows]
        return json.dumps({"recovered": self.recovered, "truth": self.truth, "summary": self.summary, "tensors": rows})


def compare(recovered: str | Path, truth: str | Path) -> Comparison:
    """W-Error and share of bit-identical entries of every tensor.

    Args:
        recovered: A checkpoint, as `detune.checkpoints.open_checkpoint` takes it.
        truth: The base it should equal.

    Returns:
        A row for each tensor, and a summary.

    Raises:
        InputError: One cannot be read, or their tensors have other names or shapes.

    Example:
        >>> compare("recovered", "base").summary["mean_w_error"]  # doctest: +SKIP
        -16.9
    """
    return Comparison(str(recovered), str(truth), tuple(_rows(recovered, truth)))


def _rows(recovered: str | Path, truth: str | Path) -> Iterator[ComparisonRow]:
    with open_checkpoint(recovered) as ours, open_checkpoint(truth) as theirs:
        check_fit(theirs, ours)
        for name, info in theirs.tensors.items():
            a, b = ours.read(name), theirs.read(name)
            if not bool(torch.isfinite(b).all() if b.is_floating_point() else True):
                raise InputError(f"tensor {name!r} of {theirs.spec} holds NaN or Inf", "expected the base's weights")
            yield ComparisonRow(name, info.shape, w_error(a, b), bit_identical(a, b))
