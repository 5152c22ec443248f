"""The report of a run, tensor by tensor: the content of `detune.json`."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from detune._runtime import versions
from detune.certificate.verdict import Verdict
from detune.compatibility.reading import Reading
from detune.documents import document, to_json
from detune.origin import Origin


@dataclass(frozen=True)
class TensorResult:
    """The result for one tensor: a row of the report.

    Attributes:
        name: Its qualified name.
        shape: Its shape.
        dtype: Its stored dtype; several, where the models differ.
        verdict: How far it can be trusted.
        method: The solver that gave it; "copy" or "none" where none did.
        reason: How it was found, and how far it can be trusted and why, in one sentence.
        origin: Where its values come from.
        ranks: The rank found for each model that was used; the full rank for one that was left out of this tensor, and
            None for one that does not have it; empty where none was looked for.
        relative_residual: Share of the spread between the models that the answer does not explain.
        noise_ratio: The residual in units of the storage noise: 1 is the floor.
        undetermined: Dimension of the changes of the tensor that the data cannot see; 0 is unique.
        predicted_w_error: `log10` of the mean squared error to expect, from storage noise and conditioning; None where
            there is none or no telling.
        best_w_error: Lower end of the range that it is in; None, beside an upper end, where the tensor may be exact.
        worst_w_error: Upper end.
        agreement: The same figure from the disagreement of recoveries from parts of the models.
        grid: The dtype that the base was found to have been stored in.
        log10_false_positive: Logarithm of the probability that a base off that grid had passed for one on it.
        certain: Share of the entries whose bits are certain.
        trust: The part of the reason that says how far the tensor can be trusted; empty where that is all of it.
        seconds: Time taken.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    verdict: Verdict
    method: str
    reason: str
    origin: Origin
    ranks: tuple[int | None, ...] = ()
    relative_residual: float | None = None
    noise_ratio: float | None = None
    undetermined: int | None = None
    predicted_w_error: float | None = None
    best_w_error: float | None = None
    worst_w_error: float | None = None
    agreement: float | None = None
    grid: str | None = None
    log10_false_positive: float | None = None
    certain: float | None = None
    trust: str = ""
    seconds: float = 0.0

    @property
    def is_solved(self) -> bool:
        """Whether a method took the deltas out, or a model left the tensor as the base has it."""
        return self.origin.is_base

    @classmethod
    def of_json(cls, content: Mapping[str, Any]) -> "TensorResult":
        """A row again of what `asdict` made of one, by way of JSON."""
        kinds = {
            "shape": tuple(content["shape"]),
            "ranks": tuple(content["ranks"]),
            "verdict": Verdict(content["verdict"]),
            "origin": Origin(content["origin"]),
        }
        return cls(**{**content, **kinds})


@dataclass(frozen=True)
class InputRow:
    """One model of the report.

    Attributes:
        spec: As the user gave it.
        sha256: Of each weight file, by relative path.
        left_out: Why it was not used; None where it was.
        notes: What sets it apart from the others: other names, tokens or tensors.
    """

    spec: str
    sha256: dict[str, str]
    left_out: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """A whole run.

    Attributes:
        command: What ran, with its options.
        inputs: The models given.
        tensors: A row each, in file order.
        seconds: Wall time of the run.
        versions: Versions of detune, Python and torch.
        adapters: Where adapters were written too: for each, its ranks and how closely its merge gives the model back.
        reading: How much of the models was read; None where it was all.
    """

    command: dict[str, Any]
    inputs: tuple[InputRow, ...]
    tensors: tuple[TensorResult, ...]
    seconds: float
    versions: dict[str, str] = field(default_factory=versions)
    adapters: dict[str, dict[str, Any]] | None = None
    reading: Reading | None = None

    @property
    def counts(self) -> dict[Verdict, int]:
        """Number of tensors with each verdict, in the order of `Verdict`."""
        counted = Counter(row.verdict for row in self.tensors)
        return {verdict: counted[verdict] for verdict in Verdict if counted[verdict]}

    @property
    def summary(self) -> dict[str, Any]:
        """Counts, and the worst of what was recovered."""
        solved = [row for row in self.tensors if row.is_solved]
        predicted = [row.predicted_w_error for row in solved if row.predicted_w_error is not None]
        return {
            "tensors": len(self.tensors),
            **{str(verdict): self.counts.get(verdict, 0) for verdict in Verdict},
            "largest_noise_ratio": max((row.noise_ratio or 0.0 for row in solved), default=None),
            "largest_relative_residual": max((row.relative_residual or 0.0 for row in solved), default=None),
            "mean_predicted_w_error": statistics.fmean(predicted) if predicted else None,
            "worst_predicted_w_error": max(predicted, default=None),
            "worst_w_error": max((row.worst_w_error for row in solved if row.worst_w_error is not None), default=None),
            "ranks": _ranks_by_model([row for row in solved if row.ranks]),
            "seconds": self.seconds,
        }

    @property
    def content(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        return document(f"detune-{self.command['name']}/1", asdict(self) | {"summary": self.summary})

    def to_json(self) -> str:
        """The report as JSON."""
        return to_json(self.content)

    @classmethod
    def of_json(cls, content: Mapping[str, Any]) -> "Report":
        """A report again of its `content`, by way of JSON."""
        return cls(
            command=content["command"],
            inputs=tuple(InputRow(**row) for row in content["inputs"]),
            tensors=tuple(map(TensorResult.of_json, content["tensors"])),
            seconds=content["seconds"],
            versions=content["versions"],
            adapters=content["adapters"],
            reading=None if content["reading"] is None else Reading(**content["reading"]),
        )


def w_error_range(best: float | None, worst: float) -> str:
    """A range in words: "-6.9 to -4.1", or "up to -33.1" where the tensor may be exact."""
    return f"up to {worst:.1f}" if best is None else f"{best:.1f} to {worst:.1f}"


def _ranks_by_model(rows: Sequence[TensorResult]) -> list[list[int]]:
    """The ranks that occur in each model, in order."""
    return [sorted(set(ranks) - {None}) for ranks in zip(*(row.ranks for row in rows), strict=True)]
