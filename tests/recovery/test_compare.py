import json
import math

import pytest
import torch

import detune
from detune.errors import InputError
from detune.metrics import squared_error, w_error
from tests.cases import normal, seeded
from tests.families import plain_state, save_plain


def test_equal_checkpoints(tmp_path):
    for name in "ab":
        save_plain(tmp_path / name, plain_state())
    comparison = detune.compare(tmp_path / "a", tmp_path / "b")
    assert all(row.w_error == -math.inf and row.bit_identical == 1 for row in comparison.rows)
    assert comparison.differing == ()
    assert comparison.summary == {
        "tensors": 7,
        "identical_tensors": 7,
        "mean_w_error": None,
        "worst_w_error": None,
        "worst_tensor": None,
        "bit_identical": 1.0,
    }
    content = json.loads(comparison.to_json())
    assert {row["w_error"] for row in content["rows"]} == {None}


def test_w_error_is_the_log_of_the_mean_square_and_averages_as_logs(tmp_path):
    truth = {"a": torch.zeros(10, 10), "b": torch.zeros(4), "c": torch.ones(3)}
    recovered = {"a": torch.full((10, 10), 1e-3), "b": torch.tensor([1.0, 0, 0, 0]), "c": torch.ones(3)}
    comparison = detune.compare(save_plain(tmp_path / "r", recovered), save_plain(tmp_path / "t", truth))
    rows = {row.name: row for row in comparison.rows}
    assert rows["a"].w_error == pytest.approx(-6, abs=1e-6)
    assert rows["b"].w_error == pytest.approx(math.log10(0.25))
    assert rows["b"].bit_identical == 0.75
    assert comparison.summary["mean_w_error"] == pytest.approx((-6 + math.log10(0.25)) / 2, abs=1e-6)
    assert comparison.summary["worst_tensor"] == "b"
    assert comparison.summary["worst_w_error"] == rows["b"].w_error
    assert comparison.summary["identical_tensors"] == 1
    assert comparison.summary["bit_identical"] == pytest.approx((0 + 3 + 3) / 107)


def test_signs_of_zero_are_other_bits_of_the_same_value(tmp_path):
    one, other = (
        save_plain(tmp_path / name, {"x": torch.tensor([zero, 1.0])}) for name, zero in (("a", 0.0), ("b", -0.0))
    )
    (row,) = detune.compare(one, other).rows
    assert row.w_error == -math.inf
    assert row.bit_identical == 0.5


def test_bits_are_those_of_the_truths_dtype(tmp_path):
    truth = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)
    recovered = truth.float() + torch.tensor([0, 1e-6, 1.0])
    one, other = save_plain(tmp_path / "r", {"x": recovered}), save_plain(tmp_path / "t", {"x": truth})
    assert detune.compare(one, other).rows[0].bit_identical == pytest.approx(2 / 3)


def test_names_that_only_one_has_are_told(tmp_path):
    state = plain_state()
    one = save_plain(tmp_path / "r", {"head": torch.ones(2), **state})
    other = save_plain(tmp_path / "t", state | {"pooler": torch.ones(2)})
    comparison = detune.compare(one, other)
    assert (comparison.only_recovered, comparison.only_truth) == (("head",), ("pooler",))
    assert len(comparison.rows) == len(state)


def test_refuses_what_cannot_be_compared(tmp_path):
    one = save_plain(tmp_path / "a", {"x": torch.ones(2, 3)})
    with pytest.raises(InputError, match=r"'x' of .*b has shape \[3, 2\]; .*a has \[2, 3\]"):
        detune.compare(save_plain(tmp_path / "b", {"x": torch.ones(3, 2)}), one)
    with pytest.raises(InputError, match=r"no tensor in common; got 'y' .*, expected 'x' "):
        detune.compare(save_plain(tmp_path / "c", {"y": torch.ones(2, 3)}), one)
    damaged = save_plain(tmp_path / "d", {"x": torch.tensor([[1, 1, math.nan]] * 2)})
    for pair in ((damaged, one), (one, damaged)):
        with pytest.raises(InputError, match=r"'x' of .*d holds NaN or Inf"):
            detune.compare(*pair)


def test_sums_over_several_blocks():
    truth = normal(seeded(0), 600, 700)
    assert squared_error(truth + 0.5, truth) == pytest.approx(0.25)
    expected = math.log10(float(truth.square().mean())) - 400
    assert w_error(1e-200 * truth, torch.zeros_like(truth)) == pytest.approx(expected)


def test_a_sum_beyond_the_dtype_is_no_damage(tmp_path):
    state = {"x": torch.full((64, 64), 6e4, dtype=torch.float16)}
    models = [save_plain(tmp_path / name, state) for name in "ab"]
    assert detune.compare(*models).rows[0].bit_identical == 1
