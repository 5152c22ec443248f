import json
import os
import re
import sys

import pytest

from detune.audit import AuditReport
from tests.families import edit, plain_family, plain_state, tree


def test_a_page_and_json_are_written(command, fine, tmp_path):
    ran = command("audit", *fine.models, "--base", fine.base, "--out", tmp_path / "out")
    assert (ran.code, ran.err) == (1, "")
    assert "These 4 releases give the base away." in ran.out
    assert "4 of 4 fine-tuned matrices come back; release 3 was the one too many." in ran.out
    assert sorted(tree(tmp_path / "out")) == ["audit.html", "audit.json"]
    report = AuditReport.model_validate_json((tmp_path / "out" / "audit.json").read_bytes())
    assert report.invocation.argv[:2] == ("detune", "audit")
    assert (tmp_path / "out" / "audit.html").read_text().startswith("<!doctype html>")


def test_the_page_alone(command, fine, tmp_path):
    ran = command("audit", *fine.models, "--html", tmp_path / "page.html", "--weights-only")
    assert ran.code == 1
    assert f"wrote {tmp_path / 'page.html'}" in ran.out
    assert "By the certificate" in ran.out
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_json_goes_to_the_standard_output(command, fine):
    ran = command("audit", *fine.models[:3], "--json", "--method", "intersect")
    assert (ran.code, ran.err) == (1, "")
    assert json.loads(ran.out)["invocation"]["method"] == "intersect"
    assert AuditReport.model_validate_json(ran.out).verdict.one_too_many == 3


def test_a_log_for_code_scanning(command, fine, tmp_path, monkeypatch):
    monkeypatch.chdir(fine.base.parent)
    ran = command("audit", *(model.name for model in fine.models), "--sarif", tmp_path / "a.sarif", "--weights-only")
    assert ran.code == 1
    assert f"wrote {tmp_path / 'a.sarif'} in " in ran.out
    (run,) = json.loads((tmp_path / "a.sarif").read_text())["runs"]
    assert [each["location"]["uri"] for each in run["artifacts"]] == [f"model-{i}/model.safetensors" for i in range(4)]


@pytest.mark.parametrize("places", [("--out", "a", "--sarif", "a/a.sarif"), ("--html", "a", "--sarif", "./a")])
def test_places_that_are_in_each_others_way_are_told_at_once(command, fine, tmp_path, monkeypatch, places):
    monkeypatch.chdir(tmp_path)
    ran = command("audit", *fine.models[:2], *places, "--weights-only")
    assert ran.code == 2
    assert re.search(r"lies inside .*a; each result needs its own place; choose another$", ran.err)
    assert not list(tmp_path.iterdir())


class TestTheExitCode:
    @pytest.mark.parametrize("closeness", ["exact", "floor", "approximate"])
    def test_is_zero_where_nothing_is_given_away(self, command, fine, closeness):
        ran = command("audit", *fine.models[:2], "--base", fine.base, "--weights-only", "--fail-on", closeness)
        assert (ran.code, ran.err) == (0, "")
        assert "do not give the base away" in ran.out

    def test_goes_by_how_close_the_weights_come(self, command, fine):
        """float32 merges come back to their rounding, not to every bit."""
        words = ("audit", *fine.models, "--weights-only")
        assert command(*words, "--fail-on", "exact").code == 0
        assert command(*words, "--fail-on", "floor").code == 1
        assert command(*words, "--fail-on", "approximate").code == 1

    def test_counts_the_last_bit(self, command, tmp_path):
        """Two releases left a matrix alone: the base's own bits are out."""
        fine, base = plain_family(tmp_path), plain_state()
        for model in fine.models[:2]:
            edit(model, lambda state: state.update({"layer.1.weight": base["layer.1.weight"]}))
        for more in ([], ["--base", fine.base]):
            assert command("audit", *fine.models, "--weights-only", "--fail-on", "exact", *more).code == 1

    def test_is_two_after_an_error(self, command, fine, monkeypatch):
        assert command("audit", *fine.models, "nowhere").code == 2
        assert command("audit", *fine.models, "--fail-on", "never").code == 2

        def fail(*_, **__):
            raise RuntimeError("a defect")

        monkeypatch.setattr("detune.audit.audit", fail)
        ran = command("audit", *fine.models)
        assert ran.code == 2
        assert ran.err.endswith("RuntimeError: a defect\n")


@pytest.mark.parametrize(("option", "name"), [("--out", "out"), ("--html", "page.html"), ("--sarif", "a.sarif")])
def test_what_is_there_is_not_overwritten(command, fine, tmp_path, option, name):
    target = tmp_path / name
    if option == "--out":
        target.mkdir()
        (target / "mine").write_text("kept")
    else:
        target.write_text("kept")
    ran = command("audit", *fine.models, option, target)
    assert ran.code == 2
    assert ran.err.startswith(f"detune: error: {target} exists; expected a new")
    assert b"kept" in tree(tmp_path).values()


def test_where_nothing_can_be_written(command, fine, tmp_path):
    (tmp_path / "file").write_text("")
    ran = command("audit", *fine.models, "--out", tmp_path / "file" / "out")
    assert ran.code == 2
    assert ran.err.startswith(f"detune: error: cannot write {tmp_path / 'file' / 'out'}")
    assert ran.err.count("\n") == 1


def test_an_error_leaves_nothing_behind(command, fine, tmp_path):
    ran = command("audit", *fine.models, "nowhere", "--out", tmp_path / "out")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == (
        "detune: error: no such model: 'nowhere'; neither an existing path nor a Hub id org/name; check the spelling\n"
    )
    assert os.listdir(tmp_path) == []


def test_no_model_is_a_matter_of_usage(command):
    ran = command("audit")
    assert ran.code == 2
    assert "Missing argument 'MODEL...'" in ran.err


@pytest.mark.parametrize("package", ["plotly", "jinja2"])
def test_what_is_missing_is_said_before_anything_is_computed(command, fine, tmp_path, monkeypatch, package):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("detune.audit.run.map_tensors", None)
    ran = command("audit", *fine.models, "--out", tmp_path / "out")
    assert ran.code == 2
    assert re.fullmatch(rf"detune: error: {package}\S* is not installed; pip install 'detune\[audit\]'\n", ran.err)
    assert os.listdir(tmp_path) == []
