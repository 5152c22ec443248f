"""Nothing that stands in a file reaches the terminal raw."""

import ast
import json
import logging
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import detune.cli
from detune.cli import terminal
from detune.errors import InputError, printable
from tests.command import run_command
from tests.families import Fine, State, edit, plain_family

# A title for the window, a colour, C1's own CSI, a line of its own, the other direction, markup, an emoji's name.
HOSTILE = [
    "\x1b]0;owned\x07layer.0.weight",
    "\x1b[31mlayer.0.weight",
    "\x9b31mlayer.0.weight",
    "layer\n0 tensors identical\r.0.weight",
    "layer.\u202e0.weight",
    "[/bold]layer.0.weight",
    "[bold]layer.0[/].weight",
    "[link=https://example.org]:warning:.weight",
]
CLI = Path(detune.cli.__file__).parent


@given(st.text())
@example("".join(map(chr, range(0x250))))
def test_text_is_one_line_that_nothing_obeys(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert len(shown.splitlines()) <= 1
    assert printable(shown) == shown
    assert (shown == text) == text.isprintable()
    error = InputError(text, f"in {text}")
    assert str(error).isprintable()


@given(st.text())
def test_json_stays_what_it_is(text: str) -> None:
    class Out(list[str]):
        def __call__(self, shown: str, **_: object) -> None:
            self.append(shown)

    out = Out()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("click.echo", out)
        terminal.say_json(json.dumps({text: [text]}, indent=1, ensure_ascii=False) + "\n")
    assert json.loads(out[0]) == {text: [text]}
    assert all(line.isprintable() for line in out[0].split("\n"))


@pytest.fixture(scope="module")
def hostile_names(tmp_path_factory) -> Fine:
    """A family with a changed tensor of each name."""
    fine = plain_family(tmp_path_factory.mktemp("hostile") / "models")

    def rename(state: State) -> None:
        first = state.pop("layer.0.weight")
        state.update({name: first.clone() for name in HOSTILE})

    for model in (fine.base, *fine.models):
        edit(model, rename)
    return fine


@pytest.mark.parametrize("is_terminal", [False, True])
def test_names_of_tensors_are_shown_and_not_obeyed(hostile_names, is_terminal, tmp_path, monkeypatch, capsys) -> None:
    fine = hostile_names
    monkeypatch.setenv("COLUMNS", "200")
    if is_terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    out = tmp_path / "out"
    for words in (
        ["recover", *fine.models, "--out", out, "--adapters", tmp_path / "loras"],
        ["inspect", *fine.models],
        ["family", *fine.models],
        ["compare", fine.models[0], fine.base],
        ["extract", *fine.models, "--base", fine.base, "--out", tmp_path / "extracted"],
        ["pack", *fine.models, "--base", fine.base, "--out", tmp_path / "pack"],
        ["audit", *fine.models, "--weights-only"],
    ):
        ran = run_command(monkeypatch, capsys, *words)
        assert ran.code == (words[0] == "audit"), (words[0], ran.err)
        for shown in (ran.out, ran.err):
            assert "\x1b]" not in shown
            assert "\x9b" not in shown
            assert "\u202e" not in shown
            assert "\x1b[31mlayer" not in shown
            assert "\n0 tensors identical" not in shown
        if words[0] in ("recover", "inspect", "compare"):
            # With the numbers, where it is of a kind with others.
            ways = [{printable(name), printable(name).replace("0", "*").replace("31", "*")} for name in HOSTILE]
            assert [names for names in ways if not any(name in ran.out for name in names)] == []


def test_errors_name_them(tmp_path, monkeypatch, capsys) -> None:
    fine = plain_family(tmp_path / "models")
    name = "\x1b]0;owned\x07[/bold]"
    edit(fine.models[1], lambda state: state.update({name: state["norm.weight"] * float("nan")}))
    ran = run_command(monkeypatch, capsys, "compare", fine.models[1], fine.models[0])
    assert "\x1b" not in ran.out + ran.err
    assert printable(name) in ran.out
    ran = run_command(monkeypatch, capsys, "inspect", tmp_path / name, fine.models[0], fine.models[2])
    assert ran.code == 2
    assert "\x1b" not in ran.err
    assert "owned" in ran.err


def test_logs_are_lines(capsys) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(terminal.Formatter("%(levelname)s %(message)s"))
    log = logging.getLogger("of its own")
    log.addHandler(handler)
    log.propagate = False
    log.warning("%s is odd", "a\n\x1b[31mERROR b")
    assert capsys.readouterr().err == "WARNING a\\n\\x1b[31mERROR b is odd\n"


def test_there_is_one_way_to_the_terminal() -> None:
    for file in CLI.glob("*.py"):
        if file.name == "terminal.py":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("click.echo", "click.secho", "print"), file
            bars = file.name == "progress_bars.py"
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rich") and not bars:
                assert (node.module, [alias.name for alias in node.names]) == ("rich.table", ["Column"]), file


def test_a_narrow_terminal_folds_names_and_cuts_none(monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    name = "model.layers.*.self_attn.query.weight ×10"
    terminal.show_table(("tensor", "shape", "ranks"), [(name, "192×576", "16, 8, 4"), ("norm", "576", "")])
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 40 for line in lines)
    shown = "".join(line[: lines[0].index("shape")] for line in lines[1:-1])
    assert shown.replace(" ", "") == name.replace(" ", "")
