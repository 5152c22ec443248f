"""What commands print with --json: JSON and nothing else, valid by the schema in docs/schemas."""

import json
import re

import pytest

import detune.cli
from tests.bench.tiny_models import save_bert
from tests.command import leaves
from tests.families import Fine, plain_family
from tests.schemas import FOLDER, OUTPUTS, require_valid, text_of

ROOT = FOLDER.parents[1]


@pytest.fixture(scope="module")
def fine(tmp_path_factory: pytest.TempPathFactory) -> Fine:
    return plain_family(tmp_path_factory.mktemp("models"), n=4)


@pytest.mark.parametrize("name", OUTPUTS)
def test_the_schema_in_the_docs_is_current(name):
    """To renew it: make schemas."""
    assert (FOLDER / f"{name}.schema.json").read_text(encoding="utf-8") == text_of(name)


def test_the_docs_list_every_schema():
    page = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    linked = re.findall(r"\| `detune-([\w-]+)/\d` \| \[schema\]\(schemas/([\w-]+)\.schema\.json\) \|", page)
    assert linked == [(name, name) for name in OUTPUTS]
    assert {file.name for file in FOLDER.iterdir()} == {f"{name}.schema.json" for name in OUTPUTS}


def test_every_command_that_prints_json_has_a_schema():
    names = {
        name.replace(" ", "-")
        for name, found in leaves(detune.cli.cli).items()
        if any(option.name == "as_json" for option in found.params)
    }
    names = {"defend" if name.startswith("defend-") else name for name in names} - {"bench-run"}
    # What --dry-run prints.
    assert names | {"plan"} == set(OUTPUTS)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("recover", ["{models}", "--out", "{out}", "--adapters", "{out}-loras", "--check"]),
        ("inspect", ["{models}"]),
        ("inspect", ["{one}"]),
        ("inspect", ["{models}", "--rows", "64"]),
        ("family", ["{models}"]),
        ("family", ["{models}", "{base}", "--rows", "64"]),
        ("compare", ["{one}", "{base}"]),
        ("compare", ["{base}", "{base}"]),
        ("extract", ["{models}", "--base", "{base}", "--out", "{out}"]),
        ("pack", ["{models}", "--out", "{out}"]),
        ("audit", ["{models}", "--weights-only"]),
        ("audit", ["{models}", "--base", "{base}", "--weights-only"]),
        ("defend", ["bf16", "{one}", "{out}"]),
        ("defend", ["noise", "{one}", "{out}", "--size", "0.1"]),
    ],
)
def test_a_command_prints_its_json_alone(command, fine, tmp_path, name, words):
    filled = {"{base}": [fine.base], "{one}": fine.models[:1], "{models}": fine.models}
    ran = command(
        name,
        *(each for word in words for each in filled.get(word, [word.replace("{out}", str(tmp_path / "out"))])),
        "--json",
    )
    assert (ran.code, ran.err) == (name == "audit", "")
    assert require_valid(name, ran.out)["format"] == f"detune-{name}/1"


def test_so_does_unpack(command, fine, tmp_path):
    assert command("pack", *fine.models, "--out", tmp_path / "pack").code == 0
    ran = command("unpack", tmp_path / "pack", "--out", tmp_path / "out", "--json")
    assert (ran.code, ran.err) == (0, "")
    assert require_valid("unpack", ran.out)["files"] == 8


def test_settings_that_are_paths_are_text(command, tmp_path):
    (tmp_path / "texts").write_text("a b\n")
    save_bert(tmp_path / "bert", ["a", "b"])
    words = ("quiet-noise", tmp_path / "bert", tmp_path / "out", "--texts", tmp_path / "texts", "--json")
    ran = command("defend", *words)
    assert (ran.code, ran.err) == (0, "")
    assert require_valid("defend", ran.out)["settings"]["texts"] == str(tmp_path / "texts")


@pytest.mark.parametrize(
    "words",
    [
        ["recover", "nowhere", "--out", "out"],
        ["inspect", "nowhere"],
        ["compare", "a", "b"],
        ["unpack", "a", "--out", "b"],
    ],
)
def test_an_error_prints_nothing_there(command, monkeypatch, tmp_path, words):
    monkeypatch.chdir(tmp_path)
    ran = command(*words, "--json")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("detune: error: ")


def test_the_file_beside_a_recovery_holds_the_same(command, fine, tmp_path):
    ran = command("recover", *fine.models, "--out", tmp_path / "out", "--json")
    written = json.loads((tmp_path / "out" / "detune.json").read_text())
    printed = json.loads(ran.out)
    assert written.keys() == printed.keys() | {"files"}
    assert (written["format"], written["tensors"]) == (printed["format"], printed["tensors"])
