"""Pages of hostile results are as harmless as text."""

import csv
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

import detune
from detune.bench.leaderboard import build_page, read_entries
from detune.bench.leaderboard.page import BEGIN, END
from detune.bench.results import ResultStore
from detune.bench.table import markdown, tables
from detune.errors import InputError
from tests.bench.test_leaderboard import copied_page, entry, in_files
from tests.test_markdown import HOSTILE


@pytest.mark.parametrize("name", [END, BEGIN, *(each for each in HOSTILE if "\n" not in each and "|" not in each)])
def test_entries_cannot_write_the_page(tmp_path: Path, name: str) -> None:
    plain = entry("good")
    hostile = plain.model_copy(
        update={"name": name, "defence": name, "authors": (name,), "link": "https://x.org/)<img src=y>|`"}
    )
    entries = {**in_files(tmp_path, plain), tmp_path / "entries" / "](x) <b>.json": hostile}
    page = copied_page(tmp_path)
    made = build_page(entries, page)
    page.write_text(made, encoding="utf-8")
    assert build_page(entries, page) == made, "it grows"
    ours = made[made.index(BEGIN) : made.index(END)]
    tokens = MarkdownIt("commonmark").enable("table").parse(ours)
    assert [token.content for token in tokens if token.type == "html_block"] == [BEGIN + "\n"]
    kinds = {child.type for token in tokens for child in token.children or ()}
    assert kinds <= {"text", "text_special", "link_open", "link_close", "strong_open", "strong_close"}
    for rows in (part.splitlines() for part in ours.split("\n\n") if part.startswith("|")):
        assert len({row.replace("\\|", "").count("|") for row in rows}) == 1


def a_result() -> dict[str, Any]:
    layer = {"index": 0, "model": "m", "name": "layer", "kind": "layer", "depth": 0, "shape": [2, 2], "mse": 1e-9}
    layer |= {"bit_identical": 0.5, "seconds": 1.0, "peak_memory_bytes": 1}
    cell = {"subset": "s", "fingerprint": "f", "stands_for": None, "method": "auto", "settings": "", "seed": 0}
    cell |= {"method_sha256": None, "loras": [0, 1, 2], "rank_known": True}
    environment = {"versions": {}, "code_sha256": "", "system": "", "threads": 1, "device": "cpu"}
    return {"cell": cell, "source": "", "environment": environment, "layers": [layer], "behaviour": {"activation": 0.1}}


def stored(folder: Path, change: Any) -> ResultStore:
    result = a_result()
    change(result)
    (folder / "one.json").write_text(json.dumps(result))
    return ResultStore(folder)


@pytest.mark.parametrize("name", HOSTILE)
def test_results_cannot_write_the_table(tmp_path: Path, name: str) -> None:
    def change(result: dict[str, Any]) -> None:
        result["cell"] |= {"subset": name, "method": name}
        result["notes"] = [name]

    results = stored(tmp_path, change).read_all()
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown(results))
    assert [token.type for token in tokens].count("heading_open") == 1
    assert not [token for token in tokens if token.type in ("html_block", "fence", "code_block", "bullet_list_open")]
    kinds = {child.type for token in tokens for child in token.children or ()}
    assert kinds <= {"text", "text_special", "softbreak"}
    cells = [token for token in tokens if token.type == "td_open"]
    assert len(cells) == len(tables(results)[name].columns)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mse", -1.0),
        ("mse", float("nan")),
        ("mse", float("inf")),
        ("mse", "1e999"),
        ("bit_identical", 1.5),
        ("bit_identical", -0.1),
        ("seconds", float("nan")),
        ("seconds", -1.0),
        ("shape", [0, 2]),
        ("peak_memory_bytes", -5),
        ("noise_ratio", float("nan")),
        ("index", -1),
        ("index", 10**400),
        ("seconds", 1e301),
        ("shape", [10**400, 2]),
        ("shape", [2**62] * 20),
        ("peak_memory_bytes", 10**400),
    ],
)
def test_numbers_are_validated(tmp_path: Path, field: str, value: object) -> None:
    with pytest.raises(InputError, match=rf"is no result of `detune bench run`; layers.0.{field}"):
        stored(tmp_path, lambda result: result["layers"][0].update({field: value})).read_all()


@pytest.mark.parametrize("name", ["w_error", "subset", "draws", "=1+1", "<b>", ""])
def test_metrics_are_known(tmp_path: Path, name: str) -> None:
    """One with the name of a column would take its place: that of the W-Error, for instance."""
    with pytest.raises(InputError, match=rf"is no result of `detune bench run`; behaviour.{re.escape(name)}"):
        stored(tmp_path, lambda result: result.update(behaviour={name: -30.0})).read_all()


@pytest.mark.parametrize("read", [lambda folder: ResultStore(folder).read_all(), read_entries])
def test_a_pipe_keeps_nobody_waiting(tmp_path: Path, read: Callable[[Path], object]) -> None:
    os.mkfifo(tmp_path / "one.json")
    with pytest.raises(InputError, match=r"one.json is no regular file"):
        read(tmp_path)


def test_figures_of_behaviour_are_validated(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is no result of `detune bench run`; behaviour.activation"):
        stored(tmp_path, lambda result: result["behaviour"].update(activation=float("nan"))).read_all()


@pytest.mark.parametrize(
    ("field", "value"),
    [("w_error", -400), ("w_error", 1e300), ("w_error", float("nan")), ("embeddings", -1), ("embeddings", 1e300)],
)
def test_figures_of_entries_are_validated(tmp_path: Path, field: str, value: float) -> None:
    in_files(tmp_path, entry("good"))
    file = tmp_path / "entries" / "good.json"
    content = json.loads(file.read_text())
    content["attacks"]["recover"][field] = value
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"is no entry of the leaderboard; attacks.recover.{field}"):
        read_entries(tmp_path / "entries")


def test_names_in_figures_are_no_formulas(tmp_path: Path) -> None:
    from detune.bench.table import write_table

    store = stored(tmp_path, lambda result: result["cell"].update(subset=r"$\frac", method=r"a$\nope{$"))
    assert all(file.is_file() for file in write_table(store))


FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1+1", "\r=1+1", "a;=1+1", "a\n=1+1", '"=1+1', "＝1+1"]


@pytest.mark.parametrize("name", FORMULAS)
def test_sheets_compute_nothing(tmp_path: Path, name: str) -> None:
    from detune.bench.table import write_table

    store = stored(tmp_path, lambda result: result["cell"].update(subset=name, method=name))
    sheet = next(file for file in write_table(store) if file.suffix == ".csv").read_text(encoding="utf-8")
    head, *rows = csv.reader(sheet.splitlines(keepends=True))
    assert all(len(row) == len(head) for row in rows)
    assert not [cell for cell in (*head, *rows[0]) if cell.lstrip()[:1] in tuple("=+@＝") or not cell.isprintable()]
    # In the languages whose spreadsheets separate cells by semicolons too.
    assert f'"{rows[0][0].replace(chr(34), 2 * chr(34))}"' in sheet
    # A negative number is one.
    assert float(rows[0][head.index("w_error")]) == -9


def test_sheets_are_written_in_one_place() -> None:
    source = Path(detune.__file__).parent
    assert [file.name for file in source.rglob("*.py") if ".to_csv(" in file.read_text()] == ["sheets.py"]


def test_a_page_that_is_no_text(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"page.md is damaged; UnicodeDecodeError: .*; run this in a checkout"):
        build_page({}, page)
