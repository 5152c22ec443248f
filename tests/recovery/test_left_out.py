"""Strangers in a run: left out as a whole, or of one tensor, and always said to be."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import detune
from detune.certificate.verdict import Verdict
from detune.errors import InputError
from tests.cases import normal, seeded
from tests.families import Fine, add, delta, edit, plain_family, plain_state, save_plain, stored

LAYERS = [f"layer.{i}.weight" for i in range(4)]


@pytest.fixture
def fine(tmp_path: Path) -> Fine:
    return plain_family(tmp_path / "models", 4)


def renew(model: Path, names: Sequence[str] = LAYERS, seed: int = 5) -> None:
    generator = seeded(seed)
    edit(model, lambda state: state.update({name: normal(generator, *state[name].shape).float() for name in names}))


def assert_is_base(out: Path, fine: Fine) -> None:
    for name, tensor in stored(fine.base).items():
        torch.testing.assert_close(stored(out)[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("run", ["recover", "inspect"])
def test_a_stranger_is_left_out_and_reported(fine, tmp_path, run):
    renew(fine.models[0])
    if run == "recover":
        report = detune.recover(fine.models, tmp_path / "out")
        assert_is_base(tmp_path / "out", fine)
        assert json.loads((tmp_path / "out" / "detune.json").read_text())["inputs"][0]["left_out"]
    else:
        report = detune.inspect(fine.models)
    assert [row.spec for row in report.inputs] == fine.specs
    assert [row.left_out is None for row in report.inputs] == [False, True, True, True]
    assert "4 of 4 matrices, first 'layer.0.weight'; it has another base" in report.inputs[0].left_out
    assert {row.ranks for row in report.tensors if "layer" in row.name} == {(2, 2, 2)}


def test_the_first_member_gives_the_layout(fine, tmp_path):
    renew(fine.models[0])
    (fine.models[0] / "config.json").write_text('{"stranger": true}')
    detune.recover(fine.models, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "{}"


def test_a_model_that_does_not_fit_is_left_out_where_enough_do(fine, tmp_path):
    edit(fine.models[1], lambda state: state.update({name: torch.ones(3, 4) for name in LAYERS}))
    report = detune.recover(fine.models, tmp_path / "out")
    assert "3 of 7 tensors are alike, it has 'layer.0.weight' with shape [3, 4]" in report.inputs[1].left_out
    assert_is_base(tmp_path / "out", fine)


def test_what_is_left_out_is_not_overwritten(fine):
    renew(fine.models[0])
    with pytest.raises(detune.OutputError):
        detune.recover(fine.models, fine.models[0], overwrite=True)


def test_two_sources_of_equal_size_are_refused(fine, tmp_path):
    base, other = plain_state(), {name: normal(seeded(3), 80, 64) for name in LAYERS}
    generator = seeded(4)
    others = [
        save_plain(tmp_path / f"o{i}", base | {n: add(w, delta(generator, w, 2)).float() for n, w in other.items()})
        for i in range(4)
    ]
    with pytest.raises(InputError, match=r"2 sources, with 4 models each; .*model-0.*o0"):
        detune.recover([*fine.models, *others], tmp_path / "out")


@pytest.mark.parametrize("method", ["mean", "single"])
def test_an_average_is_of_all_that_are_given(fine, tmp_path, method):
    renew(fine.models[3])
    report = detune.recover(fine.models, tmp_path / "out", method)
    assert all(row.left_out is None for row in report.inputs)


def test_a_new_head_is_left_out_of_its_tensor_only(fine, tmp_path):
    renew(fine.models[1], LAYERS[2:3])
    report = detune.recover(fine.models, tmp_path / "out")
    assert all(row.left_out is None for row in report.inputs)
    row = next(row for row in report.tensors if row.name == LAYERS[2])
    assert row.verdict is Verdict.FLOOR
    assert row.ranks == (2, 64, 2, 2)
    assert row.reason.endswith("without model 1 of the 4 used: full rank here")
    assert report.summary["ranks"] == [[2], [2, 64], [2], [2]]
    assert_is_base(tmp_path / "out", fine)


def test_two_pairs_of_heads_are_not_chosen_between(fine, tmp_path):
    head = normal(seeded(9), 80, 64).float()
    generator = seeded(10)
    for model in fine.models[2:]:
        change = delta(generator, head, 2)
        edit(model, lambda state, change=change: state.update({LAYERS[0]: add(head, change)}))
    row = next(row for row in detune.inspect(fine.models).tensors if row.name == LAYERS[0])
    assert row.verdict is Verdict.NOT_DETERMINED


def test_the_commands_say_so(command, fine, tmp_path):
    stranger = fine.models[0].with_name("stranger")
    shutil.copytree(fine.models[0], stranger)
    renew(stranger)
    renew(fine.models[2], LAYERS[1:2])
    ran = command("recover", *fine.specs, stranger, "--out", tmp_path / "out")
    assert (ran.code, ran.err) == (0, "")
    assert f"left out {stranger}: differs from the others at full rank in 4 of 4 matrices" in ran.out

    ran = command("family", *fine.specs, stranger)
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert f"A  {fine.models[0]}: changed 4 matrices at low rank" in lines
    shown = "changed 4 matrices, a low rank shows in 3 of 4 looked at; 1 tensor of its own: 'layer.1.weight'"
    assert f"A  {fine.models[2]}: {shown}" in lines
    assert "     layer.1.weight: re-initialised: unrelated to the others'" in lines
    assert any(line.startswith(f"B  NOT {stranger}: differs from") for line in lines)
    assert any(line.split() == ["layer.*.weight", "×4", "80×64", "2,", "2,", "2,", "2", "yes"] for line in lines)
    assert lines[-1] == "4 of 5 models share a source: all 4 changed matrices can be recovered"

    ran = command("family", *fine.specs, stranger, "--json")
    assert [model["belongs"] for model in json.loads(ran.out)["models"]] == [True] * 4 + [False]
