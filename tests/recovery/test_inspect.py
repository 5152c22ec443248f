import json

import pytest
import torch

import detune
from detune.certificate.verdict import Verdict
from detune.compatibility.model_set import Models, rows_to_read
from detune.errors import InputError
from tests.cases import normal, seeded
from tests.families import Fine, add, delta, edit, plain_family, plain_state, save_plain, tree


@pytest.fixture
def fine(tmp_path) -> Fine:
    return plain_family(tmp_path / "models")


def test_finds_what_changed_and_at_which_rank(fine):
    report = detune.inspect(fine.models)
    assert report.counts == {Verdict.SHARED: 3, Verdict.FLOOR: 4}
    for row in report.tensors:
        assert row.ranks == ((2, 2, 2) if "layer" in row.name else ())
        assert row.seconds >= 0
    assert [row.spec for row in report.inputs] == fine.specs
    assert json.loads(report.to_json())["command"]["name"] == "inspect"


def test_writes_nothing(fine):
    before = tree(fine.base.parent)
    detune.inspect(fine.models)
    assert tree(fine.base.parent) == before


def test_hashes_the_files_where_that_is_wanted(fine):
    whole, quick = (detune.inspect(fine.models, hashes=hashes) for hashes in (True, False))
    assert [[len(sha256) for sha256 in row.sha256.values()] for row in whole.inputs] == [[64]] * 3
    assert [row.sha256 for row in quick.inputs] == [{}] * 3
    assert [row.verdict for row in quick.tensors] == [row.verdict for row in whole.tensors]


def test_finds_mixed_ranks(tmp_path):
    base, generator = plain_state(), seeded(4)
    models = []
    for i, rank in enumerate((1, 5, 3, 2)):
        name = "layer.0.weight"
        models.append(save_plain(tmp_path / str(i), base | {name: add(base[name], delta(generator, base[name], rank))}))
    (row,) = (row for row in detune.inspect(models).tensors if row.ranks)
    assert row.ranks == (1, 5, 3, 2)


def test_two_models_show_the_rank_of_their_difference(fine):
    report = detune.inspect(fine.models[:2])
    assert report.counts == {Verdict.SHARED: 3, Verdict.NOT_DETERMINED: 4}
    row = next(row for row in report.tensors if "layer" in row.name)
    assert row.reason.startswith("the difference has rank 4; a third model is needed")
    assert row.ranks == ()


def test_says_what_cannot_be_recovered_and_goes_on(fine):
    """One re-initialised layer is no reason to refuse the rest."""
    weight = normal(seeded(9), 80, 64).float()
    edit(fine.models[0], lambda state: state.update({"layer.2.weight": weight}))
    report = detune.inspect(fine.models)
    row = next(row for row in report.tensors if row.verdict is Verdict.NOT_DETERMINED)
    assert row.name == "layer.2.weight"
    assert "full rank" in row.reason
    assert report.counts[Verdict.FLOOR] == 3


def test_vectors_can_only_be_averaged_and_integers_not_at_all(fine):
    for i, model in enumerate(fine.models):
        edit(
            model, lambda state, i=i: state.update({"norm.weight": torch.full((64,), i / 7), "steps": torch.tensor(i)})
        )
    rows = {row.name: row for row in detune.inspect(fine.models).tensors}
    assert rows["norm.weight"].verdict is Verdict.AVERAGED
    assert rows["steps"].verdict is Verdict.NOT_DETERMINED


@pytest.mark.parametrize("name", ["layer.1.weight", "norm.weight"])
def test_refuses_nan(fine, name):
    def poison(state):
        state[name] = state[name].clone()
        state[name].reshape(-1)[3] = float("nan")

    edit(fine.models[1], poison)
    with pytest.raises(InputError, match=rf"'{name}' of .*model-1 holds NaN or Inf"):
        detune.inspect(fine.models)


def test_needs_a_model():
    with pytest.raises(InputError, match="no model given; inspect looks at one at least; add models"):
        detune.inspect([])


def test_one_model_is_said_to_be_what_it_is(command, fine):
    report = detune.inspect(fine.models[:1])
    (row,) = report.inputs
    assert not report.tensors
    assert row.notes[0] == "safetensors, 1 file, 7 tensors of 21,345 numbers: 6 float32, 1 int64"
    assert "needs two more fine-tunes" in row.notes[-1]
    ran = command("inspect", fine.models[0])
    assert (ran.code, ran.err) == (0, "")
    assert f"{fine.models[0]}: {row.notes[0]}" in ran.out


def test_tells_what_it_is_at(fine):
    seen = []
    report = detune.inspect(fine.models, on_tensor=lambda name, row: seen.append((name, row)))
    # Several are in work at a time; they are begun in their order.
    assert [name for name, row in seen if row is None] == [row.name for row in report.tensors]
    assert all(seen.index((row.name, None)) < seen.index((row.name, row)) for row in report.tensors)
    assert len(seen) == 2 * len(report.tensors)


# --- some rows of each matrix ---


def tall_family(folder):
    """Four fine-tunes of a base whose matrices have more rows than are looked at."""
    generator = seeded(21)
    base = {
        "layer.weight": normal(generator, 400, 96).bfloat16(),
        "kernel.weight": normal(generator, 300, 32, 3, 3).float(),
        "embed_tokens.weight": normal(generator, 500, 64).bfloat16(),
        "norm.weight": normal(generator, 300).float(),
    }
    models = []
    for i, rank in enumerate((3, 1, 2, 4)):
        changed = {name: add(base[name], delta(generator, base[name], rank)) for name in list(base)[:2]}
        models.append(save_plain(folder / f"model-{i}", base | changed))
    return models


def test_some_rows_say_what_all_of_them_do(tmp_path):
    models = tall_family(tmp_path)
    whole, part = detune.inspect(models), detune.inspect(models, rows=96)
    for ours, theirs in zip(part.tensors, whole.tensors, strict=True):
        assert (ours.name, ours.shape, ours.ranks) == (theirs.name, theirs.shape, theirs.ranks)
        # Bits on a grid have fewer entries to be judged by, and so a more cautious verdict.
        assert ours.verdict == theirs.verdict or (ours.grid, ours.verdict) == ("bfloat16", Verdict.APPROXIMATE)
    assert whole.reading is None
    read = [96 * 96 * 2, 96 * 32 * 9 * 4, 96 * 64 * 2, 300 * 4]
    total = [400 * 96 * 2, 300 * 32 * 9 * 4, 500 * 64 * 2, 300 * 4]
    assert (part.reading.rows, part.reading.read_bytes, part.reading.total_bytes) == (96, 4 * sum(read), 4 * sum(total))
    assert json.loads(part.to_json())["reading"]["read_bytes"] == 4 * sum(read)
    reasons = {row.name: row.reason for row in part.tensors}
    assert reasons["embed_tokens.weight"] == "identical in the 96 rows that were looked at"
    assert reasons["norm.weight"] == "identical in all models"


def test_models_on_the_hub_are_not_downloaded(hub, monkeypatch):
    monkeypatch.setattr("detune.compatibility.model_set.ROWS_ON_HUB", 64)
    models = tall_family(hub.root / "org")
    specs = [f"org/{model.name}" for model in models]
    report = detune.inspect(specs)
    assert next(row.ranks for row in report.tensors if row.name == "layer.weight") == (3, 1, 2, 4)
    assert report.reading.rows == 64
    headers = sum(int.from_bytes((model / "model.safetensors").read_bytes()[:8], "little") + 8 for model in models)
    assert hub.sent_bytes == report.reading.read_bytes + headers
    assert hub.sent_bytes < 0.3 * report.reading.total_bytes
    sent = hub.sent_bytes
    with Models(specs, rows=rows_to_read(specs, "all")) as downloaded:
        assert downloaded.reading is None
    assert hub.sent_bytes == sent + sum((model / "model.safetensors").stat().st_size for model in models)


def test_too_few_rows_tell_nothing(fine):
    with pytest.raises(InputError, match="63 rows of each matrix; expected 64 at least"):
        detune.inspect(fine.models, rows=63)
