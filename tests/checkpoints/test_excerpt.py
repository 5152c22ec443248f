from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig

from detune.checkpoints import open_checkpoint
from detune.checkpoints.excerpt import KEPT_BYTES, Excerpt, runs_of_rows
from tests.checkpoints.loras import train


@given(st.data())
def test_runs_span_the_matrix(data):
    out = data.draw(st.integers(2, 5000))
    rows = data.draw(st.integers(1, out - 1))
    picked = [row for run in runs_of_rows(out, rows) for row in range(run.start, run.stop)]
    assert len(picked) == rows
    assert picked == sorted(set(picked))
    assert picked[0] == 0
    assert picked[-1] == (out - 1 if rows > 1 else 0)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A matrix, a kernel, a view of a larger matrix, a vector and a scalar, in a pickle: it keeps the view."""
    numbers = torch.arange(1200.0)
    state = {
        "matrix": numbers[:300].reshape(30, 10),
        "kernel": numbers[:240].reshape(20, 3, 2, 2).bfloat16(),
        "turned": numbers.reshape(40, 30).T[:, 5:9],
        "small": numbers[:30].reshape(10, 3),
        "vector": numbers[:100],
        "scalar": torch.tensor(3),
    }
    torch.save(state, tmp_path / "model.bin")
    return tmp_path / "model.bin"


def test_shows_rows_of_matrices_and_all_of_the_rest(files):
    whole, excerpt = open_checkpoint(files), open_checkpoint(files, rows=12)
    for name in whole.tensors:
        tensor, shown = whole.read(name), excerpt.read(name)
        if name in ("small", "vector", "scalar"):
            assert shown.equal(tensor)
        else:
            rows = [row for run in runs_of_rows(len(tensor), 12) for row in range(run.start, run.stop)]
            assert shown.equal(tensor[rows])
        assert excerpt.shown_bytes(name) == shown.numel() * shown.element_size()
        assert bytes(excerpt.read_bytes(name)) == bytes(shown.contiguous().view(-1).view(torch.uint8).tolist())
        assert excerpt.read_whole(name).equal(tensor)
    assert (excerpt.spec, excerpt.paths) == (whole.spec, whole.paths)
    assert excerpt.hashes() == {}  # they would have to be read from end to end


def test_counts_what_it_reads_once_while_it_is_kept(files):
    excerpt = open_checkpoint(files, rows=12)
    assert excerpt.read("matrix") is excerpt.read("matrix")
    assert excerpt.read_total_bytes == 12 * 10 * 4
    excerpt.read_whole("matrix")
    assert excerpt.read_total_bytes == (12 + 30) * 10 * 4
    assert excerpt.read_rows("matrix", [slice(2, 5)]).equal(open_checkpoint(files).read("matrix")[2:5])
    assert excerpt.read_total_bytes == (12 + 30 + 3) * 10 * 4


def test_keeps_a_bounded_number_of_bytes(files, monkeypatch):
    monkeypatch.setattr("detune.checkpoints.excerpt.KEPT_BYTES", 500)
    excerpt = open_checkpoint(files, rows=12)
    first = excerpt.read("matrix")
    excerpt.read("small")
    assert excerpt.read("matrix") is not first
    assert KEPT_BYTES > 500


def test_of_a_model_merged_on_the_fly(tmp_path: Path, bert: Callable[..., Any]) -> None:
    bert().save_pretrained(tmp_path / "base")
    train(bert(), LoraConfig(r=2, target_modules=["query"]), tmp_path / "adapter")
    spec = f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"
    whole, excerpt = open_checkpoint(spec), open_checkpoint(spec, rows=8)
    assert isinstance(excerpt, Excerpt)
    for name in ("encoder.layer.0.attention.self.query.weight", "encoder.layer.0.attention.self.key.weight"):
        rows = [row for run in runs_of_rows(32, 8) for row in range(run.start, run.stop)]
        assert excerpt.read(name).equal(whole.read(name)[rows])
