from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import detune
from detune.audit import AuditReport, audit
from detune.audit import trial as trial_module
from detune.errors import InputError
from tests.bench.tiny_models import save_bert
from tests.cases import normal, seeded
from tests.families import add, edit, fine_tune, plain_family, plain_state, save_plain, tree


def assumption(report: AuditReport, rule: str) -> bool | None:
    (result,) = (result for result in report.results if result.rule_id == rule)
    return result.holds


def found(report: AuditReport, rule: str) -> list[str | None]:
    return [result.tensor for result in report.results if result.rule_id == rule]


class TestReleasesThatGiveTheBaseAway:
    def test_the_third_is_the_one_too_many(self, report):
        verdict = report.verdict
        assert (verdict.level, verdict.given_away, verdict.matrices, verdict.one_too_many) == ("error", 4, 4, 3)
        assert verdict.headline == "These 4 releases give the base away."
        assert verdict.sentences[0] == "4 of 4 fine-tuned matrices come back; release 3 was the one too many."
        assert [point.given_away for point in report.curve] == [0, 0, 4, 4]

    def test_the_certificate_says_the_same_without_the_base(self, report, blind):
        assert [point.given_away for point in blind.curve] == [point.given_away for point in report.curve]
        assert all(point.w_error is None and point.identical is None for point in blind.curve)
        for ours, theirs in zip(blind.curve[2:], report.curve[2:], strict=True):
            assert ours.predicted_w_error == theirs.predicted_w_error == pytest.approx(theirs.w_error, abs=0.3)

    def test_errors_are_those_of_recover_and_compare(self, fine, report, tmp_path):
        for models in (3, 4):
            detune.recover(fine.models[:models], tmp_path / str(models))
            rows = {row.name: row for row in detune.compare(tmp_path / str(models), fine.base).rows}
            for entry in report.tensors:
                outcome = entry.outcomes[models - 1]
                assert outcome.w_error == pytest.approx(rows[entry.name].w_error, abs=1e-6)
                assert outcome.identical == pytest.approx(rows[entry.name].bit_identical)

    def test_with_one_and_two_it_is_the_release_and_the_average(self, fine, report):
        base, *models = (load_file(path / "model.safetensors") for path in (fine.base, *fine.models))
        for entry in report.tensors:
            for count in (1, 2):
                mean = torch.stack([model[entry.name].double() for model in models[:count]]).mean(0)
                expected = float((mean - base[entry.name].double()).square().mean().log10())
                assert entry.outcomes[count - 1].w_error == pytest.approx(expected, abs=1e-6)

    def test_every_assumption_holds_but_that_of_a_coarse_base(self, report):
        holding = {result.rule_id: result.holds for result in report.results if result.holds is not None}
        assert [rule for rule, holds in holding.items() if not holds] == ["coarse-base"]
        assert len(holding) == 8

    def test_what_no_release_changed_is_told(self, report):
        assert (report.unchanged.tensors, report.unchanged.entries) == (3, 50 * 16 + 64 + 1)
        assert report.unchanged.differing == ()

    def test_spectra_end_where_the_ranks_add_up(self, report):
        for entry in report.matrices:
            spectrum = entry.spectrum
            assert spectrum is not None
            assert spectrum.rank == 4
            assert spectrum.values[3] > 100 * spectrum.noise > 100 * spectrum.values[4]

    def test_inputs_are_left_alone(self, fine):
        before = tree(fine.base.parent)
        audit(fine.models[:3], fine.base)
        assert tree(fine.base.parent) == before


class TestTheReport:
    def test_comes_back_from_its_json(self, report, blind):
        for made in (report, blind):
            assert AuditReport.model_validate_json(made.to_json()) == made

    def test_every_result_has_a_rule(self, report):
        assert {result.rule_id for result in report.results} <= {rule.id for rule in report.rules}

    def test_names_files_by_their_hashes(self, fine, report):
        with detune.checkpoints.open_checkpoint(fine.models[0]) as model:
            assert report.models[0].sha256 == model.hashes()


class TestReleasesThatDoNot:
    @pytest.mark.parametrize("count", [1, 2])
    def test_too_few(self, fine, count):
        report = audit(fine.models[:count], fine.base)
        assert report.verdict.level == "note"
        assert report.verdict.one_too_many is None
        assert report.verdict.headline.endswith("not give the base away.")
        assert assumption(report, "count") is False
        assert len(found(report, "kept")) == 4

    def test_one_frozen_a(self, tmp_path):
        base, generator = plain_state(), seeded(3)
        A = {"layer.0.weight": normal(generator, 2, 64)}
        models = []
        for i in range(3):
            tuned = {name: add(base[name], normal(generator, 80, 2) @ A[name] / 9) for name in A}
            models.append(save_plain(tmp_path / str(i), base | tuned))
        truth = save_plain(tmp_path / "base", base)
        report = audit(models, truth)
        assert assumption(report, "uniqueness") is None
        assert report.verdict.given_away == 0
        told = audit(models, truth, rank=2)
        assert assumption(told, "uniqueness") is False
        assert told.verdict.given_away == 0

    def test_full_fine_tunes_give_nothing_away(self, tmp_path):
        """They are close to each other, so they share a base; but no noise was added to changes of low rank."""
        base, generator = plain_state(), seeded(4)
        models = []
        for i in range(3):
            tuned = {name: add(base[name], normal(generator, 80, 64) / 9) for name in base if "layer" in name}
            models.append(save_plain(tmp_path / str(i), base | tuned))
        report = audit(models, save_plain(tmp_path / "base", base))
        assert assumption(report, "same-source") is True
        assert assumption(report, "low-rank") is False
        assert [model.left_out for model in report.models] == [None] * 3
        assert report.verdict.level == "note"


class TestSomeOfThem:
    def test_a_stranger_is_left_out(self, fine, tmp_path):
        stranger = {
            name: normal(seeded(5), *tensor.shape).float() if tensor.ndim > 1 else tensor
            for name, tensor in plain_state().items()
        }
        report = audit([*fine.models[:3], save_plain(tmp_path / "stranger", stranger)], fine.base)
        assert "it has another base" in report.models[3].left_out
        assert assumption(report, "same-source") is True
        assert report.verdict.level == "error"
        assert len(report.curve) == 3

    def test_permuted_neurons_are_told(self, fine, tmp_path):
        shuffled = load_file(fine.models[3] / "model.safetensors")
        order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
        shuffled |= {name: tensor[order] for name, tensor in shuffled.items() if "layer" in name}
        report = audit([*fine.models[:3], save_plain(tmp_path / "permuted", shuffled)], fine.base)
        assert assumption(report, "alignment") is False
        assert "neurons or heads in another order" in report.models[3].left_out

    def test_a_part_that_all_have_in_common_is_not_the_base(self, tmp_path):
        fine = plain_family(tmp_path)
        for model in fine.models:
            edit(model, lambda state: state.update({"norm.weight": state["norm.weight"] + 1}))
        report = audit(fine.models, fine.base)
        assert report.unchanged.differing == ("norm.weight",)
        assert found(report, "common-part") == ["norm.weight"]

    def test_a_vector_that_every_release_changed_is_averaged(self, tmp_path):
        fine = plain_family(tmp_path)
        for i, model in enumerate(fine.models):
            edit(model, lambda state, i=i: state.update({"norm.weight": state["norm.weight"] + 1 + i}))
        report = audit(fine.models, fine.base)
        assert found(report, "averaged") == ["norm.weight"]
        assert (report.verdict.matrices, report.verdict.level) == (4, "error")

    def test_part_of_the_base(self, tmp_path):
        """One matrix is changed at full rank by every release."""
        fine = plain_family(tmp_path)
        generator = seeded(6)

        def blur(state: dict[str, Tensor]) -> None:
            state["layer.0.weight"] = add(state["layer.0.weight"], normal(generator, 80, 64) / 9)

        for model in fine.models:
            edit(model, blur)
        report = audit(fine.models, fine.base)
        assert (report.verdict.level, report.verdict.given_away, report.verdict.one_too_many) == ("warning", 3, 3)
        assert assumption(report, "low-rank") is False
        assert report.verdict.headline == "These 3 releases give part of the base away."


class TestTheGrid:
    def fine_tunes(self, folder: Path, size: float) -> tuple[Path, list[Path]]:
        """Fine-tunes of a bf16 base, in float32, changed by `size` of its steps."""
        generator = seeded(7)
        W = (normal(generator, 192, 128) / 16).to(torch.bfloat16).float()
        models = []
        for i in range(2):
            M = normal(generator, 192, 2) @ normal(generator, 2, 128)
            change = M / M.square().mean().sqrt() * size * 2.0**-12
            models.append(save_plain(folder / str(i), {"layer.0.weight": add(W, change)}))
        return save_plain(folder / "base", {"layer.0.weight": W}), models

    def test_small_changes_of_a_coarse_base_give_it_away_at_once(self, tmp_path):
        base, models = self.fine_tunes(tmp_path, 0.2)
        report = audit(models[:1], base)
        assert report.verdict.one_too_many == 1
        assert report.verdict.sentences[0] == "1 of 1 fine-tuned matrix comes back, from the first release alone."
        assert report.tensors[0].outcomes[0].method == "lattice"
        assert assumption(report, "coarse-base") is True

    def test_it_is_not_looked_for_where_it_cannot_show(self, tmp_path, monkeypatch):
        base, models = self.fine_tunes(tmp_path, 300.0)
        skipped = audit(models, base)
        assert "beyond 100 steps" in skipped.tensors[0].outcomes[1].reason
        monkeypatch.setattr(trial_module, "MOST_STEPS", float("inf"))
        tried = audit(models, base)
        assert "no grid of the base shows" in tried.tensors[0].outcomes[1].reason
        assert [point.w_error for point in tried.curve] == [point.w_error for point in skipped.curve]


class TestBehaviour:
    def test_the_recovered_model_does_what_the_base_does(self, tmp_path, here):
        from transformers import AutoModelForMaskedLM

        save_bert(tmp_path / "origin", ["whales", "breathe", "air", "the", "a"])
        model = AutoModelForMaskedLM.from_pretrained(tmp_path / "origin", dtype="auto")
        fine = fine_tune(model, ["query.weight", "value.weight"], tmp_path, n=3)
        for folder in (fine.base, *fine.models):
            for file in (tmp_path / "origin").glob("*token*"):
                (folder / file.name).write_bytes(file.read_bytes())
        report = audit(fine.models, fine.base)
        behaviour = report.behaviour
        assert (behaviour.metric, behaviour.inputs, behaviour.note) == ("activation", 16, "")
        assert behaviour.recovered < 1e-20 < 1e-8 < behaviour.release
        assert "does what the base does" in report.verdict.sentences[-1]
        without = audit(fine.models)
        assert without.behaviour.recovered is None
        assert without.behaviour.release == pytest.approx(behaviour.release, rel=1e-3)

    def test_what_cannot_be_run_is_told(self, report, fine):
        assert report.behaviour.note.startswith("not run: what the model in")
        assert audit(fine.models, weights_only=True).behaviour.note == "not run: the weights alone were asked for"

    def test_inputs_that_do_not_fit_are_refused(self, fine, tmp_path):
        with pytest.raises(InputError, match=r"what the model in .* does cannot be compared"):
            audit(fine.models, fine.base, inputs=tmp_path)


class TestBadInput:
    def test_no_such_model(self, fine):
        with pytest.raises(InputError, match="no such model: 'nowhere'"):
            audit([*fine.models, "nowhere"])
        with pytest.raises(InputError, match="no such model: 'nowhere'"):
            audit(fine.models, "nowhere")

    def test_no_model(self):
        with pytest.raises(InputError, match="no model given; an audit is of one release at least; add models"):
            audit([])

    def test_the_base_itself(self, fine, tmp_path):
        copy = save_plain(tmp_path / "copy", plain_state())
        with pytest.raises(InputError, match=r"copy is the base; no tensor differs from it; give fine-tunes"):
            audit([copy], fine.base)

    def test_a_model_twice(self, fine):
        with pytest.raises(InputError, match="is given twice"):
            audit([fine.models[0], fine.models[0]])

    def test_a_base_of_another_architecture(self, fine, tmp_path):
        other = save_plain(tmp_path / "other", {"layer.0.weight": torch.ones(8, 8)})
        with pytest.raises(InputError, match=r"other does not fit .*; 0 of 7 tensors are alike, it lacks 'steps'"):
            audit(fine.models, other)

    def test_a_base_with_other_weights(self, fine, tmp_path):
        state = {
            name: normal(seeded(8), *tensor.shape).float() if tensor.ndim > 1 else tensor
            for name, tensor in plain_state().items()
        }
        with pytest.raises(InputError, match=r"their weights are unrelated in 4 of 4 matrices, first 'layer.0.weight'"):
            audit(fine.models, save_plain(tmp_path / "other", state))

    def test_a_release_of_another_architecture(self, fine, tmp_path):
        other = save_plain(tmp_path / "other", {"layer.0.weight": torch.ones(8, 8)})
        with pytest.raises(InputError, match="does not fit"):
            audit([fine.models[0], other])

    def test_a_damaged_base(self, fine, tmp_path):
        state = plain_state()
        state["layer.2.weight"][0, 0] = float("nan")
        with pytest.raises(InputError, match=r"tensor 'layer.2.weight' of .*base holds NaN or Inf"):
            audit(fine.models, save_plain(tmp_path / "base", state))

    def test_a_method_that_does_not_exist(self, fine):
        with pytest.raises(InputError, match="no method 'magic'"):
            audit(fine.models, method="magic")


def test_a_change_of_rank_zero_in_some_releases_leaves_the_base(tmp_path):
    """The first two have left one matrix alone: it is the base's from the second on."""
    fine = plain_family(tmp_path)
    base = plain_state()
    for model in fine.models[:2]:
        edit(model, lambda state: state.update({"layer.1.weight": base["layer.1.weight"]}))
    entry = next(entry for entry in audit(fine.models, fine.base).tensors if entry.name == "layer.1.weight")
    assert [outcome.verdict for outcome in entry.outcomes] == ["not determined", "shared", "approximate"]
    assert [outcome.identical for outcome in entry.outcomes] == [1.0, 1.0, 1.0]
