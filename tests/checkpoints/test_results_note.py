"""What a run was about to put in its places, written down twice."""

import pytest

from detune.checkpoints.results_note import ResultsNote

HASHES = {"out": "1f"}


@pytest.mark.parametrize("damaged", ["results", "results.copy"])
def test_a_damaged_copy_is_replaced_by_the_other(tmp_path, caplog, damaged):
    note = ResultsNote(tmp_path)
    note.write(HASHES)
    (tmp_path / damaged).write_bytes(b"x")
    assert note.hashes() == HASHES
    note.mend()
    assert f"{tmp_path / damaged} has been damaged: its copy is used" in caplog.text
    assert (tmp_path / "results").read_bytes() == (tmp_path / "results.copy").read_bytes()
    assert note.hashes() == HASHES


def test_that_there_was_a_note_stays_known(tmp_path, caplog):
    note = ResultsNote(tmp_path)
    assert not note.exists
    note.write(HASHES)
    for name in ("results", "results.copy"):
        (tmp_path / name).write_bytes(b"x")
    note.mend()
    assert "what is in its place already is computed again and compared" in caplog.text
    assert note.exists
    assert note.hashes() == {}


def test_what_is_whole_is_not_touched(tmp_path, caplog):
    note = ResultsNote(tmp_path)
    note.mend()
    note.write(HASHES)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    note.mend()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert caplog.text == ""
