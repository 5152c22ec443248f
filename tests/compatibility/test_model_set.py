import shutil

import pytest
import torch
from safetensors.torch import save_file

from detune.compatibility.model_set import ModelSet, Why
from detune.compatibility.shared import BLOCK_BYTES, LISTED, SAMPLE_BYTES
from detune.errors import InputError
from tests.cases import normal, seeded
from tests.families import Fine, edit, plain_family, plain_state, same_bits, save_plain


@pytest.fixture
def fine(tmp_path) -> Fine:
    return plain_family(tmp_path)


def test_lists_what_all_models_have(fine):
    with ModelSet(fine.models) as family:
        expected = plain_state()
        assert family.n == 3
        assert set(family.names) == set(expected)
        for name in family.names:
            assert family.shape(name) == tuple(expected[name].shape)
            assert family.dtypes(name) == (expected[name].dtype,) * 3


def test_tells_shared_tensors_from_those_that_differ(fine):
    with ModelSet(fine.models) as family:
        assert {name for name in family.names if family.copied(name) is None} == {f"layer.{i}.weight" for i in range(4)}
        stack = family.held("layer.0.weight").tensors
        assert len(stack) == 3
        assert not any(stack[0].equal(other) for other in stack[1:])


def test_other_dtype_is_no_shared_tensor_and_no_misfit(fine):
    edit(fine.models[1], lambda state: state.update({"norm.weight": state["norm.weight"].double()}))
    with ModelSet(fine.models) as family:
        assert family.copied("norm.weight") is None
        assert family.dtypes("norm.weight") == (torch.float32, torch.float64, torch.float32)


def test_sees_a_difference_in_the_last_byte_of_the_last_block(tmp_path):
    weight = torch.zeros(BLOCK_BYTES + 1000, dtype=torch.uint8)
    other = weight.clone()
    other[-1] = 1
    for name, tensor in (("a", weight), ("b", other)):
        save_file({"weight": tensor}, tmp_path / f"{name}.safetensors")
    with ModelSet([tmp_path / "a.safetensors", tmp_path / "b.safetensors"]) as family:
        assert family.copied("weight") is None


def test_equal_beginnings_are_no_proof_of_a_copy(tmp_path):
    weight = torch.zeros(SAMPLE_BYTES)
    other = weight.clone()
    other[-1] = 1
    paths = [save_plain(tmp_path / name, {"weight": tensor}) for name, tensor in (("a", weight), ("b", other))]
    with ModelSet(paths) as family:
        assert family.n == 2


def test_bits_decide_and_not_values(tmp_path):
    """Zero has two signs, and NaN equals nothing."""
    states = [torch.tensor([value, 1.0, float("nan")]) for value in (0.0, -0.0)]
    paths = [
        save_plain(tmp_path / name, {"x": x, "y": states[0].clone()}) for name, x in zip("ab", states, strict=True)
    ]
    with ModelSet(paths) as family:
        assert family.copied("x") is None
        assert family.copied("y") is Why.SHARED
        assert same_bits(family.held("x").tensors[1], states[1])


def test_refuses_a_model_of_another_architecture(fine):
    def rename(state):
        for i in range(LISTED):
            state[f"new.{i}"] = state.pop(f"layer.{i}.weight")

    edit(fine.models[1], rename)
    pattern = r"model-1 does not fit .*model-0; 3 of 7 tensors are alike, it lacks 'layer\.0\.weight', .*; give"
    with pytest.raises(InputError, match=pattern):
        ModelSet(fine.models)


def test_lists_only_the_first_few_shapes(tmp_path):
    paths = [
        save_plain(tmp_path / f"m{k}", {f"w{i}": torch.full((2, 3 + k), k) for i in range(LISTED + 2)}) for k in (0, 1)
    ]
    with pytest.raises(InputError, match=r"it has 'w0' with shape \[2, 4\] instead of \[2, 3\]") as refused:
        ModelSet(paths)
    assert str(refused.value).count("'w") == LISTED


@pytest.mark.parametrize("how", ["same path", "link", "copy"])
def test_refuses_a_model_given_twice(fine, how):
    again = fine.models[0].with_name("again")
    if how == "link":
        again.symlink_to(fine.models[1], target_is_directory=True)
    elif how == "copy":
        shutil.copytree(fine.models[1], again)
    else:
        again = fine.models[1]
    with pytest.raises(InputError, match=r"(again|model-1) is given twice; .*; give each model once"):
        ModelSet([*fine.models, again])


def test_a_fine_tune_that_changed_nothing_else_is_not_a_copy(fine):
    """The base itself among the models is welcome: its deltas are zero."""
    with ModelSet([*fine.models, fine.base]) as family:
        assert family.n == 4


def test_random_weights_are_not_used_up(fine):
    """Opening reads no weights: a file that shrinks afterwards is noticed, by name."""
    with ModelSet(fine.models) as family:
        file = fine.models[2] / "model.safetensors"
        state = {"x": normal(seeded(), 2)}
        save_file(state, file)
        with pytest.raises(InputError, match=r"model-2.*model\.safetensors is shorter than when it was opened"):
            family.held("layer.3.weight")
