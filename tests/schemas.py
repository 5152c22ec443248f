"""The schemas of docs/schemas: `python -m tests.schemas` writes them anew.

A report is a dataclass, and its JSON its fields with some figures that follow from them. pydantic reads the types; the
descriptions are those of the docstrings.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

import jsonschema
from pydantic import BaseModel, ConfigDict, Field, JsonValue, create_model
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from detune.adapters.extract import Extraction
from detune.audit.record import AuditReport
from detune.bench.catalogue import Catalogue
from detune.bench.defences.result import RowResult
from detune.bench.table import TableRow
from detune.checkpoints.push import Pushed
from detune.defences.release import Defended
from detune.lineage import Family
from detune.packing.packer import PackReport
from detune.packing.unpacker import UnpackReport
from detune.plan import Plan
from detune.recovery.compare import Comparison
from detune.recovery.report import Report

FOLDER = Path(__file__).parents[1] / "docs" / "schemas"


class ReportSummary(BaseModel):
    """Counts, and the worst of what was recovered.

    Attributes:
        tensors: How many there are.
        shared: Tensors identical in all models.
        exact: Tensors with the base's own bits.
        approximate: Tensors whose error is known to a range only.
        averaged: Tensors that are the mean of the models.
        largest_noise_ratio: The largest residual, in units of the storage noise.
        largest_relative_residual: The largest share of the spread between the models that an answer does not explain.
        mean_predicted_w_error: Mean of the predictions.
        worst_predicted_w_error: The largest of them.
        worst_w_error: The largest upper end of a range.
        ranks: The ranks that occur in each model.
        seconds: Wall time.
    """

    tensors: int
    shared: int
    exact: int
    floor: int = Field(
        alias="to the storage floor", description="Tensors as close as the models' rounding lets any method come."
    )
    approximate: int
    averaged: int
    undetermined: int = Field(alias="not determined", description="Tensors whose answer the models do not hold.")
    largest_noise_ratio: float | None
    largest_relative_residual: float | None
    mean_predicted_w_error: float | None
    worst_predicted_w_error: float | None
    worst_w_error: float | None
    ranks: list[list[int]]
    seconds: float


class ComparisonSummary(BaseModel):
    """Figures over all tensors.

    Attributes:
        tensors: How many both have.
        identical_tensors: Those that are equal in every bit.
        mean_w_error: Over those that differ; null where none does.
        worst_w_error: The largest of them.
        worst_tensor: Where that is.
        bit_identical: Share of all entries equal bit for bit.
    """

    tensors: int
    identical_tensors: int
    mean_w_error: float | None
    worst_w_error: float | None
    worst_tensor: str | None
    bit_identical: float


class AdapterSummary(BaseModel):
    """An adapter, and how closely PEFT's merge of it gives the model back.

    Attributes:
        changed: Tensors that differ from the base's.
        whole: Those kept as they are.
        ranks: The ranks that occur.
        identical_of_changed: Share of the changed tensors' entries that have the model's bits.
        identical: Share of all entries that do.
        largest_ulps: The largest deviation, in units in the last place.
        largest_deviation: The largest as a number.
    """

    changed: int
    lora: int = Field(alias="LoRA", description="Those kept as a LoRA.")
    whole: int
    not_kept: int = Field(alias="not kept", description="Those that differ by storage noise alone.")
    left_out: int = Field(alias="left out", description="Those that PEFT has no place for.")
    ranks: list[int]
    identical_of_changed: float
    identical: float
    largest_ulps: int
    largest_deviation: float


@dataclass(frozen=True)
class DefenceRow(RowResult):
    """A defence, with what follows from its attacks.

    Attributes:
        name: What the table calls it.
        defence: With its settings.
        models: Number of releases.
        accuracy: Task accuracy of the defended releases.
        undefended_accuracy: The same without a defence.
        undefended_w_error: W-Error of the average of as many releases without a defence.
        undefended_embeddings: The same average's distance by embeddings.
        attacks: Each attack.
        cost: The share of the task accuracy that is lost.
        times_closer: How many times closer to the base the best attack comes than averaging undefended releases does;
            null where none gave an answer.
        outcome: Whether it survives.
    """

    cost: float = 0.0
    times_closer: float | None = None
    outcome: Literal["survives", "broken partly", "broken", "no answer"] = "survives"


class BenchTable(BaseModel):
    """The tables of a folder of results.

    Attributes:
        rows: Means over the draws.
        remarks: What to know beside the figures.
    """

    rows: list[TableRow]
    remarks: list[str]


class BenchDefences(BaseModel):
    """The table of defences and attacks.

    Attributes:
        rows: One for each defence.
    """

    rows: list[DefenceRow]


class Demonstration(BaseModel):
    """The figures and answers of the demonstration.

    Attributes:
        fine_tunes: Each fine-tune against the base, over the matrices that were fine-tuned.
        methods: Each method's model against it.
        questions: What the models were asked.
        answers: Of each.
        seconds: Wall time.
    """

    fine_tunes: dict[str, ComparisonSummary]
    methods: dict[str, ComparisonSummary]
    questions: list[str]
    answers: dict[str, list[str]]
    seconds: float


@dataclass(frozen=True)
class Output:
    """The output of a command.

    Attributes:
        report: Whose fields it has.
        more: Types of what follows from them, or of a field that says little itself, by name.
        version: Of its format.
    """

    report: type
    more: dict[str, Any] = field(default_factory=dict)
    version: int = 1


_REPORT = Output(
    Report,
    {
        "summary": ReportSummary,
        "command": dict[str, JsonValue],
        "adapters": dict[str, AdapterSummary] | None,
    },
)
# The key is the name in the format; the command has spaces for hyphens.
OUTPUTS = {
    "recover": _REPORT,
    "inspect": _REPORT,
    "family": Output(Family),
    "compare": Output(Comparison, {"summary": ComparisonSummary}),
    "extract": Output(Extraction, {"versions": dict[str, str], "summary": dict[str, AdapterSummary]}),
    "pack": Output(PackReport, {"ratio": float, "zstd_ratio": float}),
    "unpack": Output(UnpackReport),
    "push": Output(Pushed),
    "plan": Output(Plan, {"seconds": float}),
    "audit": Output(AuditReport),
    "defend": Output(Defended, {"settings": dict[str, JsonValue]}),
    "demo": Output(Demonstration),
    "bench-list": Output(Catalogue),
    "bench-table": Output(BenchTable),
    "bench-defences": Output(BenchDefences, version=2),
}


class _Schema(GenerateJsonSchema):
    def float_schema(self, schema: core_schema.FloatSchema) -> JsonSchemaValue:
        """Null stands for a number that is not finite."""
        return {**super().float_schema(schema), "type": ["number", "null"]}

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        """Null is said once."""
        inner = self.generate_inner(schema["schema"])
        return inner if isinstance(inner.get("type"), list) else super().nullable_schema(schema)


def schema_of(name: str) -> dict[str, Any]:
    """Return the schema of a command's JSON; fields that a later version adds do not break it."""
    output = OUTPUTS[name]
    types = get_type_hints(output.report) | output.more
    model = create_model(
        output.report.__name__,
        __config__=ConfigDict(json_schema_serialization_defaults_required=True),
        __doc__=output.report.__doc__,
        **{
            "format": (Literal[f"detune-{name}/{output.version}"], ...),
            **{key: (kind, ...) for key, kind in types.items() if not key.startswith("model_")},
        },
    )
    schema = model.model_json_schema(mode="serialization", schema_generator=_Schema)
    for node in _objects(schema):
        node.pop("additionalProperties", None)
        _describe(node)
    return {
        "$schema": jsonschema.Draft202012Validator.META_SCHEMA["$id"],
        **schema,
        "title": f"detune-{name}/{output.version}",
    }


def _describe(node: dict[str, Any]) -> None:
    """Give each property the description that the docstring has of it, and no title that repeats its name."""
    told, _, attributes = node.get("description", "").partition("\n\nAttributes:\n")
    if told:
        node["description"] = " ".join(told.split())
    for name, text in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", attributes, re.MULTILINE):
        if name in node["properties"]:
            node["properties"][name]["description"] = " ".join(text.split())
    for each in node.get("properties", {}).values():
        each.pop("title", None)


def text_of(name: str) -> str:
    """Return the file of a schema."""
    return json.dumps(schema_of(name), indent=1, ensure_ascii=False) + "\n"


def require_valid(name: str, text: str) -> dict[str, Any]:
    """Return a command's JSON, which must have all that its schema tells of and nothing else."""
    content: dict[str, Any] = json.loads(text, parse_constant=_refuse)
    schema = schema_of(name)
    for node in _objects(schema):
        node["additionalProperties"] = False
    jsonschema.Draft202012Validator(schema).validate(content)
    return content


def _refuse(word: str) -> None:
    raise AssertionError(f"{word} is no JSON")


def _objects(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the schema's objects with fields of their own."""
    return [node for node in (schema, *schema.get("$defs", {}).values()) if "properties" in node]


if __name__ == "__main__":
    for name in OUTPUTS:
        (FOLDER / f"{name}.schema.json").write_text(text_of(name), encoding="utf-8")
