"""GGUF files, written by llama.cpp's own package: read lazily, dequantised, under transformers' names."""

import json
from pathlib import Path
from struct import pack

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from detune.checkpoints import CheckpointWriter, gguf_header, open_checkpoint
from detune.errors import InputError

HEADS, KEYS, HIDDEN, BLOCKS = 4, 2, 64, 2


def write(
    path: Path, tensors: dict[str, tuple[np.ndarray, Kind]], architecture: str = "other", **settings: int
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in settings.items():
        getattr(writer, f"add_{key}")(value)
    for name, (values, kind) in tensors.items():
        packed = values if values.dtype == np.uint8 else gguf.quantize(values, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def values() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((96, 128)).astype(np.float32)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16])
def test_floats_are_read_where_they_lie(tmp_path, values, kind):
    path = write(tmp_path / "model.gguf", {"a.weight": (values, kind), "b.weight": (values[0], Kind.F32)})
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind.name]
    with open_checkpoint(path) as model:
        assert torch.equal(model.read("a.weight"), torch.from_numpy(values).to(dtype))
        assert torch.equal(model.read_rows("a.weight", [slice(90, 96)]), torch.from_numpy(values[90:]).to(dtype))
        assert torch.equal(model.read("b.weight"), torch.from_numpy(values[0]))
        assert model.noise("a.weight") is None


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q5_0, Kind.Q4_0, Kind.Q4_1])
def test_blocks_are_dequantised_with_their_noise(tmp_path, values, kind):
    path = write(tmp_path / "model.gguf", {"a.weight": (values, kind)})
    expected = torch.from_numpy(gguf.dequantize(gguf.quantize(values, kind), kind))
    with open_checkpoint(path) as model:
        info = model.tensors["a.weight"]
        assert (info.shape, info.dtype, info.quantised) == ((96, 128), torch.float32, f"GGUF {kind.name}")
        assert torch.equal(model.read("a.weight"), expected)
        assert torch.equal(model.read_rows("a.weight", [slice(5, 7), slice(0, 1)]), expected[[5, 6, 0]])
        assert bytes(model.read_bytes("a.weight", 8, 16)) == expected.numpy().tobytes()[8:24]
        error = float((expected - torch.from_numpy(values)).square().mean().sqrt())
        assert model.noise("a.weight") == pytest.approx(error, rel=0.15)


def test_the_noise_is_that_of_the_format_where_weights_lie_on_coarser_levels(tmp_path, values):
    coarse = (np.round(values) + 0.1 * np.random.default_rng(1).standard_normal(values.shape) ** 3 * 1e-3).astype(
        np.float32
    )
    path = write(tmp_path / "model.gguf", {"a.weight": (coarse, Kind.Q8_0)})
    with open_checkpoint(path) as model:
        step = np.abs(coarse.reshape(-1, 32)).max(axis=1) / 127
        assert model.noise("a.weight") == pytest.approx(float(np.sqrt((step**2).mean() / 12)), rel=0.1)


@pytest.mark.parametrize("kind", [Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.IQ4_XS])
def test_the_other_formats_are_read_as_the_package_reads_them(tmp_path, kind):
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    packed = np.random.default_rng(1).integers(0, 60, (3, 2 * nbytes), dtype=np.uint8)
    path = write(tmp_path / "model.gguf", {"a.weight": (packed, kind)})
    with open_checkpoint(path) as model:
        assert model.tensors["a.weight"].shape == (3, 2 * block)
        assert torch.equal(model.read("a.weight"), torch.from_numpy(gguf.dequantize(packed, kind)))
        assert model.noise("a.weight") > 0


@pytest.mark.parametrize(
    ("kind", "low_bits"), [(Kind.Q4_K, slice(16, 144)), (Kind.Q5_K, slice(48, 176)), (Kind.Q6_K, slice(0, 128))]
)
def test_the_noise_of_k_quants_is_that_of_the_scales_they_store(tmp_path, kind, low_bits):
    """Whatever levels the weights happen to lie on: one more in every weight moves it by a step."""
    _, nbytes = gguf.GGML_QUANT_SIZES[kind]
    packed = np.random.default_rng(2).integers(0, 60, (4, nbytes), dtype=np.uint8)
    packed[:, low_bits] = 0
    more = packed.copy()
    more[:, low_bits] = 0x11
    steps = gguf.dequantize(more, kind) - gguf.dequantize(packed, kind)
    path = write(tmp_path / "model.gguf", {"a.weight": (packed, kind)})
    with open_checkpoint(path) as model:
        assert model.noise("a.weight") == pytest.approx(
            float(np.sqrt((steps.astype(float) ** 2).mean() / 12)), rel=1e-4
        )


def permuted(weight: Tensor, heads: int) -> np.ndarray:
    """As llama.cpp's converter puts the rows of queries and keys."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape).numpy()


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEYS,
        intermediate_size=96,
        vocab_size=50,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def write_llama(
    path: Path, model: LlamaForCausalLM, kind: Kind = Kind.F32, rows: int | None = None, **other: int
) -> Path:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, BLOCKS)
    tensors = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        values = weight.numpy()
        if "q_proj" in name or "k_proj" in name:
            values = permuted(weight, HEADS if "q_proj" in name else KEYS)
            values = values[:rows]
        stored = names.get_name(name, try_suffixes=(".weight",))
        tensors[stored] = (values, kind if weight.ndim > 1 else Kind.F32)
    settings = {
        "context_length": 128,
        "embedding_length": HIDDEN,
        "block_count": BLOCKS,
        "feed_forward_length": 96,
        "head_count": HEADS,
        "head_count_kv": KEYS,
        "layer_norm_rms_eps": 1e-6,
        "rope_dimension_count": HIDDEN // HEADS,
        "vocab_size": 50,
    } | other
    return write(path, tensors, "llama", **{key: value for key, value in settings.items() if value is not None})


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0])
def test_names_and_rows_of_a_known_architecture_are_turned_back(tmp_path, llama, kind):
    state = {name: weight for name, weight in llama.state_dict().items() if name != "lm_head.weight"}
    with open_checkpoint(write_llama(tmp_path / "model.gguf", llama, kind)) as model:
        assert set(model.tensors) == set(state)
        for name, weight in state.items():
            torch.testing.assert_close(model.read(name), weight, rtol=0, atol=0 if kind is Kind.F32 else 1e-3)
            assert torch.equal(model.read_rows(name, [slice(1, 3)]), model.read(name)[1:3])


def test_the_output_loads_in_transformers(tmp_path, llama):
    path = write_llama(tmp_path / "model.gguf", llama, Kind.Q8_0)
    with open_checkpoint(path) as model, CheckpointWriter(model, tmp_path / "out") as writer:
        for name in model.tensors:
            writer.copy(name)
        expected = {name: model.read(name).bfloat16() for name in model.tensors if "proj" in name}
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_key_value_heads"] == KEYS
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = torch.arange(10)[None]
    torch.testing.assert_close(loaded(tokens).logits, llama(tokens).logits, rtol=0, atol=2e-2)


@pytest.mark.parametrize("length", [0, 3, 30, 100, -1])
def test_a_file_that_is_cut_short_is_refused(tmp_path, values, length):
    path = write(tmp_path / "model.gguf", {"a.weight": (values, Kind.Q8_0)})
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError, match=r"model\.gguf is damaged"):
        open_checkpoint(path)


def test_a_list_longer_than_the_file_is_refused_at_once(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "other")
    writer.add_array("tokenizer.ggml.scores", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    content = (tmp_path / "model.gguf").read_bytes()
    length = (7).to_bytes(8, "little")
    assert content.count(length) == 1
    (tmp_path / "model.gguf").write_bytes(content.replace(length, (2**62).to_bytes(8, "little")))
    with pytest.raises(InputError, match=r"model\.gguf is damaged"):
        open_checkpoint(tmp_path / "model.gguf")


def lists(path: Path, kind: int, length: int, body: bytes, order: str = "<") -> Path:
    """A file with one setting, a list."""
    header = pack(f"{order}IQQ", 3, 0, 1) + pack(f"{order}Q", 1) + b"x"
    path.write_bytes(b"GGUF" + header + pack(f"{order}IIQ", 9, kind, length) + body)
    return path


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("kind", "element"), [(gguf.GGUFValueType.UINT8, b"x"), (gguf.GGUFValueType.STRING, None)])
def test_long_lists_of_settings_take_little_and_longer_ones_are_refused(tmp_path, monkeypatch, order, kind, element):
    element = element or pack(f"{order}Q", 3) + b"abc"
    path = lists(tmp_path / "model.gguf", kind, 1000, 1000 * element, order)
    made = []
    # One part, and not one or two for each element.
    monkeypatch.setattr(
        gguf.GGUFReader,
        "_push_field",
        lambda _, field, skip_sum=False: (
            made.append(field) or (0 if skip_sum else sum(part.nbytes for part in field.parts))
        ),
    )
    with open_checkpoint(path) as model:
        assert not model.tensors
    assert [len(field.parts) for field in made] == [1, 1, 1, 6]
    monkeypatch.setattr(gguf_header, "MAX_ELEMENTS", 999)
    with pytest.raises(InputError, match="it has 1000 elements in arrays of settings, expected at most 999"):
        open_checkpoint(path)


@pytest.mark.parametrize("kind", [gguf.GGUFValueType.UINT64, gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY])
@pytest.mark.parametrize("length", [3, 2**20])
def test_a_list_that_ends_too_early_is_refused(tmp_path, kind, length):
    path = lists(tmp_path / "model.gguf", kind, length, pack("<Q", 2) + b"abc")
    with pytest.raises(InputError, match=r"model\.gguf is damaged"):
        open_checkpoint(path)


@pytest.mark.parametrize("counts", [(100_001, 0), (0, 100_001)])
def test_more_tensors_or_settings_than_any_model_has_are_refused(tmp_path, counts):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + pack("<IQQ", 3, *counts) + bytes(8_000_000))
    with pytest.raises(InputError, match=r"it has 100001 (tensors|settings), expected at most 100000"):
        open_checkpoint(tmp_path / "model.gguf")


@pytest.mark.parametrize(("change", "heads"), [({"rows": 30}, 4), ({"head_count_kv": 3}, 3)])
def test_rows_that_are_not_those_of_the_heads_are_refused(tmp_path, llama, change, heads):
    path = write_llama(tmp_path / "model.gguf", llama, **change)
    with pytest.raises(InputError, match=rf"has \d+ rows; its settings speak of {heads} heads, .*; download"):
        open_checkpoint(path)


def test_without_the_number_of_heads_names_stay_and_no_row_moves(tmp_path, llama):
    path = write_llama(tmp_path / "model.gguf", llama, head_count=None)
    with open_checkpoint(path) as model:
        expected = permuted(llama.state_dict()["model.layers.0.self_attn.q_proj.weight"], HEADS)
        assert torch.equal(model.read("blk.0.attn_q.weight"), torch.from_numpy(expected))


def test_an_unknown_format_is_named(tmp_path):
    _, nbytes = gguf.GGML_QUANT_SIZES[Kind.Q8_K]
    path = write(tmp_path / "model.gguf", {"a.weight": (np.zeros((2, nbytes), dtype=np.uint8), Kind.Q8_K)})
    with pytest.raises(InputError, match=r"tensor 'a\.weight' in .* is stored as Q8_K; known are F64"):
        open_checkpoint(path)
