import json

import pytest
import torch

import detune
from detune.errors import InputError
from detune.report import Status
from tests.cases import normal, seeded
from tests.families import Fine, add, delta, edit, plain_family, plain_state, save_plain, tree


@pytest.fixture
def fine(tmp_path) -> Fine:
    return plain_family(tmp_path / "models")


def test_finds_what_changed_and_at_which_rank(fine):
    report = detune.inspect(fine.models)
    assert report.counts == {Status.SHARED: 3, Status.FLOOR: 4}
    for row in report.tensors:
        assert row.ranks == ((2, 2, 2) if "layer" in row.name else ())
        assert row.seconds >= 0
    assert [row.spec for row in report.inputs] == fine.specs
    assert json.loads(report.to_json())["command"]["name"] == "inspect"


def test_writes_nothing(fine):
    before = tree(fine.base.parent)
    detune.inspect(fine.models)
    assert tree(fine.base.parent) == before


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
    assert report.counts == {Status.SHARED: 3, Status.NOT_DETERMINED: 4}
    row = next(row for row in report.tensors if "layer" in row.name)
    assert row.reason.startswith("the difference has rank 4; a third model is needed")
    assert row.ranks == ()


def test_says_what_cannot_be_recovered_and_goes_on(fine):
    """One re-initialised layer is no reason to refuse the rest."""
    weight = normal(seeded(9), 80, 64).float()
    edit(fine.models[0], lambda state: state.update({"layer.2.weight": weight}))
    report = detune.inspect(fine.models)
    row = next(row for row in report.tensors if row.status is Status.NOT_DETERMINED)
    assert row.name == "layer.2.weight"
    assert "full rank" in row.reason
    assert report.counts[Status.FLOOR] == 3


def test_vectors_can_only_be_averaged_and_integers_not_at_all(fine):
    for i, model in enumerate(fine.models):
        edit(
            model, lambda state, i=i: state.update({"norm.weight": torch.full((64,), i / 7), "steps": torch.tensor(i)})
        )
    rows = {row.name: row for row in detune.inspect(fine.models).tensors}
    assert rows["norm.weight"].status is Status.AVERAGED
    assert rows["steps"].status is Status.NOT_DETERMINED


@pytest.mark.parametrize("name", ["layer.1.weight", "norm.weight"])
def test_refuses_nan(fine, name):
    def poison(state):
        state[name] = state[name].clone()
        state[name].reshape(-1)[3] = float("nan")

    edit(fine.models[1], poison)
    with pytest.raises(InputError, match=rf"'{name}' of .*model-1 holds NaN or Inf"):
        detune.inspect(fine.models)


def test_needs_two_models(fine):
    with pytest.raises(InputError, match="1 model given; inspect compares at least two; add models"):
        detune.inspect(fine.models[:1])


def test_tells_what_it_is_at(fine):
    seen = []
    report = detune.inspect(fine.models, on_tensor=lambda name, row: seen.append((name, row)))
    assert seen == [pair for row in report.tensors for pair in ((row.name, None), (row.name, row))]
