import json
import re
from pathlib import Path

import pytest
import torch

import detune
from benchmarks.random_sets import Role, random_set
from detune.errors import InputError
from detune.metrics.w_error import w_error
from tests.cases import normal, seeded
from tests.families import Fine, add, delta, edit, plain_family, plain_state, save_plain, tree

HEAD = "layer.3.weight"


@pytest.fixture
def fine(tmp_path: Path) -> Fine:
    return plain_family(tmp_path / "models", 4)


def new_head(model: Path, seed: int = 9) -> None:
    edit(model, lambda state: state.update({HEAD: normal(seeded(seed), 80, 64).float()}))


def another_base(model: Path) -> None:
    generator = seeded(5)
    edit(
        model,
        lambda state: state.update(
            {name: normal(generator, *state[name].shape).float() for name in state if "layer" in name}
        ),
    )


def test_one_family(fine):
    found = detune.check_family(fine.models)
    assert [model.spec for model in found.members] == fine.specs
    assert [(row.ranks, row.enough) for row in found.tensors] == [((2, 2, 2, 2), True)] * 4
    assert (found.shared, found.looked_at, found.suffices) == (3, 4, True)
    assert found.verdict == "4 of 4 models share a source: all 4 changed matrices can be recovered"
    assert json.loads(found.to_json())["models"][0]["belongs"] is True


def test_mixed_ranks_and_models_that_left_a_tensor_alone(tmp_path):
    base, generator = plain_state(), seeded(4)
    targets = {0: (1, 5, 3, 2), 1: (4, 0, 8, 4)}
    models = []
    for i in range(4):
        changed = {f"layer.{k}.weight": r[i] for k, r in targets.items()}
        state = {name: add(base[name], delta(generator, base[name], r)) for name, r in changed.items() if r}
        models.append(save_plain(tmp_path / str(i), base | state))
    found = detune.check_family(models)
    assert [row.ranks for row in found.tensors] == list(targets.values())
    assert found.models[1].reason == "changed 1 matrix at low rank"


def test_a_new_head_is_named_and_its_model_belongs(fine):
    new_head(fine.models[1])
    found = detune.check_family(fine.models)
    assert len(found.members) == 4
    (foreign,) = found.models[1].foreign
    assert (foreign.model, foreign.name) == (1, HEAD)
    assert foreign.cause.startswith("re-initialised")
    row = next(row for row in found.tensors if row.name == HEAD)
    assert row.ranks == (2, None, 2, 2)
    assert row.enough


def test_heads_that_all_differ_cannot_be_recovered(fine):
    for i, model in enumerate(fine.models):
        new_head(model, 20 + i)
    found = detune.check_family(fine.models)
    assert len(found.members) == 4
    assert not found.suffices
    assert found.verdict.endswith(f"3 of 4 changed matrices can be recovered, not '{HEAD}'")
    assert all(model.foreign[0].cause == "every model has its own" for model in found.models)


def test_a_resized_vocabulary_belongs_with_the_rest(fine):
    name = "embed_tokens.weight"
    edit(fine.models[0], lambda state: state.update({name: torch.cat([state[name], torch.ones(14, 16)])}))
    kinship = detune.check_family(fine.models)
    assert len(kinship.members) == 4
    (foreign,) = kinship.models[0].foreign
    assert foreign.cause == "64 rows: those that models share count"
    assert kinship.tensors[0].ranks == (2, 2, 2, 2)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda s: s.update({HEAD: s[HEAD][:70]}), r"shape \[70, 64\] instead of \[80, 64\]"),
        (lambda s: s.update({HEAD: s[HEAD].int()}), "stored as int32 instead of float32"),
        (lambda s: s.pop(HEAD), "missing"),
        (lambda s: s.update({"more": torch.ones(3)}), "additional"),
    ],
    ids=["shape", "quantised", "missing", "additional"],
)
def test_misfits_are_told_and_the_rest_is_compared(fine, change, cause):
    edit(fine.models[2], change)
    found = detune.check_family(fine.models)
    assert len(found.members) == 4
    (foreign,) = found.models[2].foreign
    assert re.match(cause, foreign.cause)


def test_a_transposed_tensor_is_read_as_the_others_have_it(fine):
    edit(fine.models[2], lambda state: state.update({HEAD: state[HEAD].mT.contiguous()}))
    kinship = detune.check_family(fine.models)
    assert kinship.models[2].foreign == ()
    assert next(row for row in kinship.tensors if row.name == HEAD).ranks == (2, 2, 2, 2)


def test_a_stranger_is_not_counted(fine):
    another_base(fine.models[0])
    found = detune.check_family(fine.models)
    assert [(model.group, model.belongs) for model in found.models] == [(1, False)] + [(0, True)] * 3
    assert "it has another base" in found.models[0].reason
    assert found.suffices
    assert found.verdict.startswith("3 of 4 models share a source")


def test_another_architecture_cannot_be_compared(fine, tmp_path):
    other = save_plain(tmp_path / "other", {f"block.{i}": torch.ones(3) for i in range(6)})
    kinship = detune.check_family([*fine.models, other])
    assert kinship.models[4].group is None
    assert re.search(r"^another architecture: .*; 0 of 7 tensors are alike, it lacks '", kinship.models[4].reason)


def test_two_sources_of_equal_size_are_both_listed(fine):
    for model in fine.models[2:]:
        another_base(model)
        edit(model, lambda state, model=model: state.update({"norm.weight": state["norm.weight"] + len(str(model))}))
    edit(fine.models[3], lambda state: state.update({"norm.weight": state["norm.weight"] + 1}))
    found = detune.check_family(fine.models)
    assert not found.members
    assert re.search(r"2 sources with 2 models each: \{.*model-0, .*model-1\} and \{.*2, .*3\}", found.verdict)


def test_a_stranger_with_its_rows_in_another_order_is_known_from_some_rows(tmp_path):
    """What tells is which row became which, so a few of its matrices are read whole."""
    generator = seeded(31)
    base = {f"layer.{i}.weight": normal(generator, 320, 96).float() for i in range(2)}
    models = []
    for i in range(4):
        changed = {name: add(base[name], delta(generator, base[name], 2)) for name in base}
        models.append(save_plain(tmp_path / str(i), changed))
    order = torch.randperm(320, generator=generator)
    edit(models[3], lambda state: state.update({name: state[name][order].contiguous() for name in base}))
    found = detune.check_family(models, rows=128)
    assert [model.belongs for model in found.models] == [True, True, True, False]
    assert "same base with its neurons or heads in another order" in found.models[3].reason
    assert [tensor.ranks for tensor in found.tensors] == [(2, 2, 2)] * 2
    assert found.reading.rows == 128
    # Both matrices of the stranger and of a member, and the part of each model.
    assert found.reading.read_bytes == (4 * 2 * 128 + 2 * 2 * 320) * 96 * 4
    assert found.reading.total_bytes == 4 * 2 * 320 * 96 * 4


def test_two_of_three_are_not_enough(fine):
    another_base(fine.models[1])
    found = detune.check_family(fine.models[:3])
    assert found.verdict == "2 of 3 models share a source: recovery needs 3"
    assert found.tensors[0].reason.startswith("the difference of two models has rank 4; a third")


def test_vectors_and_integers(fine):
    for i, model in enumerate(fine.models):
        edit(model, lambda s, i=i: s.update({"norm.weight": torch.full((64,), i / 7), "steps": torch.tensor(i)}))
    found = detune.check_family(fine.models)
    rows = {row.name: row for row in found.tensors}
    assert rows["steps"].reason == "not floating point"
    assert not rows["norm.weight"].enough
    assert found.suffices
    assert found.verdict.endswith("; 2 that are no matrices can be averaged or copied")


def test_ranks_beyond_the_conditions(tmp_path):
    generator = seeded(6)
    base = normal(generator, 64, 64)
    models = [save_plain(tmp_path / str(i), {"w": add(base, delta(generator, base, 26))}) for i in range(3)]
    found = detune.check_family(models)
    assert found.tensors[0].ranks == (26, 26, 26)
    assert not found.suffices
    assert "too high for a 64x64 matrix" in found.tensors[0].reason


def test_ranks_of_models_that_have_a_part_in_common(tmp_path):
    """Three fine-tunes of a fine-tune, and two of its base: ranks are lowest from the first, which `recover` finds."""
    generator = seeded(3)
    base = normal(generator, 96, 80).float()
    between = add(base, delta(generator, base, 8))
    weights = [add(between, delta(generator, base, 4)) for _ in range(3)]
    weights += [add(base, delta(generator, base, 3)) for _ in range(2)]
    models = [save_plain(tmp_path / str(i), {"w": weight}) for i, weight in enumerate(weights)]
    check = detune.check_family(models)
    assert check.tensors[0].ranks == detune.inspect(models).tensors[0].ranks == (4, 4, 4, 11, 11)
    assert w_error(detune.recover_matrix(weights).weight, between) < -12
    assert [model.reason for model in check.models] == ["changed 1 matrix at low rank"] * 5


def test_ranks_of_a_copy_at_another_strength(tmp_path):
    generator = seeded(4)
    base = normal(generator, 96, 80).float()
    deltas = [delta(generator, base, rank) for rank in (8, 4, 6)]
    models = [save_plain(tmp_path / str(i), {"w": add(base, M_i)}) for i, M_i in enumerate([*deltas, deltas[1] * 0.5])]
    assert detune.check_family(models).tensors[0].ranks == (8, 4, 6, 4)


def test_writes_nothing_and_tells_what_it_is_at(fine):
    before, seen = tree(fine.base.parent), []
    check = detune.check_family(fine.models, on_tensor=lambda name, rows: seen.append((name, rows)))
    assert tree(fine.base.parent) == before
    begun = [name for name, rows in seen if rows is None]
    assert begun == [name for name, rows in seen if rows is not None]
    assert sorted(begun) == sorted(plain_state())
    assert [row for _, rows in seen for row in rows or ()] == list(check.tensors)


def test_needs_two_models(fine):
    with pytest.raises(InputError, match="1 model given; a family has at least two; add models"):
        detune.check_family(fine.models[:1])


@pytest.mark.parametrize("seed", range(20))
def test_random_sets(tmp_path, seed):
    """A tenth of what benchmarks/family.py runs."""
    dtypes = ((torch.bfloat16,), (torch.float32,), (torch.bfloat16, torch.float32))[seed % 3]
    drawn = random_set(tmp_path, seed, dtypes, least_full=0.006 if torch.bfloat16 in dtypes else 0.001)
    found = detune.check_family(drawn.models)
    assert [model.belongs for model in found.models] == [role.belongs for role in drawn.roles]
    heads = [[drawn.head] if role is Role.HEAD else [] for role in drawn.roles]
    assert [[tensor.name for tensor in model.foreign] for model in found.models] == heads
