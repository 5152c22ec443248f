"""The report of an audit: the content of `audit.json`, and its schema.

The shape is that of SARIF (OASIS 2020), with fewer levels: a tool, its rules, and results that point to a rule, have a
level and a message, and lie in a tensor. Beside them stand the figures that they were drawn from.
"""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator

from detune.certificate.verdict import Trust, Verdict
from detune.checkpoints import PrivatePaths
from detune.checkpoints.entries import is_text
from detune.errors import printable
from detune.origin import Origin
from detune.recovery.report import w_error_range

__all__ = [
    "FORMAT",
    "AuditReport",
    "Behaviour",
    "Closeness",
    "Conclusion",
    "CurvePoint",
    "Invocation",
    "Level",
    "ModelEntry",
    "Outcome",
    "Result",
    "Rule",
    "Spectrum",
    "TensorEntry",
    "Tool",
    "Unchanged",
]

FORMAT: Literal["detune-audit/1"] = "detune-audit/1"

Level = Literal["error", "warning", "note"]

Closeness = Literal["exact", "floor", "approximate"]

# A range that ends no further above a prediction is what every prediction has, but for the rounding of a mean.
AS_CLOSE = 0.301


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        """Paths need be no text, and JSON is: bytes that are none stand as Python writes them."""
        if isinstance(value, str):
            return value if is_text(value) else printable(value)
        if isinstance(value, dict):
            return {cls._as_text(key): cls._as_text(each) for key, each in value.items()}
        return type(value)(map(cls._as_text, value)) if type(value) in (list, tuple) else value


class Tool(_Record):
    """The tool that made the report.

    Attributes:
        name: Always "detune".
        versions: Versions of detune and of what its figures depend on.
    """

    name: Literal["detune"] = "detune"
    versions: dict[str, str]


class Invocation(_Record):
    """The call: the command line and its options.

    Attributes:
        argv: The command line, or the program that called `audit`.
        method: The recovery with three releases and more: its name, or the solver with its options.
        rank: The most that an adapter's rank was taken to be; None found it.
        device: Where it was computed.
        seconds: Wall time.
    """

    argv: tuple[str, ...]
    method: str
    rank: int | None
    device: str
    seconds: float


class ModelEntry(_Record):
    """A release, or the base.

    Attributes:
        spec: As the user gave it.
        sha256: Of each weight file, by relative path.
        left_out: Why it was not used; None where it was.
        realigned: Whether neurons, heads or hidden bases were matched to the first release's before anything else.
    """

    spec: str
    sha256: dict[str, str]
    left_out: str | None = None
    realigned: bool = False


class Outcome(_Record):
    """One tensor as a number of releases give it.

    Attributes:
        models: How many releases were used, from the first on.
        verdict: As `recover` reports it.
        method: The solver that gave it.
        reason: One sentence.
        origin: Where its values come from.
        ranks: The rank found for each release's change; empty where none was.
        undetermined: Dimension of what the releases cannot tell; None where it was not looked at.
        grid: The dtype that the base was found to have been stored in.
        predicted_w_error: `log10` of the mean squared error to expect, without the truth.
        best_w_error: Lower end of the range that it is in; None, beside an upper end, where the tensor may be exact.
        worst_w_error: Upper end of that range.
        w_error: The W-Error against the base; None where there is none, or where all entries are equal.
        identical: Share of the entries that have the base's bits; None without the base.
        given_away: Whether the tensor counts as given away, by these releases or by fewer of them.
        seconds: Time taken.
    """

    models: int
    verdict: Verdict
    method: str
    reason: str
    origin: Origin
    ranks: tuple[int, ...] = ()
    undetermined: int | None = None
    grid: str | None = None
    predicted_w_error: float | None = None
    best_w_error: float | None = None
    worst_w_error: float | None = None
    w_error: float | None = None
    identical: float | None = None
    given_away: bool
    seconds: float

    def is_exact(self, *, measured: bool) -> bool:
        """Whether the base's own bits are back: as measured against the base, or by the verdict."""
        return self.identical == 1 if measured else self.verdict.trust is Trust.BITS

    @property
    def expected(self) -> str:
        """The W-Error to expect without the truth, in words; empty where there is none."""
        if self.worst_w_error is not None and self.verdict is Verdict.APPROXIMATE:
            return w_error_range(self.best_w_error, self.worst_w_error)
        return "" if self.predicted_w_error is None else f"{self.predicted_w_error:.2f}"


class Spectrum(_Record):
    """Singular values of the difference of the first two releases.

    Attributes:
        values: The largest ones, descending.
        rank: How many of them are the two changes, by the ranks found; None where no ranks were.
        noise: What rounding alone reaches.
    """

    values: tuple[float, ...]
    rank: int | None
    noise: float


class TensorEntry(_Record):
    """One tensor that a release changed.

    Attributes:
        name: Its qualified name.
        block: The part of the name up to its first number; empty where there is none.
        depth: Place of the block among the blocks, from 0; None without a block.
        kind: The rest of the name.
        shape: Its shape.
        dtype: As stored.
        files: The weight file of each release that was used, relative to the release.
        is_matrix: Whether a change of it can be of low rank.
        change: Root mean square of the releases' changes, from the base or else from what was recovered; None where
            neither is known.
        noise: Root mean square of what storing the releases rounded off.
        outcomes: For one release, for two, and so on.
        spectrum: For some of the tensors.
    """

    name: str
    block: str
    depth: int | None
    kind: str
    shape: tuple[int, ...]
    dtype: str
    files: tuple[str, ...] = ()
    is_matrix: bool
    change: float | None
    noise: float
    outcomes: tuple[Outcome, ...] = Field(min_length=1)
    spectrum: Spectrum | None = None


class Unchanged(_Record):
    """Tensors that are the same in all releases.

    Attributes:
        tensors: How many.
        entries: Weights in them.
        differing: Names of those that are not the base's: a part that all fine-tunes have in common.
    """

    tensors: int
    entries: int
    differing: tuple[str, ...] = ()


class CurvePoint(_Record):
    """All matrices, with a number of releases.

    Attributes:
        models: How many releases were used, from the first on.
        given_away: Matrices that count as given away.
        w_error: Mean W-Error of the matrices that are not exact; None without the base, or where all are.
        best: The lowest of them.
        worst: The highest.
        predicted_w_error: Mean of the predictions, where there are some.
        best_w_error: Mean of the lower ends of their ranges; None where some have none.
        worst_w_error: Mean of the upper ends.
        identical: Share of the matrices' entries that have the base's bits; None without the base.
    """

    models: int
    given_away: int
    w_error: float | None = None
    best: float | None = None
    worst: float | None = None
    predicted_w_error: float | None = None
    best_w_error: float | None = None
    worst_w_error: float | None = None
    identical: float | None = None

    @property
    def expected(self) -> str:
        """The W-Error to expect without the truth, in words: a range where one matrix is known to a range only."""
        close = None if self.predicted_w_error is None else self.predicted_w_error + AS_CLOSE
        if self.worst_w_error is not None and (close is None or self.worst_w_error > close):
            return w_error_range(self.best_w_error, self.worst_w_error)
        return "" if self.predicted_w_error is None else f"{self.predicted_w_error:.2f}"


class Behaviour(_Record):
    """Whether the recovered model does what the base does.

    Attributes:
        metric: What was compared; None where nothing was, and then `note` says why.
        meaning: The metric in words.
        inputs: On how many inputs.
        release: Distance of the first release from the base, or without the base from the recovered model.
        recovered: Distance of the recovered model from the base; None without the base.
        note: What could not be had.
    """

    metric: str | None = None
    meaning: str = ""
    inputs: int = 0
    release: float | None = None
    recovered: float | None = None
    note: str = ""


class Rule(_Record):
    """The subject of a result.

    Attributes:
        id: Its name in `results`.
        title: In some words.
        help: What follows from it.
    """

    id: str
    title: str
    help: str


class Result(_Record):
    """One finding.

    Attributes:
        rule_id: Id of its rule.
        level: "error": something is given away. "warning": something helps whoever wants the base. "note": neither.
        message: One sentence.
        tensor: Where; None where it is about all of them.
        holds: Whether an assumption holds; None where that could not be told.
        properties: The figures.
    """

    rule_id: str
    level: Level
    message: str
    tensor: str | None = None
    holds: bool | None = None
    properties: dict[str, JsonValue] = Field(default_factory=dict)


class Conclusion(_Record):
    """The audit in some sentences.

    Attributes:
        level: "error": every changed matrix is given away. "warning": some are. "note": none is.
        headline: One sentence.
        sentences: What to know beside it.
        next_steps: What to do about it.
        matrices: Changed matrices.
        given_away: How many of them are given away with all releases.
        one_too_many: With this release as many are given away as with all of them; None where none is.
    """

    level: Level
    headline: str
    sentences: tuple[str, ...]
    next_steps: tuple[str, ...]
    matrices: int
    given_away: int
    one_too_many: int | None


class AuditReport(_Record):
    """The whole audit.

    Attributes:
        format: Format of this file.
        tool: What made it.
        invocation: How.
        base: The owner's base; None where the certificate stands in for it.
        models: The releases in the order of the curve, with those that were left out.
        verdict: In words.
        rules: What results are about.
        results: Assumptions first, then what was found.
        curve: For one release, for two, and so on.
        unchanged: Tensors that no release changed.
        tensors: Those that one did, in file order.
        behaviour: What the recovered model does.
    """

    format: Literal["detune-audit/1"] = FORMAT
    tool: Tool
    invocation: Invocation
    base: ModelEntry | None
    models: tuple[ModelEntry, ...]
    verdict: Conclusion
    rules: tuple[Rule, ...]
    results: tuple[Result, ...]
    curve: tuple[CurvePoint, ...]
    unchanged: Unchanged
    tensors: tuple[TensorEntry, ...]
    behaviour: Behaviour

    @property
    def used(self) -> tuple[ModelEntry, ...]:
        """The releases that were not left out."""
        return tuple(model for model in self.models if model.left_out is None)

    @property
    def matrices(self) -> tuple[TensorEntry, ...]:
        """The changed tensors that are matrices."""
        return tuple(entry for entry in self.tensors if entry.is_matrix)

    def gives_away(self, closeness: Closeness = "floor") -> bool:
        """Whether the releases give something away that they changed.

        Args:
            closeness: What counts. "exact": a tensor comes back to the last bit. "floor": so it does, or as closely as
                the releases were rounded, or a recovered model does what the base does; all that has the level "error".
                "approximate": a matrix comes back in part, too.
        """
        if closeness == "exact":
            outcomes = (outcome for entry in self.tensors for outcome in entry.outcomes if outcome.given_away)
            return any(outcome.is_exact(measured=self.base is not None) for outcome in outcomes)
        return any(
            result.level == "error"
            or (closeness == "approximate" and result.rule_id == "kept" and result.level == "warning")
            for result in self.results
        )

    def as_published(self, out: Path) -> "AuditReport":
        """The record for a file in a directory: paths on this machine are named from there."""
        models = [*self.models, *((self.base,) if self.base else ())]
        places = PrivatePaths(out, [*(model.spec for model in models), *self.invocation.argv])
        return AuditReport.model_validate_json(json.dumps(places.within(json.loads(self.to_json()))))

    def to_json(self) -> str:
        """The report as it is written to `audit.json`."""
        return self.model_dump_json(indent=1) + "\n"
