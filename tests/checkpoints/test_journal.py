"""Lines that are written down whole, or not at all."""

import os

import pytest

from detune.checkpoints.journal import Journal
from detune.errors import OutputError

ROWS = [{"name": "a"}, {"name": "b"}]


def test_a_line_that_the_disk_cut_off_is_taken_back(tmp_path, monkeypatch):
    journal = Journal(tmp_path)
    journal.record(ROWS)

    def refuse(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(OutputError, match="no space left for"):
            journal.record([{"name": "c"}])
    journal.record([{"name": "d"}])
    assert journal.rows() == [*ROWS, {"name": "d"}]


def test_a_damaged_line_is_left_out(tmp_path, caplog):
    Journal(tmp_path).record(ROWS)
    (file,) = tmp_path.iterdir()
    data = file.read_bytes()
    file.write_bytes(data.replace(b'"a"', b'"x"'))
    assert Journal(tmp_path).rows() == ROWS[1:]
    assert "1 lines of the journal in" in caplog.text


def test_what_is_kept_is_all_that_is_left(tmp_path):
    first, second = Journal(tmp_path), Journal(tmp_path)
    assert first.is_empty
    first.record(ROWS)
    second.keep(ROWS[:1])
    assert len(list(tmp_path.iterdir())) == 1
    assert Journal(tmp_path).rows() == ROWS[:1]
    second.keep([])
    assert second.is_empty
