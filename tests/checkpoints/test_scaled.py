"""fp8 and int8 with their scales beside them: read as what they mean, with the noise of their grid."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.naive_quantized import FloatQuantizationCompressor, IntQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file
from torch import Tensor

from detune.checkpoints import CheckpointWriter, open_checkpoint
from detune.errors import InputError
from tests.families import same_bits

FP8 = torch.float8_e4m3fn


@pytest.fixture
def weight() -> Tensor:
    return 0.02 * torch.randn(256, 160, generator=torch.Generator().manual_seed(0))


def save(path: Path, state: dict[str, Tensor]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def compressed(weight: Tensor, **args: Any) -> tuple[dict[str, Tensor], Tensor]:
    """What compressed-tensors stores of a weight, and what it reads it as."""
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    top = 448.0 if args["type"] == "float" else 127.0
    match args["strategy"]:
        case "tensor":
            largest = weight.abs().amax().reshape(1)
        case "channel":
            largest = weight.abs().amax(dim=1, keepdim=True)
        case "group":
            largest = weight.view(len(weight), -1, args["group_size"]).abs().amax(dim=2)
        case "block":
            padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 128, 0, -weight.shape[0] % 128))
            largest = padded.view(padded.shape[0] // 128, 128, padded.shape[1] // 128, 128).abs().amax(dim=(1, 3))
    compressor = FloatQuantizationCompressor if args["type"] == "float" else IntQuantizationCompressor
    stored = compressor.compress({"weight": weight, "weight_scale": largest / top}, scheme)
    return stored, compressor.decompress(dict(stored), scheme)["weight"]


@pytest.mark.parametrize(
    "args",
    [
        {"num_bits": 8, "type": "float", "strategy": "tensor"},
        {"num_bits": 8, "type": "float", "strategy": "channel"},
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
        {"num_bits": 8, "type": "int", "strategy": "channel"},
        {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 32},
    ],
)
def test_what_compressed_tensors_stores_is_read_as_it_reads_it(tmp_path, weight, args):
    stored, expected = compressed(weight, **args)
    path = save(tmp_path / "model.safetensors", {f"layer.{name}": tensor for name, tensor in stored.items()})
    with open_checkpoint(path) as model:
        assert list(model.tensors) == ["layer.weight"]
        assert model.tensors["layer.weight"].dtype is torch.float32
        torch.testing.assert_close(model.read("layer.weight"), expected.float(), rtol=1e-6, atol=0)
        rows = model.read_rows("layer.weight", [slice(3, 7), slice(200, 201)])
        assert torch.equal(rows, torch.cat([expected[3:7], expected[200:201]]).float())
        noise = model.noise("layer.weight")
        assert noise == pytest.approx(float((expected - weight).square().mean().sqrt()), rel=0.1)


@pytest.mark.parametrize("scale", ["scale_weight", "weight_scale_inv", "weight_scale"])
def test_scales_have_several_names(tmp_path, weight, scale):
    state = {
        "a.weight": (weight / 0.001).to(FP8),
        f"a.{scale}": torch.tensor(0.001),
        "a.scale_input": torch.tensor(2.0),
        "norm.weight": torch.ones(4).bfloat16(),
        "scaled_fp8": torch.empty(0, dtype=FP8),
    }
    with open_checkpoint(save(tmp_path / "model.safetensors", state)) as model:
        assert set(model.tensors) == {"a.weight", "norm.weight"}
        assert torch.equal(model.read("a.weight"), state["a.weight"].float() * 0.001)
        assert model.noise("norm.weight") is None
        assert model.tensors["a.weight"].quantised == "float8_e4m3fn, one scale"


def test_bitsandbytes_8_bits_are_levels_of_a_row(tmp_path, weight):
    largest = weight.abs().amax(dim=1)
    codes = (weight / largest[:, None] * 127).round().to(torch.int8)
    state = {"a.weight": codes, "a.SCB": largest, "a.weight_format": torch.tensor(0, dtype=torch.uint8)}
    with open_checkpoint(save(tmp_path / "model.safetensors", state)) as model:
        assert list(model.tensors) == ["a.weight"]
        torch.testing.assert_close(model.read("a.weight"), codes * largest[:, None] / 127)
        error = float((model.read("a.weight") - weight).square().mean().sqrt())
        assert model.noise("a.weight") == pytest.approx(error, rel=0.1)


def test_a_stack_of_experts_has_scales_for_each(tmp_path):
    codes = torch.randn(3, 256, 128, generator=torch.Generator().manual_seed(1)).to(FP8)
    scale = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]], [[5.0], [6.0]]])
    state = {"experts.weight": codes, "experts.weight_scale_inv": scale}
    with open_checkpoint(save(tmp_path / "model.safetensors", state)) as model:
        expected = codes.float() * scale.repeat_interleave(128, 1)
        assert torch.equal(model.read("experts.weight"), expected)
        assert torch.equal(model.read_rows("experts.weight", [slice(1, 2)]), expected[1:2])


def test_numbers_without_any_scale_are_themselves(tmp_path, weight):
    path = save(tmp_path / "model.safetensors", {"a.weight": weight.to(FP8)})
    with open_checkpoint(path) as model:
        assert torch.equal(model.read("a.weight"), weight.to(FP8).float())
        error = float((weight.to(FP8).float() - weight).square().mean().sqrt())
        assert model.noise("a.weight") == pytest.approx(error, rel=0.1)


def test_the_output_is_bf16_and_has_no_scales(tmp_path, weight):
    stored, expected = compressed(weight, num_bits=8, type="float", strategy="channel")
    path = save(tmp_path / "model.safetensors", {f"a.{name}": tensor for name, tensor in stored.items()})
    with open_checkpoint(path) as model, CheckpointWriter(model, tmp_path / "out") as writer:
        writer.copy("a.weight")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert set(written) == {"a.weight"}
    assert torch.equal(written["a.weight"], expected.bfloat16())


def test_the_output_is_not_configured_as_quantised(tmp_path, weight):
    """A loader would look for scales that are not there."""
    model_dir = tmp_path / "model"
    model_dir.mkdir()
    save(model_dir / "model.safetensors", {"a.weight": weight.to(FP8), "a.weight_scale": torch.tensor(1.0)})
    config = {"model_type": "llama", "quantization_config": {"quant_method": "compressed-tensors"}}
    (model_dir / "config.json").write_text(json.dumps(config))
    (model_dir / "quantization_config.json").write_text("{}")
    with open_checkpoint(model_dir) as model, CheckpointWriter(model, tmp_path / "out") as writer:
        writer.copy("a.weight")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model_type": "llama"}
    assert not (tmp_path / "out" / "quantization_config.json").exists()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a.qweight": torch.zeros(8, 4, dtype=torch.int32)}, r"packed for a kernel; 'a\.qweight' is int32 of shape"),
        ({"a.weight_packed": torch.zeros(8, 4, dtype=torch.int32)}, r"packed for a kernel; 'a\.weight_packed' is"),
        ({"a.weight": torch.zeros(8, 1, dtype=torch.uint8), "a.weight.absmax": torch.ones(1)}, "packed for a kernel"),
        ({"a.weight": torch.zeros(8, 4, dtype=torch.int8)}, "has no scale; it is stored as int8, and a.weight_scale"),
    ],
)
def test_numbers_that_are_no_weights_are_refused(tmp_path, state, message):
    with pytest.raises(InputError, match=message):
        open_checkpoint(save(tmp_path / "model.safetensors", state))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.update({"a.weight_scale_inv": torch.ones(1)}), r"'a\.weight' of .* has two scales"),
        (lambda state: state.pop("a.weight_scale"), r"tensor 'a\.weight' of .* has no scale; it is stored as float8"),
        (
            lambda state: state.update({"a.weight_scale": torch.ones(3, 1)}),
            r"'a\.weight_scale' of .* do not fit .*; they are float32 of shape \[3, 1\], the tensor has \[256, 160\]",
        ),
        (lambda state: state.update({"a.weight_scale": torch.ones(2, 2, 2)}), "do not fit their tensor"),
        # Of the columns, or of two rows each: nothing says which.
        (lambda state: state.update({"a.weight_scale": torch.ones(128)}), "do not fit their tensor"),
        (lambda state: state.update({"a.weight_scale": torch.ones(1, dtype=torch.complex64)}), "they are complex64"),
        (lambda state: state.update({"b.weight_zero_point": torch.ones(1, dtype=torch.bool)}), "they are bool"),
    ],
)
def test_scales_that_are_missing_or_do_not_fit_are_refused(tmp_path, weight, change, message):
    state = {f"{name}.weight": weight.to(FP8) for name in "ab"}
    state |= {f"{name}.weight_scale": torch.tensor(1.0) for name in "ab"}
    change(state)
    with pytest.raises(InputError, match=message):
        open_checkpoint(save(tmp_path / "model.safetensors", state))


@pytest.mark.parametrize(
    "value", [torch.ones(4, 4, dtype=torch.complex64), torch.ones(4, 4, dtype=torch.bool), torch.tensor(2.0).to(FP8)]
)
def test_what_is_no_matrix_of_small_numbers_is_read_as_it_is_stored(tmp_path, weight, value):
    state = {"a.weight": weight.to(FP8), "a.weight_scale": torch.tensor(2.0)}
    state |= {"b.weight": value, "b.weight_scale": torch.tensor(2.0)}
    with open_checkpoint(save(tmp_path / "model.safetensors", state)) as model:
        assert same_bits(model.read("b.weight"), value)
        assert torch.equal(model.read("b.weight_scale"), state["b.weight_scale"])
