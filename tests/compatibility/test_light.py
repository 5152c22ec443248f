"""Changes below a step of half precision: who made them, and what `family` and `inspect` say."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import detune
from detune.certificate.verdict import Verdict
from detune.compatibility.light import changed_in_part, is_light, some_of_each_pattern
from detune.compatibility.model_set import ModelSet
from tests.cases import normal, seeded
from tests.families import edit, save_plain

# A step of bf16 at the base's root mean square, 1 or a little less.
STEP = 2.0**-8


def light_matrices(sizes: Sequence[float], seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Merges of rank 8 whose deltas have these sizes, in steps."""
    generator = seeded(seed)
    W = normal(generator, 96, 128).to(dtype)
    deltas = [normal(generator, 96, 8) @ normal(generator, 8, 128) * (size * STEP / 8**0.5) for size in sizes]
    return [(W.double() + M_i).to(dtype) for M_i in deltas]


def light_family(folder: Path, layers: int = 6) -> list[Path]:
    """Three bf16 models of which the first left every second layer alone; the last is a full fine-tune."""
    generator = seeded(3)
    models: list[dict[str, Tensor]] = [{}, {}, {}]
    for k in range(layers):
        name = f"layer.{k}.weight"
        W = normal(generator, 128, 96).bfloat16()
        for i, state in enumerate(models):
            size = 0.0 if i == 0 and k % 2 else 0.15 * STEP
            change = normal(generator, 128, 96) if i == 2 else normal(generator, 128, 4) @ normal(generator, 4, 96) / 2
            state[name] = (W.double() + size * change).bfloat16()
    norm = normal(generator, 96).bfloat16()
    return [save_plain(folder / str(i), state | {"norm.weight": norm + i * (i == 2)}) for i, state in enumerate(models)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "expected"), [(0.05, True), (0.2, True), (3.0, False)])
def test_models_are_light_that_are_equal_in_many_entries(size, expected, dtype):
    unit = size if dtype is torch.bfloat16 else size / 8
    assert is_light(light_matrices((unit, unit, unit), dtype=dtype)) is expected


def test_one_pair_beyond_a_third_leaves_many_light_and_one_ordinary_model_does_not():
    matrices = light_matrices((0.1, 0.1, 0.1, 0.1, 1.0, 1.0))
    assert not is_light(matrices[4:])
    assert is_light(matrices)
    assert not is_light([*matrices[:4], *light_matrices((3.0,))])


def test_only_half_precision_is_light():
    matrices = light_matrices((0.1, 0.1))
    assert not is_light([matrix.float() for matrix in matrices])
    assert not is_light([matrices[0], matrices[1].half()])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sizes", [(0.1, 0.1, 0.2), (0.0, 0.1, 0.2), (0.2, 0.0, 0.1, 0.1), (0.08, 0.1, 0.1)])
def test_who_changed_a_matrix(sizes, seed):
    assert changed_in_part(light_matrices(sizes, seed)) == tuple(size > 0 for size in sizes)


def test_family_counts_changes_and_ranks_apart(tmp_path):
    found = detune.check_family(light_family(tmp_path))
    assert [sum(row.changed[i] for row in found.tensors) for i in range(3)] == [3, 6, 7]
    assert all(row.light for row in found.tensors if "layer" in row.name)
    # The first, the last and one between.
    assert [row.name for row in found.tensors if row.ranks] == [f"layer.{k}.weight" for k in (0, 2, 5)]
    assert found.models[2].reason.startswith(
        "changed 6 matrices, a low rank shows in 0 of 3 looked at; 1 other tensor;"
    )
    assert found.models[2].reason.endswith("a full fine-tune looks like LoRA")
    assert [model.belongs for model in found.models] == [True] * 3


def test_a_model_that_left_a_matrix_alone_has_rank_0_and_one_whose_rank_does_not_show_none(tmp_path):
    models = light_family(tmp_path)
    found = {row.name: row for row in detune.check_family(models).tensors}
    assert found["layer.5.weight"].ranks[0] == 0
    assert found["layer.5.weight"].ranks[2] is None


def test_equal_bytes_say_who_left_it_alone(tmp_path):
    models = light_family(tmp_path, 2)
    alone = {}
    edit(models[0], lambda state: alone.update(state))
    edit(models[1], lambda state: state.update({"layer.1.weight": alone["layer.1.weight"]}))
    rows = {row.name: row for row in detune.check_family(models).tensors}
    assert rows["layer.1.weight"].changed == (False, False, True)
    assert rows["layer.1.weight"].ranks[:2] == (0, 0)
    assert rows["norm.weight"].changed == (False, False, True)


def test_inspect_does_not_solve_what_is_light(tmp_path):
    report = detune.inspect(light_family(tmp_path))
    rows = [row for row in report.tensors if "layer" in row.name]
    assert {(row.verdict, row.method) for row in rows} == {(Verdict.APPROXIMATE, "none")}
    assert "a full fine-tune cannot be told from LoRA; recover looks for the base's bits" in rows[0].reason
    assert sum(bool(row.ranks) for row in rows) == 3


def test_inspect_reads_nothing_whole_that_is_light(tmp_path, monkeypatch):
    read: list[str] = []
    whole = ModelSet.held
    monkeypatch.setattr(ModelSet, "held", lambda family, name: read.append(name) or whole(family, name))
    detune.inspect(light_family(tmp_path))
    assert read == ["norm.weight"]


def test_inspect_of_two_light_models(tmp_path):
    report = detune.inspect(light_family(tmp_path)[:2])
    rows = [row for row in report.tensors if "layer" in row.name]
    assert {row.verdict for row in rows} == {Verdict.NOT_DETERMINED}
    assert rows[0].reason.endswith("a third model is needed")


def test_some_of_each_pattern():
    shapes = {f"block.{k}.{kind}": (4, size) for k in range(9) for kind, size in (("up", 2), ("down", 3))}
    assert some_of_each_pattern(shapes) == {f"block.{k}.{kind}" for k in (0, 4, 8) for kind in ("up", "down")}
    assert some_of_each_pattern({"a": (1,), "b": (1,)}) == {"a", "b"}
