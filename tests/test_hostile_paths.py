"""Places that are called as nobody expects: every command does its work there, and says and writes only text."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.command import run_command
from tests.families import Fine, plain_family

NAMES = {
    "long": "n" * 250,
    "control characters": "mo\x1b[31md\n=e|l'\"<b>",
    "no text": os.fsdecode(b"mod\xffel"),
    "spaces": "  a model  ",
    "a formula": "=1+1",
    "an option": "-rf",
}
COMMANDS = {
    "recover": ("recover", "{model}", "{others}", "--out", "{out}/o", "--adapters", "{out}/a", "--mask", "{out}/m"),
    "extract": ("extract", "{model}", "{others}", "--base", "{base}", "--out", "{out}/o"),
    "audit": ("audit", "{model}", "{others}", "--out", "{out}/o", "--weights-only", "--sarif", "{out}/s.sarif"),
    "pack": ("pack", "{model}", "{others}", "--base", "{base}", "--out", "{out}/o"),
    "unpack": ("unpack", "{out}/o", "--out", "{out}/u"),
    "inspect": ("inspect", "{model}", "{others}", "--json"),
    "defend": ("defend", "bf16", "{model}", "{out}/r"),
    "compare": ("compare", "{base}", "{model}"),
}


@pytest.fixture
def fine(tmp_path: Path) -> Fine:
    return plain_family(tmp_path / "models")


ALONE = [("recover",), ("extract",), ("audit",), ("pack", "unpack"), ("inspect",), ("defend",), ("compare",)]


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("commands", ALONE, ids=" ".join)
def test_a_model_in_any_directory(fine, tmp_path, monkeypatch, capsys, kind, commands) -> None:
    model = tmp_path / NAMES[kind]
    shutil.copytree(fine.models[0], model)
    (model / "README.md").write_text("# Its card\n")
    for command in commands:
        places = {"model": model, "base": fine.base, "out": tmp_path}
        words = [
            str(spec)
            for word in COMMANDS[command]
            for spec in (fine.models[1:] if word == "{others}" else [word.format(**places)])
        ]
        ran = run_command(monkeypatch, capsys, *words)
        assert ran.code == int(command == "audit"), ran.err
        assert all(line.isprintable() for line in (ran.out + ran.err).splitlines())
    for path in (path for name in "oar" for path in (tmp_path / name).rglob("*")):
        assert path.name.isprintable()
        if path.suffix in (".json", ".sarif"):
            assert isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
        elif path.suffix in (".md", ".html"):
            assert path.read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["long", "control characters", "no text"])
def test_an_output_in_any_directory(fine, tmp_path, monkeypatch, capsys, kind) -> None:
    # What stands beside an output until it is whole has a longer name.
    out = tmp_path / NAMES[kind][:180]
    words = ["recover", *fine.models, "--out", out, "--adapters", f"{out}-a", "--mask", f"{out}-m"]
    ran = run_command(monkeypatch, capsys, *words)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.replace("\n", "").isprintable()
    assert {path.name for path in tmp_path.iterdir()} == {"models", out.name, f"{out.name}-a", f"{out.name}-m"}


@pytest.mark.parametrize("name", ["a\nb.txt", "a\\b.txt", os.fsdecode(b"a\xff.txt")])
def test_a_file_that_no_pack_can_hold_is_named_at_once(fine, tmp_path, monkeypatch, capsys, name) -> None:
    (fine.models[1] / name).write_text("x")
    ran = run_command(monkeypatch, capsys, "pack", *fine.models, "--out", tmp_path / "pack")
    assert ran.code == 2
    assert ran.err.startswith("detune: error: ")
    assert "model-1 has a file that no pack can hold; its name is " in ran.err
    assert ran.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["models"]
