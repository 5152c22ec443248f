import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, ViTConfig, ViTModel

from detune.checkpoints import CheckpointWriter, MergedCheckpoint, open_checkpoint
from detune.errors import InputError
from tests.checkpoints.loras import Mixed, merge, merge_model, train

QUERY = "encoder.layer.0.attention.self.query.weight"


def check(base: Path, adapter: Path, expected: dict[str, torch.Tensor], touched: int) -> MergedCheckpoint:
    """Every tensor has the bits of PEFT's merge, and the touched ones changed."""
    plain, merged = open_checkpoint(base), open_checkpoint(f"{base}+{adapter}")
    assert isinstance(merged, MergedCheckpoint)
    assert list(merged.tensors) == list(plain.tensors)
    changed = 0
    for name, info in merged.tensors.items():
        tensor = merged.read(name)
        assert (tensor.dtype, tuple(tensor.shape), tensor.nbytes) == (info.dtype, info.shape, info.nbytes)
        (key,) = [key for key in expected if key == name or key.endswith(f".{name}") or name.endswith(f".{key}")]
        assert tensor.dtype == expected[key].dtype
        assert tensor.equal(expected[key]), name
        assert bytes(merged.read_bytes(name)) == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        changed += not tensor.equal(plain.read(name))
    assert changed == touched
    return merged


@pytest.mark.parametrize("stored", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_linear_equals_peft(
    tmp_path: Path, bert: Callable[..., Any], dtype: torch.dtype, stored: torch.dtype | None
) -> None:
    bert(dtype).save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, lora_alpha=7, target_modules=["query", "value", "dense"])
    train(bert(dtype), config, tmp_path / "adapter", stored)
    expected = merge(bert(dtype), tmp_path / "adapter")
    check(tmp_path / "base", tmp_path / "adapter", expected, touched=11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_embedding_and_convolutions_equal_peft(tmp_path: Path, dtype: torch.dtype) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return Mixed().to(dtype)

    targets = ["embed", "linear", "square", "conv", "pointwise", "conv1d"]
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=targets,
        use_rslora=True,
        rank_pattern={"conv.*": 2, "linear": 1},
        alpha_pattern={"^square": 9},
    )
    train(make(), config, tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    save_file(make().state_dict(), tmp_path / "base" / "model.safetensors")
    check(tmp_path / "base", tmp_path / "adapter", merge(make(), tmp_path / "adapter"), touched=len(targets))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transposed_layers_equal_peft(tmp_path: Path, dtype: torch.dtype) -> None:
    """GPT-2 stores (in, out); its projection is square, so only the configuration tells."""

    def make() -> GPT2LMHeadModel:
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=16)).to(dtype)

    make().save_pretrained(tmp_path / "base")
    train(make(), LoraConfig(r=4, target_modules=["c_attn", "c_proj"]), tmp_path / "adapter")
    check(tmp_path / "base", tmp_path / "adapter", merge(make(), tmp_path / "adapter"), touched=3)


def test_targeted_token_embedding_of_a_tied_model(tmp_path: Path, llama: Callable[..., Any]) -> None:
    """PEFT saves the frozen embedding beside the factors."""
    llama().save_pretrained(tmp_path / "base", max_shard_size="10KB")
    train(llama(), LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]), tmp_path / "adapter")
    assert any("base_layer" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    expected = merge(llama(), tmp_path / "adapter")
    del expected["lm_head.weight"]
    check(tmp_path / "base", tmp_path / "adapter", expected, touched=3)


def test_names_that_differ_in_memory_and_on_disk(tmp_path: Path) -> None:
    """transformers stores q_proj of a ViT as `attention.query`, and the adapter has the name in memory."""

    def make() -> ViTModel:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "image_size": 8, "patch_size": 4}
        return ViTModel(ViTConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)).bfloat16()

    make().save_pretrained(tmp_path / "base")
    modules = {name.split(".")[-1] for name, _ in make().named_modules()}
    targets = ["projection", "q_proj" if "q_proj" in modules else "query"]
    train(make(), LoraConfig(r=2, target_modules=targets), tmp_path / "adapter")
    merge_model(make(), tmp_path / "adapter").save_pretrained(tmp_path / "merged")
    expected = load_file(tmp_path / "merged" / "model.safetensors")
    check(tmp_path / "base", tmp_path / "adapter", expected, touched=2)


def test_prefixes_on_either_side(tmp_path: Path, bert: Callable[..., Any]) -> None:
    def make_head() -> BertForMaskedLM:
        torch.manual_seed(4)
        return BertForMaskedLM(BertConfig(**bert().config.to_diff_dict()))

    config = LoraConfig(r=2, target_modules=["query"])
    bert().save_pretrained(tmp_path / "plain")
    make_head().save_pretrained(tmp_path / "head")
    train(bert(), config, tmp_path / "plain_adapter")
    train(make_head(), config, tmp_path / "head_adapter")
    with_head = open_checkpoint(f"{tmp_path / 'head'}+{tmp_path / 'plain_adapter'}")
    assert not with_head.read(f"bert.{QUERY}").equal(open_checkpoint(tmp_path / "head").read(f"bert.{QUERY}"))
    without = open_checkpoint(f"{tmp_path / 'plain'}+{tmp_path / 'head_adapter'}")
    assert not without.read(QUERY).equal(open_checkpoint(tmp_path / "plain").read(QUERY))


def test_adapter_of_a_pipeline_component(tmp_path: Path, pipeline_dir: Path) -> None:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel.from_pretrained(pipeline_dir / "transformer")
    train(model, LoraConfig(r=2, target_modules=["to_q"]), tmp_path / "adapter")
    model = DiTTransformer2DModel.from_pretrained(pipeline_dir / "transformer")
    expected = merge(model, tmp_path / "adapter")
    merged = open_checkpoint(f"{pipeline_dir}+{tmp_path / 'adapter'}")
    name = "transformer_blocks.0.attn1.to_q.weight"
    assert merged.read(f"transformer/{name}").equal(expected[name])


@pytest.fixture
def pair(tmp_path: Path, bert: Callable[..., Any]) -> tuple[Path, Path]:
    """A bfloat16 base in shards, and an adapter of its query weights."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    bert(torch.bfloat16).save_pretrained(base, max_shard_size="20KB")
    train(bert(torch.bfloat16), LoraConfig(r=4, lora_alpha=6, target_modules=["query"]), adapter)
    return base, adapter


def test_merge_in_float32(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    plain = open_checkpoint(base)
    merged = open_checkpoint(f"{base}+{adapter}", merge_dtype=torch.float32)
    factors = load_file(adapter / "adapter_model.safetensors")
    factor_a, factor_b = (factors[f"base_model.model.{QUERY.replace('weight', f'lora_{x}.weight')}"] for x in "AB")
    expected = plain.read(QUERY).float() + (factor_b @ factor_a) * (6 / 4)
    assert merged.read(QUERY).equal(expected)
    assert merged.tensors[QUERY].dtype == torch.float32
    assert merged.tensors[QUERY].nbytes == 2 * plain.tensors[QUERY].nbytes
    assert merged.tensors["pooler.dense.weight"] == plain.tensors["pooler.dense.weight"]

    with CheckpointWriter(merged, tmp_path / "out") as writer:
        for name in merged.tensors:
            writer.copy(name)
    again = open_checkpoint(tmp_path / "out")
    assert again.read(QUERY).equal(expected)
    assert all(again.read(name).equal(merged.read(name)) for name in merged.tensors)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == merged.total_bytes > plain.total_bytes


def test_written_merge_loads(pair: tuple[Path, Path], bert: Callable[..., Any], tmp_path: Path) -> None:
    from transformers import AutoModel

    base, adapter = pair
    merged = open_checkpoint(f"{base}+{adapter}")
    with CheckpointWriter(merged, tmp_path / "out") as writer:
        for name in merged.tensors:
            writer.write(name, merged.read(name))
    expected = merge(bert(torch.bfloat16), adapter)
    state = AutoModel.from_pretrained(tmp_path / "out").state_dict()
    assert all(state[name].equal(expected[name]) for name in expected)
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_hashes_cover_base_and_adapter(pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    merged = open_checkpoint(f"{base}+{adapter}")
    names = {"+adapter/adapter_config.json", "+adapter/adapter_model.safetensors"}
    assert set(merged.hashes()) == set(open_checkpoint(base).hashes()) | names
    assert set(merged.paths) == {base, adapter}


def test_pickled_adapter_and_plus_in_a_path(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    expected = open_checkpoint(f"{base}+{adapter}").read(QUERY)
    odd_base, odd_adapter = tmp_path / "c++", tmp_path / "a+b"
    base.rename(odd_base)
    adapter.rename(odd_adapter)
    file = odd_adapter / "adapter_model.safetensors"
    torch.save(load_file(file), odd_adapter / "adapter_model.bin")
    file.unlink()
    assert not isinstance(open_checkpoint(odd_base), MergedCheckpoint)
    assert open_checkpoint(f"{odd_base}+{odd_adapter}").read(QUERY).equal(expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, r"is of type LOHA; only LORA is read"),
        ({"use_dora": True}, r"more than plain LoRA; it has use_dora=true; merge adapter with PEFT"),
        ({"bias": "all"}, "it has bias=all"),
        ({"modules_to_save": ["pooler"]}, r'it has modules_to_save=\["pooler"\]'),
        ({"init_lora_weights": "pissa"}, "it has init_lora_weights=pissa"),
        ({"r": 5}, r"has rank 4, expected 5"),
        ({"lora_alpha": None}, "has no lora_alpha"),
    ],
)
def test_unsupported_adapters(pair: tuple[Path, Path], change: dict[str, Any], message: str) -> None:
    base, adapter = pair
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        open_checkpoint(f"{base}+{adapter}")


PREFIX = "base_model.model.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update({"base_model.model.pooler.weight": torch.ones(1)}),
            r"found tensor '.*pooler\.weight'",
        ),
        (lambda t: t.update({f"{PREFIX}.lora_magnitude_vector": torch.ones(1)}), "lora_magnitude_vector"),
        (lambda t: t.pop(f"{PREFIX}.lora_B.weight"), r"incomplete; module '.*query' has only \['A'\]"),
        (lambda t: t.clear(), "no lora_A and lora_B at all"),
        (
            lambda t: t.update(
                {
                    "base_model.model.decoder.lora_A.weight": torch.ones(4, 2),
                    "base_model.model.decoder.lora_B.weight": torch.ones(2, 4),
                }
            ),
            r"cannot place module 'decoder' .* one tensor named like 'decoder\.weight', no tensor fits",
        ),
        (
            lambda t: t.update(
                {
                    "base_model.model.self.value.lora_A.weight": torch.ones(4, 2),
                    "base_model.model.self.value.lora_B.weight": torch.ones(2, 4),
                }
            ),
            r"cannot place module 'self\.value' .* 2 tensors fit",
        ),
        (
            lambda t: t.update(
                {
                    "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight": torch.ones(4, 2),
                    "base_model.model.bert.encoder.layer.0.attention.self.query.lora_B.weight": torch.ones(2, 4),
                }
            ),
            "changes tensor 'encoder.layer.0.attention.self.query.weight' twice",
        ),
    ],
)
def test_factors_that_fit_nothing(pair: tuple[Path, Path], change: Callable[..., Any], message: str) -> None:
    base, adapter = pair
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(InputError, match=message):
        open_checkpoint(f"{base}+{adapter}")


def test_factors_of_another_shape(pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[f"{PREFIX}.lora_B.weight"] = torch.ones(5, 4)
    save_file(tensors, file)
    with pytest.raises(InputError, match=r"does not fit tensor '.*query\.weight'.*\(5, 32\).*\(32, 32\)"):
        open_checkpoint(f"{base}+{adapter}").read(QUERY)


def test_quantised_base(pair: tuple[Path, Path], tmp_path: Path) -> None:
    _, adapter = pair
    names = [f"encoder.layer.{layer}.attention.self.query.weight" for layer in (0, 1)]
    save_file({name: torch.ones(32, 32, dtype=torch.int64) for name in names}, tmp_path / "q.safetensors")
    with pytest.raises(InputError, match=r"cannot merge into tensor .* stored as torch\.int64"):
        open_checkpoint(f"{tmp_path / 'q.safetensors'}+{adapter}")


def test_bad_sides(pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    with pytest.raises(InputError, match="is not an adapter; expected adapter_model"):
        open_checkpoint(f"{base}+{base}")
    with pytest.raises(InputError, match="no such model"):
        open_checkpoint(f"{base}+./nowhere")
    with pytest.raises(InputError, match="one side of '\\+' is empty"):
        open_checkpoint("base+")
    with pytest.raises(InputError, match=r"is a PEFT adapter, not a model"):
        open_checkpoint(f"{adapter}+{adapter}")
