from pathlib import Path
from statistics import fmean

import pytest
import torch
from transformers import BertConfig, BertModel

from detune._runtime import global_seed, quiet
from detune.attacks.align import align
from detune.audit import AuditReport, audit, members
from detune.audit.findings import verdict_of
from detune.audit.record import Behaviour
from detune.audit.trial import AboveMeasuredNoise
from detune.defences import Noise, Permutation, defend
from detune.methods import Auto
from detune.problem import Stack
from tests.cases import normal
from tests.cases import seeded as generator_of
from tests.families import Fine, fine_tune, save_plain


@pytest.fixture(scope="module")
def fine(tmp_path_factory: pytest.TempPathFactory) -> Fine:
    """Three fine-tunes of an encoder that is wide enough to tell ranks by."""
    config = BertConfig(
        vocab_size=40,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=16,
    )
    with global_seed(0), quiet():
        return fine_tune(BertModel(config), ["query.weight", "value.weight"], tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def permuted(fine: Fine, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Each with its neurons and heads in an order of its own."""
    folder = tmp_path_factory.mktemp("permuted")
    for i, model in enumerate(fine.models):
        defend(Permutation(), model, folder / str(i), seed=i, verify=False)
    return [folder / str(i) for i in range(len(fine.models))]


def alignment(report: AuditReport) -> tuple[bool | None, str]:
    (result,) = (result for result in report.results if result.rule_id == "alignment")
    return result.holds, result.message


def test_permuted_releases_are_matched_again_and_so_is_the_base(fine, permuted):
    report = audit(permuted, fine.base, weights_only=True)
    assert [model.realigned for model in report.models] == [False, True, True]
    assert report.base.realigned
    assert alignment(report) == (False, "2 of 3 releases had to be matched to the first one, and could be")
    assert (report.verdict.level, report.verdict.given_away, report.verdict.matrices) == ("error", 4, 4)
    assert report.curve[2].w_error == pytest.approx(audit(fine.models, fine.base).curve[2].w_error, abs=0.3)
    assert report.unchanged.differing == ()


def test_without_the_base_they_are_matched_too(permuted):
    assert audit(permuted, weights_only=True).verdict.level == "error"


def test_releases_that_fit_are_left_as_they_are(fine):
    report = audit(fine.models, fine.base, weights_only=True)
    assert not any(model.realigned for model in report.models)
    assert not report.base.realigned
    assert alignment(report)[0] is True


def test_copies_are_those_of_the_attack(permuted, tmp_path):
    """`align` is what whoever knows the defence would run."""
    recovered = audit([found.path for found in align(permuted, tmp_path)], weights_only=True)
    matched = audit(permuted, weights_only=True)
    assert [entry.outcomes[-1].predicted_w_error for entry in recovered.tensors] == [
        entry.outcomes[-1].predicted_w_error for entry in matched.tensors
    ]


def test_noise_that_turning_left_is_measured():
    generator = generator_of(1)
    W = normal(generator, 128, 96)
    deltas = [normal(generator, 128, 2) @ normal(generator, 2, 96) for _ in range(3)]
    noise = 3e-6
    stack = Stack.of([(W + M_i + noise * normal(generator, 128, 96)).float() for M_i in deltas])
    found = AboveMeasuredNoise(Auto()).solve(stack)
    assert found.ranks == (2, 2, 2)
    assert float((found.weight - W).square().mean().sqrt()) < noise
    exact = Stack.of([(W + M_i).float() for M_i in deltas])
    torch.testing.assert_close(AboveMeasuredNoise(Auto()).solve(exact).weight, Auto().solve(exact).weight)


def test_noise_is_measured_and_the_adapters_split_off_above_it(fine, tmp_path):
    for i, model in enumerate(fine.models):
        defend(Noise(0.01), model, tmp_path / str(i), seed=i, verify=False)
    releases = [tmp_path / str(i) for i in range(len(fine.models))]
    report = audit(releases, fine.base, weights_only=True)
    assert [model.left_out for model in report.models] == [None] * len(releases)
    assert {entry.outcomes[-1].method for entry in report.tensors if entry.is_matrix} == {"denoise"}
    (low_rank,) = (result for result in report.results if result.rule_id == "low-rank")
    assert low_rank.holds is False
    assert "at full rank, by noise; adapters were split off" in low_rank.message
    tuned = [entry for entry in report.tensors if entry.name.endswith(("query.weight", "value.weight"))]
    mean = fmean(entry.outcomes[1].w_error for entry in tuned)
    assert fmean(entry.outcomes[2].w_error for entry in tuned) < mean - 0.5


def test_noise_is_not_searched_for_other_frames(fine, tmp_path, monkeypatch):
    """That takes minutes, and the spectrum of what the releases differ by says that it would find nothing."""
    monkeypatch.setattr(members, "write_aligned", lambda *_: pytest.fail("matched"))
    for i, model in enumerate(fine.models):
        defend(Noise(0.01), model, tmp_path / str(i), seed=i, verify=False)
    report = audit([tmp_path / str(i) for i in range(len(fine.models))], fine.base, weights_only=True)
    assert alignment(report) == (True, "nothing is out of place in 3 of 3 releases")


@pytest.mark.parametrize(
    ("recovered", "level", "words"),
    [(1e-4, "warning", "away what the base does, and not its"), (3e-3, "note", "do not give the base away")],
)
def test_noise_that_hides_the_weights_and_not_what_they_do(fine, recovered, level, words):
    report = audit(fine.models[:2], fine.base, weights_only=True)
    outputs = Behaviour(metric="cosine", meaning="mean distance", inputs=16, release=0.02, recovered=recovered)
    verdict = verdict_of(report.tensors, report.curve, report.unchanged, outputs, base=())
    assert (verdict.level, verdict.given_away) == (level, 0)
    assert words in verdict.headline


def test_strangers_are_no_noise(tmp_path):
    releases = [save_plain(tmp_path / str(i), {"q.weight": normal(generator_of(i), 96, 80).float()}) for i in range(3)]
    report = audit(releases, weights_only=True)
    assert sum(model.left_out is None for model in report.models) == 1
