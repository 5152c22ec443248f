import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from detune.compatibility.groups import BaseGroups, group_by_base, select, tells
from detune.compatibility.model_set import Models
from detune.errors import InputError
from tests.cases import normal, seeded
from tests.families import Fine, State, add, delta, edit, plain_family, plain_state, save_plain

LAYERS = [f"layer.{i}.weight" for i in range(4)]


@pytest.fixture
def fine(tmp_path: Path) -> Fine:
    return plain_family(tmp_path / "models", 4)


def spoil(model: Path, change: Callable[[torch.Tensor], torch.Tensor], names: list[str] = LAYERS) -> None:
    edit(model, lambda state: state.update({name: change(state[name]) for name in names}))


def anew(seed: int) -> Callable[[torch.Tensor], torch.Tensor]:
    generator = seeded(seed)
    return lambda weight: normal(generator, *weight.shape).to(weight.dtype)


def fully(weight: torch.Tensor) -> torch.Tensor:
    return add(weight, 0.02 * normal(seeded(4), *weight.shape))


def reordered(weight: torch.Tensor) -> torch.Tensor:
    return weight[torch.randperm(weight.shape[0], generator=seeded(6))].contiguous()


def selected(models: list[Path], need: int = 3):
    with Models(models) as given:
        return select(given, need)


def test_a_family_is_all_members(fine):
    assert selected(list(fine.models)).members == (0, 1, 2, 3)
    assert selected(list(fine.models)).left_out == ()


def test_the_base_itself_is_welcome(fine):
    assert selected([*fine.models, fine.base]).members == (0, 1, 2, 3, 4)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (anew(1), r"4 of 4 matrices, first 'layer\.0\.weight'; it has another base: its weights differ by 1\.\d"),
        (fully, r"full rank in 4 of 4 .*; it or its base was fine-tuned in full, .*cosine 0\.9"),
        (reordered, "same base with its neurons or heads in another order"),
    ],
    ids=["another base", "full fine-tune", "permuted"],
)
@pytest.mark.parametrize("place", [0, 2])
def test_a_stranger_is_left_out_with_the_reason(fine, change, why, place):
    spoil(fine.models[place], change)
    selection = selected(list(fine.models))
    assert selection.members == tuple(i for i in range(4) if i != place)
    (row,) = selection.left_out
    assert row.model == place
    with pytest.raises(InputError, match=why):
        raise InputError(row.reason)


def test_too_few_that_fit_is_refused_as_a_misfit(fine):
    spoil(fine.models[1], lambda weight: weight[:-1].contiguous(), LAYERS)
    assert selected(list(fine.models)).members == (0, 2, 3)
    says = r"model-1 does not fit .*model-0; 3 of 7 tensors are alike, it has 'layer\.0\.weight' with shape \[79, 64\]"
    with pytest.raises(InputError, match=says):
        selected(list(fine.models[:3]))


def test_one_new_layer_makes_no_stranger(fine):
    spoil(fine.models[1], anew(1), LAYERS[:2])
    assert selected(list(fine.models)).members == (0, 1, 2, 3)
    spoil(fine.models[1], anew(1), LAYERS[:3])
    assert selected(list(fine.models)).members == (0, 2, 3)


def test_small_matrices_and_vectors_tell_nothing(tmp_path):
    shapes = {"vector": (64,), "low": (63, 500), "kernel": (500, 7, 3, 3), "matrix": (64, 16, 2, 2)}
    with Models([save_plain(tmp_path / "m", {name: torch.ones(shape) for name, shape in shapes.items()})]) as given:
        assert [name for name in shapes if tells(given.models[0], name)] == ["matrix"]


def test_nothing_to_tell_by_is_no_reason_to_refuse(tmp_path):
    models = [save_plain(tmp_path / str(i), {"w": normal(seeded(i), 20, 20)}) for i in range(3)]
    assert selected(models).members == (0, 1, 2)


def test_one_stranger_too_many_is_named(fine):
    spoil(fine.models[0], anew(1))
    says = r"model-0 differs from the other models at full rank; in 4 of 4 matrices, first 'layer\.0.*at least 3"
    with pytest.raises(InputError, match=says):
        selected(list(fine.models[:3]))


def test_two_models_cannot_tell_which_is_strange(fine):
    spoil(fine.models[0], anew(1))
    with pytest.raises(InputError, match=r"model-0 and .*model-1 differ at full rank; .*fewer than 2"):
        selected(list(fine.models[:2]), need=2)


def test_a_tie_is_not_ours_to_settle(tmp_path):
    first, second = plain_family(tmp_path / "a", 3), plain_family(tmp_path / "b", 3)
    generator = seeded(3)
    other = {name: normal(generator, *weight.shape).float() for name, weight in plain_state().items() if "lay" in name}
    for model in second.models:
        spoil_with(model, other)
    says = (
        r"2 sources, with 3 models each; they are \{.*a/model-0, .*\} and \{.*b/model-0, .*\}; give the models of one"
    )
    with pytest.raises(InputError, match=says):
        selected([*first.models, *second.models])
    shutil.rmtree(second.models[2])
    selection = selected([*second.models[:2], *first.models])
    assert selection.members == (2, 3, 4)
    assert [row.model for row in selection.left_out] == [0, 1]


def spoil_with(model: Path, other: State) -> None:
    """Another base under the same LoRA."""
    base = plain_state()
    edit(model, lambda state: state.update({name: state[name] - base[name] + other[name] for name in other}))


def test_names_the_damaged_model(fine):
    spoil(fine.models[3], lambda weight: weight.fill_(float("nan")), LAYERS[1:2])
    with pytest.raises(InputError, match=r"'layer\.1\.weight' of .*model-3 holds NaN or Inf"):
        selected(list(fine.models))


def test_looks_at_all_matrices_only_where_some_do_not_agree(tmp_path):
    generator = seeded(1)
    base = {f"w{i:02}": normal(generator, 64, 64) for i in range(30)}
    states = [{name: add(weight, delta(generator, weight, 2)) for name, weight in base.items()} for _ in range(3)]
    models = [save_plain(tmp_path / str(i), state) for i, state in enumerate(states)]
    with Models(models) as given:
        assert len(group_by_base(given.models).splits) == 12
    edit(models[0], lambda state: state.update({"w00": normal(generator, 64, 64)}))
    with Models(models) as given:
        assert group_by_base(given.models) == BaseGroups(
            ((0, 1, 2),), {name: ((1, 2), (0,)) if name == "w00" else ((0, 1, 2),) for name in base}
        )
