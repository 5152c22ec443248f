"""Which models take part in which tensor, under which name and as which matrices."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from detune.checkpoints import Part, View, open_checkpoint
from detune.compatibility.common_tensors import find_common_tensors
from detune.compatibility.model_set import Models, ModelSet, Why
from detune.errors import InputError
from tests.cases import normal, seeded
from tests.families import Fine, State, edit, plain_family, save_plain

EMBED, HEAD = "embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def fine(tmp_path: Path) -> Fine:
    return plain_family(tmp_path / "models", 4)


def rows_more(state: State, count: int) -> None:
    state[EMBED] = torch.cat([state[EMBED], normal(seeded(count), count, 16).float()])


def renamed(state: State, prefix: str) -> None:
    for name in list(state):
        state[prefix + name] = state.pop(name)


def test_models_that_fit_are_no_views(fine):
    with Models(fine.models) as given:
        assert not any(isinstance(model, View) for model in given.models)
        assert given.layout is given.models[0]
        assert all(given.common.notes(i) == () for i in range(4))


@pytest.mark.parametrize("place", [0, 2])
def test_rows_that_one_model_has_more_are_left_out(fine, place):
    edit(fine.models[place], lambda state: rows_more(state, 2))
    with ModelSet(fine.models) as family:
        assert family.shape(EMBED) == (50, 16)
        assert family.holders(EMBED) == (0, 1, 2, 3)
        assert family.copied(EMBED) is Why.SHARED
        assert family.layout is not family.models[place]
        assert family.common.notes(place) == (
            f"'{EMBED}' has 52 rows in it: those that models share are solved by themselves",
        )


def test_of_several_vocabularies_the_smallest_counts(fine):
    for i, count in enumerate((8, 2, 1, 2)):
        edit(fine.models[i], lambda state, count=count: rows_more(state, count))
    with ModelSet(fine.models) as family:
        assert family.layout.spec == str(fine.models[2])
        assert {name: family.shape(name) for name in family.names if EMBED in name} == {
            f"{EMBED}[0:50]": (50, 16),
            f"{EMBED}[50:51]": (1, 16),
        }


def test_rows_that_every_model_has_added_are_no_rows_of_the_base(fine):
    for i, model in enumerate(fine.models):
        edit(model, lambda state, i=i: state.update({EMBED: torch.cat([state[EMBED], torch.full((3, 16), float(i))])}))
    with ModelSet(fine.models) as family:
        copied = {name: family.copied(name) for name in family.names if EMBED in name}
        assert copied == {f"{EMBED}[0:50]": Why.SHARED, f"{EMBED}[50:53]": None}


def test_rows_that_were_trained_are_no_added_ones(fine):
    for i, model in enumerate(fine.models):
        edit(model, lambda state, i=i: state.update({EMBED: state[EMBED] + i}))
    with ModelSet(fine.models) as family:
        assert family.shape(EMBED) == (50, 16)


def test_what_most_have_is_the_vocabulary_and_is_cut(fine):
    for i in (0, 1, 3):
        edit(fine.models[i], lambda state: rows_more(state, 2))
    with ModelSet(fine.models) as family:
        names = [name for name in family.names if EMBED in name]
        assert names == [f"{EMBED}[0:50]", f"{EMBED}[50:52]"]
        assert [family.holders(name) for name in names] == [(0, 1, 2, 3), (0, 1, 3)]
        assert [family.copied(name) for name in names] == [Why.SHARED, Why.SHARED]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model."])
def test_the_names_are_those_that_most_have(fine, prefix):
    edit(fine.models[0], lambda state: renamed(state, prefix))
    with ModelSet(fine.models) as family:
        assert family.layout.spec == str(fine.models[1])
        assert all(family.holders(name) == (0, 1, 2, 3) for name in family.names)
        (note,) = family.common.notes(0)
        assert note.startswith("7 of its tensors have other names")


def test_of_names_that_one_model_has_each_those_without_a_prefix_count(fine):
    for model, prefix in zip(fine.models[:2], ("module.", "base_model.model."), strict=True):
        edit(model, lambda state, prefix=prefix: renamed(state, prefix))
    with Models(fine.models[:3]) as given:
        assert given.layout.spec == str(fine.models[2])


def test_a_model_can_be_named_whose_layout_counts(fine, tmp_path):
    edit(fine.models[2], lambda state: renamed(state, "module."))
    with ModelSet(fine.models, like=fine.models[2]) as family:
        assert all(name.startswith("module.") for name in family.names)
    edit(fine.base, lambda state: state.update({"more": torch.ones(3)}))
    with ModelSet(fine.models, like=fine.base) as family:
        assert family.n == 4
        assert family.layout.spec == str(fine.base)
        assert family.copied("more") is Why.NOBODY
        original = family.original(EMBED)
        assert original is family.models[0]


def test_tensors_that_few_have(fine):
    edit(fine.models[1], lambda state: state.update({"more": torch.ones(3)}))
    edit(fine.models[2], lambda state: state.pop("norm.weight"))
    with ModelSet(fine.models) as family:
        assert "more" not in set(family.names)
        assert family.holders("norm.weight") == (0, 1, 3)
        assert family.common.notes(1) == ("it has in addition 'more', which the output has not",)
        assert family.common.notes(2) == ("it lacks 'norm.weight'",)
    with ModelSet(fine.models, like=fine.models[1]) as family:
        assert family.copied("more") is Why.ALONE
        assert family.original("more") is None


def test_a_tied_head_stands_for_its_embedding(fine):
    for i in (0, 1, 3):
        edit(fine.models[i], lambda state: state.update({HEAD: state[EMBED].clone()}))
    with ModelSet(fine.models) as family:
        assert family.holders(HEAD) == (0, 1, 2, 3)
        assert torch.equal(family.models[2].read(HEAD), family.models[2].read(EMBED))
    edit(fine.models[1], lambda state: state.update({HEAD: state[HEAD] + 1}))
    with ModelSet(fine.models) as family:
        assert family.holders(HEAD) == (0, 1, 3)


def test_a_transposed_matrix_is_turned(fine):
    name = "layer.1.weight"
    edit(fine.models[3], lambda state: state.update({name: state[name].mT.contiguous()}))
    with ModelSet(fine.models) as family, open_checkpoint(fine.models[3]) as model:
        assert torch.equal(family.models[3].read(name), model.read(name).mT)


def test_a_stack_of_experts_is_its_matrices(fine):
    name = "mlp.experts.down_proj"
    for i, model in enumerate(fine.models):
        stack = normal(seeded(i), 3, 8, 6).float()
        edit(model, lambda state, stack=stack: state.update({name: stack}))
    turned = fine.models[2]
    edit(turned, lambda state: state.update({name: state[name].mT.contiguous()}))
    with ModelSet(fine.models) as family:
        names = [part for part in family.names if name in part]
        assert names == [f"{name}[{k}]" for k in range(3)]
        assert family.parts[names[1]] == Part(name, 1, 2, alone=True)
        for i, (model, held) in enumerate(zip(fine.models, family.held(names[1]).tensors, strict=True)):
            assert model == turned or torch.equal(held, normal(seeded(i), 3, 8, 6).float()[1])
        assert torch.equal(family.held(names[1]).tensors[2], normal(seeded(2), 3, 8, 6).float()[1])


def test_a_kernel_is_no_stack(fine):
    for model in fine.models:
        edit(model, lambda state: state.update({"conv.weight": torch.ones(3, 8, 6)}))
    with ModelSet(fine.models) as family:
        assert family.shape("conv.weight") == (3, 8, 6)


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda s: s.update({"norm.weight": s["norm.weight"].int()}), "stored as int32 instead of float32"),
        (lambda s: s.update({"norm.weight": s["norm.weight"][:3]}), "shape [3] instead of [64]"),
    ],
)
def test_a_tensor_of_another_kind_takes_no_part(fine, change, note):
    edit(fine.models[1], change)
    with ModelSet(fine.models) as family:
        assert family.holders("norm.weight") == (0, 2, 3)
        assert family.common.notes(1) == (f"'norm.weight' takes no part: {note}",)


def test_names_that_align_in_two_ways_are_refused(fine):
    def twice(state: State) -> None:
        renamed(state, "a.")
        state.update({f"b.{name.removeprefix('a.')}": tensor.clone() for name, tensor in state.items()})

    edit(fine.models[2], twice)
    says = r"model-2 and .*model-0 can be matched in two ways; '.*' may be 'a\..*' or 'b\..*'; save them from one class"
    with pytest.raises(InputError, match=says):
        Models(fine.models)


@pytest.mark.parametrize("same", [True, False])
def test_a_tensor_held_twice_must_have_the_same_bytes(fine, same):
    def twice(state: State) -> None:
        state["module.norm.weight"] = state["norm.weight"].clone() + (not same)

    edit(fine.models[1], twice)
    if same:
        with ModelSet(fine.models) as family:
            assert family.n == 4
        return
    with pytest.raises(InputError, match=r"model-1 holds a tensor twice; 'module\.norm\.weight' and 'norm\.weight'"):
        Models(fine.models)


def test_a_copy_under_another_prefix_is_a_copy(fine, tmp_path):
    with open_checkpoint(fine.models[1]) as model:
        state = {f"module.{name}": model.read(name) for name in model.tensors}
    again = save_plain(tmp_path / "again", state)
    with pytest.raises(InputError, match=r"(again|model-1) is given twice"):
        Models([*fine.models, again])


@pytest.mark.parametrize("change", [lambda state: rows_more(state, 2), lambda state: renamed(state, "module.")])
def test_excerpts_are_of_what_is_shown(fine, change: Callable[[State], None]):
    edit(fine.models[1], change)
    with Models(fine.models, rows=64) as given:
        shapes = {tuple(model.read("layer.0.weight").shape) for model in given.models}
        assert shapes == {(64, 64)}
        before = given.reading.read_bytes
        with ModelSet(given.models) as family:
            family.held("layer.1.weight")
        assert given.reading.read_bytes == before + 4 * 64 * 64 * 4


def test_an_alignment_is_the_same_however_often_it_is_made(fine):
    edit(fine.models[1], lambda state: rows_more(state, 2))
    with Models(fine.models) as given:
        again = find_common_tensors(given.models)
        assert again.shown(given.models) == given.models
        assert again.pieces == given.common.pieces
