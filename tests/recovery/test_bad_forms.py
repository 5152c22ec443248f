"""Input in a form that cannot be right ends every command in one line: which file, what is wrong, what to do."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.families import Fine, State, edit, plain_family, shard

LAYERS = [f"layer.{i}.weight" for i in range(4)]
FP8 = torch.float8_e4m3fn
COPY_AGAIN = "copy the model again, or convert it to bf16"


@pytest.fixture
def fine(tmp_path: Path) -> Fine:
    return plain_family(tmp_path / "models", 3)


def in_fp8(state: State) -> None:
    for name in LAYERS:
        scale = state[name].abs().amax(dim=1, keepdim=True) / 448
        state |= {name: (state[name] / scale).to(FP8), f"{name}_scale": scale}


def edited(model: Path, change: Callable[[State], object]) -> Path:
    edit(model, in_fp8)
    edit(model, change)
    return model


def without_a_scale(model: Path) -> Path:
    return edited(model, lambda state: state.pop("layer.2.weight_scale"))


def scales_for_other_rows(model: Path) -> Path:
    return edited(model, lambda state: state.update({"layer.2.weight_scale": torch.ones(7, 1)}))


def zero_points_for_other_rows(model: Path) -> Path:
    return edited(model, lambda state: state.update({"layer.2.weight_zero_point": torch.zeros(7, 1)}))


def packed(model: Path) -> Path:
    edit(model, lambda state: state.update({"layer.2.qweight": torch.zeros(10, 64, dtype=torch.int32)}))
    return model


def cut_short(model: Path) -> Path:
    path = model.with_suffix(".gguf")
    writer = gguf.GGUFWriter(path, "other")
    for name, tensor in load_file(model / "model.safetensors").items():
        writer.add_tensor(name, np.ascontiguousarray(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.write_bytes(path.read_bytes()[:-100])
    return path


def two_towers(model: Path) -> Path:
    state = load_file(model / "model.safetensors")
    both = {f"{tower}.{name}": tensor.clone() for tower in ("query", "passage") for name, tensor in state.items()}
    save_file(both, model / "model.safetensors")
    return model


def one_tensor_in_two_shards(model: Path) -> Path:
    second = shard(model)
    first = load_file(model / "model-00001-of-00002.safetensors")
    name = next(iter(first))
    save_file(load_file(second) | {name: first[name] + 1}, second)
    return model


def a_shard_missing(model: Path) -> Path:
    shard(model).unlink()
    return model


def one_tensor_twice(model: Path) -> Path:
    edit(model, lambda state: state.update({"module.norm.weight": state["norm.weight"] + 1}))
    return model


@pytest.mark.parametrize("verb", ["recover", "family", "inspect", "extract", "pack", "audit"])
@pytest.mark.parametrize(
    ("spoil", "happened", "cure"),
    [
        (without_a_scale, "tensor 'layer.2.weight' of {model} has no scale; ", COPY_AGAIN),
        (scales_for_other_rows, "the scales 'layer.2.weight_scale' of {model} do not fit their tensor; ", COPY_AGAIN),
        (zero_points_for_other_rows, "the scales 'layer.2.weight_zero_point' of {model} do not fit ", COPY_AGAIN),
        (packed, "{model} holds weights packed for a kernel; 'layer.2.qweight' is int32", "dequantise them with the "),
        (cut_short, "{model} is damaged, cut short, or no GGUF file; it ends at byte ", "copy the file again"),
        (two_towers, "the tensors of {model} and {other} can be matched in two ways; ", "save them from one class"),
        (one_tensor_twice, "{model} holds a tensor twice; ", "save the model again, without the wrapper"),
        (
            one_tensor_in_two_shards,
            "'embed_tokens.weight' is stored twice; in {model}/model-00001-of",
            "copy the model ",
        ),
        (a_shard_missing, "{model}/model.safetensors.index.json names a missing file; ", "copy or download it too"),
    ],
)
def test_it_is_one_line_with_the_file_and_the_cure(command, fine, tmp_path, verb, spoil, happened, cure):
    models = [spoil(fine.models[0]), *fine.models[1:]]
    out = tmp_path / "out"
    options = ["--out", out] if verb not in ("family", "inspect") else []
    if verb == "extract":
        options += ["--base", fine.base]
    ran = command(verb, *models, *options)
    assert (ran.code, ran.out) == (2, "")
    (line,) = ran.err.splitlines()
    assert happened.format(model=models[0], other=fine.base if verb == "extract" else models[1]) in line
    assert cure in line
    assert not out.exists()


def test_two_models_that_hold_a_tensor_twice_are_told_by_the_first(command, fine, tmp_path):
    for model in fine.models[1:]:
        one_tensor_twice(model)
    ran = command("recover", *fine.models, "--out", tmp_path / "out")
    assert ran.code == 2
    (line,) = ran.err.splitlines()
    assert f"{fine.models[1]} holds a tensor twice; 'module.norm.weight' and 'norm.weight' have different bytes" in line
