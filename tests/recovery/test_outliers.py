"""One entry of 1e37 in one model, or in all, through the commands."""

from pathlib import Path

import pytest
import torch

import detune
from detune.certificate.verdict import Verdict
from detune.metrics import w_error
from tests.families import Fine, edit, plain_family, stored

NAME, PLACE = "layer.1.weight", (5, 7)
MOST = torch.finfo(torch.float32).max


@pytest.fixture
def fine(tmp_path: Path) -> Fine:
    return plain_family(tmp_path / "models")


def put(fine: Fine, value: float, *models: int) -> None:
    def change(state):
        state[NAME][PLACE] = value

    for i in models:
        edit(fine.models[i], change)


def test_recover_finds_what_one_model_lost(fine, tmp_path):
    put(fine, 1e37, 1)
    report = detune.recover(fine.models, tmp_path / "out", adapters=tmp_path / "loras")
    (row,) = [row for row in report.tensors if row.name == NAME]
    assert row.verdict is Verdict.FLOOR
    assert row.ranks == (2, 2, 2)
    assert "entry (5, 7) of model 1, 1e+37, is " in row.reason
    assert row.reason.count("left out of the fit, and found from the others") == 1
    base, recovered = stored(fine.base)[NAME], stored(tmp_path / "out")[NAME]
    assert w_error(recovered, base) == pytest.approx(row.predicted_w_error, abs=0.3)
    assert float((recovered - base)[PLACE].abs()) < 1e-6
    assert row.reason in [seen.reason for seen in detune.inspect(fine.models).tensors]


def test_what_all_hold_is_no_certainty(fine, tmp_path):
    put(fine, MOST, 0, 1, 2)
    report = detune.recover(fine.models, tmp_path / "out")
    (row,) = [row for row in report.tensors if row.name == NAME]
    assert row.verdict is Verdict.APPROXIMATE
    assert "entry (5, 7) of all models" in row.reason
    base, recovered = stored(fine.base)[NAME], stored(tmp_path / "out")[NAME]
    assert float(recovered[PLACE]) == MOST
    recovered[PLACE] = base[PLACE]
    assert w_error(recovered, base) < -13


def test_a_vector_is_averaged_without_it(fine, tmp_path):
    vectors = [torch.linspace(1, 2, 64) + i for i in range(3)]
    vectors[2][9] = -1e37
    for model, vector in zip(fine.models, vectors, strict=True):
        edit(model, lambda state, vector=vector: state.update({"norm.weight": vector}))
    report = detune.recover(fine.models, tmp_path / "out")
    (row,) = [row for row in report.tensors if row.name == "norm.weight"]
    assert row.verdict is Verdict.AVERAGED
    assert "entry (0, 9) of model 2, -1e+37" in row.reason
    torch.testing.assert_close(stored(tmp_path / "out")["norm.weight"][9], (vectors[0] + vectors[1])[9] / 2)


def test_family_and_extract_see_past_it(fine, tmp_path):
    before = detune.check_family(fine.models)
    put(fine, 1e37, 1)
    after = detune.check_family(fine.models)
    assert after.suffices
    assert [row.ranks for row in after.tensors] == [row.ranks for row in before.tensors]
    extraction = detune.extract(fine.models, tmp_path / "loras", base=fine.base)
    (row,) = [row for row in extraction.rows if (row.model, row.name) == ("model-1", NAME)]
    assert row.rank == 2
    assert row.reason.startswith("entry (5, 7) of the model, 1e+37, is ")
    others = [other for other in extraction.rows if other is not row]
    assert all(other.rank == 2 and not other.reason for other in others)
    assert row.identical > min(other.identical for other in others) - 0.01
