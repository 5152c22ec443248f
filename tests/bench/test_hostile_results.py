"""Pages of hostile results are as harmless as text."""

import json
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

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
    rows = [line.replace("\\|", "").count("|") for line in ours.splitlines() if line.startswith("|")]
    assert set(rows) == {11}


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
        result["behaviour"] = {name: 0.5}

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
    ],
)
def test_numbers_are_validated(tmp_path: Path, field: str, value: object) -> None:
    with pytest.raises(InputError, match=rf"is no result of `detune bench run`; layers.0.{field}"):
        stored(tmp_path, lambda result: result["layers"][0].update({field: value})).read_all()


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
