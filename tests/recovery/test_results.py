"""The last steps of a run, cut off between any two of them: the same call does the rest."""

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import detune
from detune.certificate.verdict import Verdict
from detune.checkpoints import RunDirectory, run_directory
from detune.errors import OutputError
from detune.recovery.report import Report
from tests.families import Fine, edit, plain_family, tree


@pytest.fixture
def fine(tmp_path: Path) -> Fine:
    return plain_family(tmp_path / "models")


def recover(fine: Fine, folder: Path, **options: Any) -> Report:
    return detune.recover(
        fine.models, folder / "out", **{"adapters": folder / "ad", "mask": folder / "m.npz"} | options
    )


@pytest.fixture
def cut_off(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have a method of `RunDirectory` cut a call of `recover` off."""

    def cut(method: str, fine: Fine, folder: Path, **options: Any) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(RunDirectory, method, interrupt)
            with pytest.raises(KeyboardInterrupt):
                recover(fine, folder, **options)

    return cut


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_checkpoint_comes_last(fine, cut_off, tmp_path):
    cut_off("place", fine, tmp_path)
    assert {name[:16] for name in names(tmp_path)} == {"models", "ad", "m.npz", ".out.recovering-"}


def test_what_is_in_its_place_stays_and_the_rest_is_done(fine, cut_off, tmp_path, solved):
    cut_off("place", fine, tmp_path)
    before = tree(tmp_path / "ad"), (tmp_path / "m.npz").read_bytes()
    solved.clear()
    report = recover(fine, tmp_path)
    assert solved == []
    assert (tree(tmp_path / "ad"), (tmp_path / "m.npz").read_bytes()) == before
    assert report.adapters == json.loads((tmp_path / "out" / "detune.json").read_text())["adapters"]
    assert names(tmp_path) == {"models", "out", "ad", "m.npz"}


def test_a_run_that_had_all_but_ended_is_not_done_again(fine, cut_off, tmp_path, solved):
    cut_off("remove", fine, tmp_path)
    before = tree(tmp_path / "out")
    solved.clear()
    report = recover(fine, tmp_path)
    assert solved == []
    assert tree(tmp_path / "out") == before
    assert report == Report.of_json(json.loads((tmp_path / "out" / "detune.json").read_text()))
    assert names(tmp_path) == {"models", "out", "ad", "m.npz"}
    with pytest.raises(OutputError, match="out exists and is not empty"):
        recover(fine, tmp_path)


@pytest.mark.parametrize("name", ["ad", "m.npz"])
def test_what_somebody_has_changed_since_is_not_taken_for_a_result(fine, cut_off, tmp_path, name):
    cut_off("place", fine, tmp_path)
    place = tmp_path / name
    changed = place / "notes" if place.is_dir() else place
    changed.write_text("mine")
    with pytest.raises(OutputError, match=rf"{name} exists; expected a new"):
        recover(fine, tmp_path)
    assert changed.read_text() == "mine"
    # Moved away, it is made again.
    shutil.move(place, tmp_path / "elsewhere")
    recover(fine, tmp_path)
    assert names(tmp_path) == {"models", "out", "ad", "m.npz", "elsewhere"}


def test_another_place_for_the_adapters(fine, cut_off, tmp_path):
    cut_off("place", fine, tmp_path)
    recover(fine, tmp_path, adapters=tmp_path / "others")
    # The report has times in it, and the card the directory's name.
    named = ("detune.json", "README.md")
    first, second = ({name: data for name, data in tree(tmp_path / folder).items() if name not in named}
                     for folder in ("ad", "others"))  # fmt: skip
    assert first == second


def test_what_was_to_be_replaced_is_put_back_by_the_next_run(fine, cut_off, tmp_path):
    """Between two renames the old checkpoint is aside, and the new one not there yet."""
    recover(fine, tmp_path, adapters=None, mask=None, method="mean")
    old = tree(tmp_path / "out")
    cut_off("place", fine, tmp_path, adapters=None, mask=None, overwrite=True)
    (left,) = tmp_path.glob(".out.recovering-*")
    (tmp_path / "out").rename(left / "replaced")
    # Of another command, which is refused for what it finds there.
    with pytest.raises(OutputError, match="out exists and is not empty"):
        recover(fine, tmp_path, adapters=None, mask=None, method="intersect", executor=None)
    assert tree(tmp_path / "out") == old
    cut_off("place", fine, tmp_path, adapters=None, mask=None, overwrite=True)
    (left,) = tmp_path.glob(".out.recovering-*")
    (tmp_path / "out").rename(left / "replaced")
    recover(fine, tmp_path, adapters=None, mask=None, overwrite=True)
    assert tree(tmp_path / "out") != old
    assert names(tmp_path) == {"models", "out"}


def test_what_was_to_be_replaced_is_kept_where_something_else_stands_now(fine, cut_off, tmp_path):
    recover(fine, tmp_path, adapters=None, mask=None, method="mean")
    cut_off("place", fine, tmp_path, adapters=None, mask=None, overwrite=True)
    (left,) = tmp_path.glob(".out.recovering-*")
    (tmp_path / "out").rename(left / "replaced")
    recover(fine, tmp_path / "elsewhere", adapters=None, mask=None, method="mean")
    (tmp_path / "elsewhere" / "out").rename(tmp_path / "out")
    with pytest.raises(OutputError, match=r"replaced is what stood in .*out until .*; something else .*; move one"):
        recover(fine, tmp_path, adapters=None, mask=None, overwrite=True)
    assert (left / "replaced" / "detune.json").is_file()


def names_exchanged(monkeypatch: pytest.MonkeyPatch, out: Path, can: bool) -> list[bool]:
    """Whether `out` was there after each renaming, where the file system can exchange names or not."""
    seen, rename, exchange = list[bool](), os.rename, run_directory.exchange

    def look(function: Callable[..., Any], *places: Path) -> Any:
        result = function(*places)
        seen.append(out.exists())
        return result

    monkeypatch.setattr(os, "rename", lambda *places: look(rename, *places))
    monkeypatch.setattr(run_directory, "exchange", lambda *places: can and look(exchange, *places))
    return seen


@pytest.mark.parametrize("can", [True, False])
def test_the_new_checkpoint_takes_the_place_of_the_old_one(fine, tmp_path, monkeypatch, can):
    recover(fine, tmp_path, adapters=None, mask=None, method="mean")
    old = tree(tmp_path / "out")
    seen = names_exchanged(monkeypatch, tmp_path / "out", can)
    recover(fine, tmp_path, adapters=None, mask=None, overwrite=True)
    assert seen == ([True] if can else [False, True])
    assert tree(tmp_path / "out") != old
    assert names(tmp_path) == {"models", "out"}


DAMAGE: dict[str, Callable[[Path, Path], object]] = {
    "a bit": lambda path, _: path.write_bytes(path.read_bytes()[:-9] + b"\7" + path.read_bytes()[-8:]),
    "its end": lambda path, _: path.write_bytes(path.read_bytes()[:-9]),
    "all of it": lambda path, _: path.write_bytes(b""),
    "gone": lambda path, _: path.unlink(),
    "a directory": lambda path, _: (path.unlink(), (path / "x").mkdir(parents=True)),
    "a pipe": lambda path, _: (path.unlink(), os.mkfifo(path)),
    "a link": lambda path, victim: (path.unlink(), path.symlink_to(victim)),
    "a hard link": lambda path, victim: (path.unlink(), os.link(victim, path)),
}


@pytest.mark.parametrize(
    "files", [("checkpoint/*.safetensors", "parts/*.lora", "results"), ("journal/*", "results.copy")]
)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_run_is_finished_whatever_has_become_of_its_files(fine, cut_off, tmp_path, caplog, files, damage):
    cut_off("place", fine, tmp_path)
    (tmp_path / "models" / "victim").write_bytes(b"mine" * 100)
    before = tree(tmp_path / "ad"), (tmp_path / "m.npz").read_bytes(), tree(tmp_path / "models")
    for file in files:
        DAMAGE[damage](next(tmp_path.glob(f".out.recovering-*/{file}")), tmp_path / "models" / "victim")
    recover(fine, tmp_path)
    assert (tree(tmp_path / "ad"), (tmp_path / "m.npz").read_bytes(), tree(tmp_path / "models")) == before
    assert names(tmp_path) == {"models", "out", "ad", "m.npz"}
    # Of a journal that is gone, or empty, there is nothing to tell.
    assert "computed again" in caplog.text or ("journal/*" in files and damage in ("gone", "all of it"))
    assert "results has been damaged: its copy is used" in caplog.text or damage == "gone" or "results" not in files


@pytest.mark.parametrize("others", [(), ("checkpoint/*", "parts/*", "journal/*")])
@pytest.mark.parametrize("damage", DAMAGE)
def test_where_both_notes_are_damaged_the_results_are_made_again(fine, cut_off, tmp_path, caplog, damage, others):
    cut_off("place", fine, tmp_path)
    (tmp_path / "models" / "victim").write_bytes(b"mine" * 100)
    before = tree(tmp_path / "ad"), (tmp_path / "m.npz").read_bytes(), tree(tmp_path / "models")
    for file in ("results", "results.copy", *others):
        for path in tmp_path.glob(f".out.recovering-*/{file}"):
            # A journal whose file is gone speaks of nothing, and the run would be as one that has not begun.
            DAMAGE["a bit" if file == "journal/*" else damage](path, tmp_path / "models" / "victim")
    recover(fine, tmp_path)
    assert (tree(tmp_path / "ad"), (tmp_path / "m.npz").read_bytes(), tree(tmp_path / "models")) == before
    assert names(tmp_path) == {"models", "out", "ad", "m.npz"}
    told = "results has been damaged: what is in its place already is computed again and compared"
    assert told in caplog.text or damage == "gone"
    assert all(
        f"{name} is there, and no note says whose it is: it is computed" in caplog.text for name in ("ad", "m.npz")
    )
    expected = detune.recover(fine.models, tmp_path / "expected", mask=tmp_path / "expected.npz")
    assert [row.verdict for row in expected.tensors] == [Verdict(row["verdict"]) for row in read(tmp_path)["tensors"]]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "expected" / "model.safetensors"
    ).read_bytes()


def read(folder: Path) -> Any:
    return json.loads((folder / "out" / "detune.json").read_text())


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_that_had_all_but_ended_knows_its_results_by_making_them_again(fine, cut_off, tmp_path, overwrite):
    if overwrite:
        recover(fine, tmp_path, adapters=None, mask=None, method="mean")
    cut_off("remove", fine, tmp_path, overwrite=overwrite)
    before = tree(tmp_path / "out"), tree(tmp_path / "ad")
    for path in tmp_path.glob(".out.recovering-*/results*"):
        path.write_bytes(b"{}")
    report = recover(fine, tmp_path, overwrite=overwrite)
    assert report.adapters == read(tmp_path)["adapters"]
    assert tree(tmp_path / "ad") == before[1]
    assert {**tree(tmp_path / "out"), "detune.json": b""} == {**before[0], "detune.json": b""}
    assert (read(tmp_path) == json.loads(before[0]["detune.json"])) is not overwrite
    assert names(tmp_path) == {"models", "out", "ad", "m.npz"}
    with pytest.raises(OutputError, match="out exists and is not empty"):
        recover(fine, tmp_path)


@pytest.mark.parametrize("place", ["ad", "m.npz", "out"])
def test_where_both_notes_are_damaged_what_is_not_the_same_is_kept(fine, cut_off, tmp_path, place):
    cut_off("remove", fine, tmp_path)
    for path in tmp_path.glob(".out.recovering-*/results*"):
        path.write_bytes(b"{}")
    if place == "m.npz":
        with zipfile.ZipFile(tmp_path / place, "a") as archive:
            archive.writestr("notes", "mine")
    elif place == "ad":
        (tmp_path / place / "notes").write_text("mine")
    else:
        (tmp_path / place).rename(tmp_path / "elsewhere")
        recover(fine, tmp_path, adapters=None, mask=None, method="mean")
        for path in tmp_path.glob(".out.recovering-*/results*"):
            path.write_bytes(b"{}")
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=rf"{place} exists"):
        recover(fine, tmp_path)
    after = tree(tmp_path)
    assert {name: after.get(name) for name in before if not name.startswith(".")} == {
        name: data for name, data in before.items() if not name.startswith(".")
    }


@pytest.mark.parametrize("same", [True, False])
def test_where_both_notes_are_damaged_between_two_renames(fine, cut_off, tmp_path, monkeypatch, same):
    """On a file system that cannot exchange names: the new checkpoint is in its place, the old one not yet removed."""
    monkeypatch.setattr(run_directory, "exchange", lambda *places: False)
    recover(fine, tmp_path, adapters=None, mask=None, method="mean")
    cut_off("remove", fine, tmp_path, adapters=None, mask=None, overwrite=True)
    before = {**tree(tmp_path / "out"), "detune.json": b""}
    (left,) = tmp_path.glob(".out.recovering-*")
    assert (left / "replaced").is_dir()
    for path in left.glob("results*"):
        path.write_bytes(b"{}")
    if not same:
        (tmp_path / "out" / "notes").write_text("mine")
        with pytest.raises(OutputError, match="notes is not of the recovery"):
            recover(fine, tmp_path, adapters=None, mask=None, overwrite=True)
        assert (tmp_path / "out" / "notes").read_text() == "mine"
        return
    recover(fine, tmp_path, adapters=None, mask=None, overwrite=True)
    assert {**tree(tmp_path / "out"), "detune.json": b""} == before
    assert names(tmp_path) == {"models", "out"}


def test_a_report_comes_back_from_its_json(fine, tmp_path):
    text = recover(fine, tmp_path).to_json()
    report = Report.of_json(json.loads(text))
    assert report.to_json() == text
    assert all(isinstance(row.verdict, Verdict) for row in report.tensors)


def test_results_of_an_other_input_are_not_known(fine, cut_off, tmp_path):
    cut_off("place", fine, tmp_path)
    edit(fine.models[0], lambda state: state["norm.weight"].add_(1))
    with pytest.raises(OutputError, match="ad exists"):
        recover(fine, tmp_path)
