"""Every command sees models in the forms that `recover` sees: what differs between them is no error of one of them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from detune.compatibility.quantisation_levels import to_nf4
from tests.cases import normal, seeded
from tests.families import Fine, State, add, delta, edit, plain_family, save_plain, stored, tree

LAYERS = [f"layer.{i}.weight" for i in range(4)]
EMBED = "embed_tokens.weight"


@pytest.fixture
def fine(tmp_path: Path) -> Fine:
    return plain_family(tmp_path / "models", 3)


def levels(matrix: torch.Tensor) -> torch.Tensor:
    scale = matrix.abs().amax(dim=1, keepdim=True) / 127
    return (matrix / scale).round() * scale


def turned_back(state: State) -> None:
    state |= {name: levels(state[name]).half() for name in LAYERS}


def in_nf4(state: State) -> None:
    state |= {name: to_nf4(state[name]).half() for name in LAYERS}


def in_fp8(state: State) -> None:
    for name in LAYERS:
        scale = state[name].abs().max() / 448
        state |= {name: (state[name] / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}


def stacked(state: State) -> None:
    state["mlp.experts.up_proj"] = torch.stack([state.pop(name) for name in LAYERS])


def edited(fine: Fine, change: Callable[[State], object]) -> Fine:
    for model in fine.models:
        edit(model, change)
    return fine


def with_own_rows(fine: Fine) -> Fine:
    for i, model in enumerate(fine.models):
        more = normal(seeded(i), 2, 16).float()
        edit(model, lambda state, more=more: state.update({EMBED: torch.cat([state[EMBED], more])}))
    return fine


def not_merged(fine: Fine) -> Fine:
    """Models as PEFT saves them with their adapters beside the base."""
    base, generator = stored(fine.base), seeded(5)
    for model in fine.models:
        state = {name: tensor for name, tensor in base.items() if name not in LAYERS}
        for name in LAYERS:
            module = name.removesuffix(".weight")
            state[f"{module}.base_layer.weight"] = base[name]
            state[f"{module}.lora_A.default.weight"] = normal(generator, 2, 64).float()
            state[f"{module}.lora_B.default.weight"] = normal(generator, 80, 2).float()
        save_file(state, model / "model.safetensors")
    return fine


class TestPack:
    @pytest.mark.parametrize("form", [lambda fine: edited(fine, stacked), with_own_rows], ids=["experts", "own rows"])
    def test_what_is_solved_in_pieces_is_packed_whole(self, command, fine, tmp_path, form):
        before = [tree(model) for model in form(fine).models]
        assert command("pack", *fine.models, "--out", tmp_path / "pack").code == 0
        assert command("unpack", tmp_path / "pack", "--out", tmp_path / "again").code == 0
        assert [tree(tmp_path / "again" / model.name) for model in fine.models] == before

    @pytest.mark.parametrize("change", [turned_back, in_nf4], ids=["int8", "nf4"])
    def test_quantised_and_turned_back(self, command, fine, tmp_path, change):
        before = [tree(model) for model in edited(fine, change).models]
        assert command("pack", *fine.models, "--out", tmp_path / "pack").code == 0
        assert command("unpack", tmp_path / "pack", "--out", tmp_path / "again").code == 0
        assert [tree(tmp_path / "again" / model.name) for model in fine.models] == before

    @pytest.mark.parametrize("option", [[], ["--dry-run"]], ids=["pack", "dry run"])
    @pytest.mark.parametrize(
        ("form", "why"),
        [
            (lambda fine: edited(fine, in_fp8), "'layer.0.weight' is stored as float8_e4m3fn, one scale"),
            (not_merged, "it holds an adapter that was not merged beside its base"),
        ],
        ids=["fp8", "not merged"],
    )
    def test_what_is_not_stored_as_it_is_read_is_refused_before_anything_is_computed(
        self, command, fine, tmp_path, form, why, option
    ):
        ran = command("pack", *form(fine).models, "--out", tmp_path / "pack", *option)
        assert ran.code == 2
        assert ran.err == f"detune: error: {fine.models[0]} cannot be packed; {why}; keep the file as it is\n"


class TestExtract:
    @pytest.mark.parametrize("given", ["base", "recovered"])
    def test_quantised_and_turned_back_adapters_stand_over_the_levels(self, command, fine, tmp_path, given):
        edited(fine, turned_back)
        base = fine.base
        if given == "recovered":
            base = tmp_path / "recovered"
            assert command("recover", *fine.models, "--out", base).code == 0
        ran = command("extract", *fine.models, "--base", base, "--out", tmp_path / "loras", "--json")
        assert ran.code == 0
        summary = json.loads(ran.out)["summary"]
        # The noise of rows with large scales may be taken for one direction more.
        assert all(figures["LoRA"] == 4 and set(figures["ranks"]) <= {2, 3} for figures in summary.values())

    def test_fp8(self, command, fine, tmp_path):
        edited(fine, in_fp8)
        ran = command("extract", *fine.models, "--base", fine.base, "--out", tmp_path / "loras", "--json")
        assert ran.code == 0
        rows = json.loads(ran.out)["rows"]
        assert {row["name"] for row in rows if row["rank"] >= 2} == set(LAYERS)

    def test_changes_below_the_levels_are_said_to_be(self, command, tmp_path):
        base = stored(plain_family(tmp_path / "models", 1).base)
        generator, models = seeded(3), []
        for i in range(3):
            change = {name: add(base[name], delta(generator, base[name], 2, 0.001)) for name in LAYERS}
            models.append(save_plain(tmp_path / f"small-{i}", base | change))
            edit(models[-1], in_nf4)
        ran = command("extract", *models, "--base", tmp_path / "models/base", "--out", tmp_path / "loras")
        assert ran.code == 2
        assert "12 of 12 tensors that differ do so by quantisation noise alone; give models that were " in ran.err

    def test_adapters_of_three_models_that_were_not_merged(self, command, fine, tmp_path):
        """All three hold one base, so all their weights are alike: they are no copies of each other."""
        not_merged(fine)
        assert command("recover", *fine.models, "--out", tmp_path / "base").code == 0
        recovered, base = stored(tmp_path / "base"), stored(fine.base)
        assert all(torch.equal(recovered[name], base[name]) for name in LAYERS)
        assert "3 of 3 models share a source: no tensor differs" in command("family", *fine.models).out
        ran = command("extract", *fine.models, "--base", tmp_path / "base", "--out", tmp_path / "loras")
        assert ran.code == 0
        for model in fine.models:
            adapter = load_file(tmp_path / "loras" / model.name / "adapter_model.safetensors")
            for name in LAYERS:
                module = name.removesuffix(".weight")
                factors = [adapter[f"base_model.model.{module}.lora_{k}.weight"] for k in "AB"]
                expected = [stored(model)[f"{module}.lora_{k}.default.weight"] for k in "AB"]
                assert all(map(torch.equal, factors, expected))

    def test_one_that_was_not_merged_given_twice_is_still_refused(self, command, fine, tmp_path):
        not_merged(fine)
        same = save_plain(tmp_path / "same", stored(fine.models[0]))
        ran = command("recover", fine.models[0], same, "--out", tmp_path / "base")
        assert (ran.code, "is given twice" in ran.err) == (2, True)

    def test_numbers_that_are_stored_in_another_dtype_are_no_change(self, command, fine, tmp_path):
        base = save_plain(tmp_path / "base", stored(fine.base) | {EMBED: stored(fine.base)[EMBED].bfloat16()})
        for model in fine.models:
            edit(model, lambda state: state.update({EMBED: state[EMBED].bfloat16().float()}))
        ran = command("extract", *fine.models, "--base", base, "--out", tmp_path / "loras", "--json")
        assert {row["name"] for row in json.loads(ran.out)["rows"]} == set(LAYERS)


class TestAudit:
    def audit(self, command, fine, *options):
        return command("audit", *fine.models, "--weights-only", *options)

    def test_what_the_base_lacks_is_judged_without_it(self, command, fine):
        ran = self.audit(command, with_own_rows(fine), "--base", fine.base)
        assert ran.code == 1
        assert "4 of 5 fine-tuned matrices come back; release 3, the last, was the one too many." in ran.out
        assert f"1 tensor is not in the base, and judged without it: '{EMBED}[50:52]'." in ran.out.replace("\n", " ")

    def test_a_release_that_holds_its_base_gives_it_away(self, command, fine):
        ran = self.audit(command, not_merged(fine))
        assert ran.code == 2
        assert f"{fine.models[0]} gives the whole base away; it holds the base's own weights, " in ran.err


@pytest.mark.parametrize("change", [in_fp8, turned_back], ids=["fp8", "int8"])
def test_two_quantised_models_lie_on_no_grid(command, fine, tmp_path, change):
    edited(fine, change)
    ran = command("recover", *fine.models[:2], "--method", "lattice", "--out", tmp_path / "out")
    assert ran.code == 2
    (line,) = ran.err.splitlines()
    assert "quantised models lie on levels of their own, and on no grid of the base's" in line


def test_rows_that_each_model_has_added_are_averaged_by_all(command, fine, tmp_path):
    with_own_rows(fine)
    rows = f"{EMBED}[50:52]"
    assert command("recover", *fine.models, "--out", tmp_path / "out").code == 0
    report = json.loads((tmp_path / "out/detune.json").read_text())
    (row,) = (row for row in report["tensors"] if row["name"] == rows)
    assert (row["verdict"], row["method"]) == ("averaged", "mean")
    assert row["reason"] == "rows that each model has added by itself: the average of 3 models"
    mean = torch.stack([stored(model)[EMBED][50:] for model in fine.models]).double().mean(dim=0).float()
    assert torch.equal(stored(tmp_path / "out")[EMBED][50:], mean)
    family = json.loads(command("family", *fine.models, "--json").out)
    (told,) = (tensor for tensor in family["tensors"] if tensor["name"] == rows)
    assert not told["enough"]
    assert "added by itself" in told["reason"]


def test_family_takes_equal_numbers_in_other_dtypes_for_equal(command, fine):
    for model in fine.models:
        edit(model, lambda state: state.update({EMBED: state[EMBED].bfloat16().float()}))
    edit(fine.models[1], lambda state: state.update({EMBED: state[EMBED].bfloat16()}))
    family = json.loads(command("family", *fine.models, "--json").out)
    assert {tensor["name"] for tensor in family["tensors"]} == set(LAYERS)
