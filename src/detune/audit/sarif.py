"""The report as a SARIF log, which code scanning reads: version 2.1.0 (OASIS 2023).

A result of the log is something to act on: what the releases give away, or help to get at. What they keep, and the
assumptions, are in the report alone: GitHub shows every result as an alert, those of kind "pass" too. It wants a file
and a line for each, so a result lies in line 1 of a weight file, and the tensor stands beside it as a logical location.

Reference: Static Analysis Results Interchange Format (SARIF) Version 2.1.0, OASIS Standard incorporating Approved
Errata 01, 2023.
"""

import hashlib
import os
import re
import shlex
from pathlib import PurePosixPath
from urllib.parse import quote

from sarif_pydantic import sarif

from detune.audit.findings import FINDINGS
from detune.audit.record import AuditReport, ModelEntry, Result, Rule
from detune.errors import printable

__all__ = ["SCHEMA", "to_sarif"]

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"


def to_sarif(report: AuditReport) -> str:
    """Write the log.

    Args:
        report: Report of an audit; releases are named as the log's reader finds them: see `AuditReport.as_published`.

    Returns:
        JSON.
    """
    findings = [result for result in report.results if result.rule_id in _RULES and result.level != "note"]
    log = sarif.Sarif(runs=[_run(report, [_result(report, result) for result in findings])])
    log.schema_uri = SCHEMA
    text: str = log.model_dump_json(by_alias=True, exclude_none=True, indent=1)
    return text + "\n"


def _run(report: AuditReport, results: list[sarif.Result]) -> sarif.Run:
    version = report.tool.versions["detune"]
    # Each once: BASE+ADAPTER shares the base's files with others.
    files = dict.fromkeys((_place(model, file), sha) for model in report.used for file, sha in model.sha256.items())
    driver = sarif.ToolDriver(name="detune", version=version, semantic_version=version, rules=list(_RULES.values()))
    return sarif.Run(
        tool=sarif.Tool(driver=driver),
        invocations=[sarif.Invocation(command_line=shlex.join(report.invocation.argv), execution_successful=True)],
        automation_details=sarif.RunAutomationDetails(id="detune-audit/"),
        artifacts=[
            sarif.Artifact(
                location=sarif.ArtifactLocation(uri=uri), roles=["analysisTarget"], hashes={"sha-256": sha256}
            )
            for uri, sha256 in files
        ],
        results=results,
        properties={"verdict": report.verdict.model_dump(mode="json")},
    )


def _rule(rule: Rule) -> sarif.ReportingDescriptor:
    title = sarif.Message(text=rule.title)
    return sarif.ReportingDescriptor(
        id=rule.id, short_description=title, full_description=title, help=sarif.Message(text=rule.help)
    )


_RULES = {rule.id: _rule(rule) for rule in FINDINGS}


def _result(report: AuditReport, result: Result) -> sarif.Result:
    # An alert stays the same one as long as its rule and its tensor do, whatever the releases are called.
    fingerprint = hashlib.sha256(f"{result.rule_id}\0{result.tensor or ''}".encode()).hexdigest()[:16]
    where = f"{result.tensor}: " if result.tensor else ""
    return sarif.Result(
        rule_id=result.rule_id,
        rule_index=list(_RULES).index(result.rule_id),
        level=sarif.Level(result.level),
        message=sarif.Message(text=_plain(where + result.message)),
        locations=[_location(report, result)],
        partial_fingerprints={"primaryLocationLineHash": f"{fingerprint}:1"},
        properties=result.properties,
    )


def _plain(text: str) -> str:
    """Text without links: square brackets make one in a message, and whoever names a tensor may write some."""
    return re.sub(r"[\\\[\]]", r"\\\g<0>", printable(text))


def _location(report: AuditReport, result: Result) -> sarif.Location:
    """The tensor in the release that decided: with which it was given away, or the last one."""
    entry = next((entry for entry in report.tensors if entry.name == result.tensor), None)
    decisive = len(report.used)
    if entry is not None:
        decisive = next((outcome.models for outcome in entry.outcomes if outcome.given_away), decisive)
    elif report.verdict.one_too_many is not None:
        decisive = report.verdict.one_too_many
    model = report.used[decisive - 1]
    file = _file(model, "" if entry is None else entry.files[decisive - 1])
    logical = [sarif.LogicalLocation(fully_qualified_name=result.tensor, kind="tensor")] if result.tensor else None
    return sarif.Location(
        physical_location=sarif.PhysicalLocation(
            artifact_location=sarif.ArtifactLocation(uri=_place(model, file)), region=sarif.Region(start_line=1)
        ),
        logical_locations=logical,
    )


def _file(model: ModelEntry, wanted: str) -> str:
    """A weight file of a release: the wanted one, or the last one, which of BASE+ADAPTER is the adapter's."""
    last = next(reversed(model.sha256))
    return wanted if wanted in model.sha256 and not last.startswith("+") else last


def _place(model: ModelEntry, file: str) -> str:
    """The URI of a weight file, a relative path."""
    place = model.spec
    if any(name.startswith("+") for name in model.sha256):
        base, _, adapter = place.rpartition("+")
        place, file = (adapter, file.partition("/")[2]) if file.startswith("+") else (base, file)
    path = PurePosixPath(place)
    return quote(os.fsencode(path if path.name == file else path / file))
