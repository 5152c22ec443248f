"""Small checkpoints, saved by the libraries that users save theirs with."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM


def make_bert(dtype: torch.dtype = torch.float32) -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=50)
    return BertModel(config).to(dtype)


def make_llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A model whose output layer is tied to its embedding."""
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        vocab_size=64,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(dtype)


@pytest.fixture(scope="session")
def bert() -> Callable[..., BertModel]:
    return make_bert


@pytest.fixture(scope="session")
def llama() -> Callable[..., LlamaForCausalLM]:
    return make_llama


@pytest.fixture(scope="session")
def bert_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "bert"
    make_bert().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def sharded_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    make_llama(torch.bfloat16).save_pretrained(path, max_shard_size="10KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


@pytest.fixture(scope="session")
def pipeline_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(2)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=1,
        sample_size=8,
        norm_num_groups=1,
    )
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8)
    path = tmp_path_factory.mktemp("models") / "dit"
    DiTPipeline(transformer, vae, DDIMScheduler()).save_pretrained(path, max_shard_size="20KB")
    return path


@pytest.fixture
def bin_dir(tmp_path: Path) -> Path:
    """Two `torch.save` shards; `lm_head` shares the storage of `embed`, `view` is transposed."""
    path = tmp_path / "pickled"
    path.mkdir()
    generator = torch.Generator().manual_seed(3)
    embed = torch.randn(6, 4, generator=generator)
    first = {"embed": embed, "lm_head": embed, "scalar": torch.tensor(7)}
    second = {"view": torch.randn(3, 5, generator=generator).half().T, "empty": torch.empty(0, 2)}
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    for name, state in zip(names, (first, second), strict=True):
        torch.save(state, path / name)
    index = {
        "metadata": {"total_size": 1},
        "weight_map": dict.fromkeys(first, names[0]) | dict.fromkeys(second, names[1]),
    }
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text("{}")
    return path


@pytest.fixture
def write_raw() -> Callable[..., Path]:
    """Write a safetensors file from a header that need not be sound."""

    def write(path: Path, table: Any, data: bytes = b"", *, length: int | None = None) -> Path:
        text = table if isinstance(table, bytes) else json.dumps(table).encode()
        path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
        return path

    return write
