"""A small subset of LoWRA Bench, built by the builder from PEFT adapters of a small BERT."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertModel

from detune._runtime import quiet
from detune.bench.build import build_subset
from detune.bench.subsets import Subset, open_subset

LORAS = 4
RANK = 2
ALPHA = 6


def small_bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(
        BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=50)
    )


def save_lora(out: Path, seed: int, rank: int = RANK, targets: tuple[str, ...] = ("query", "value")) -> Path:
    """An adapter with both factors drawn at random, as large as training makes them."""
    config = LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=list(targets))
    with quiet():
        model = get_peft_model(small_bert(), config)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(out)
    return out


@pytest.fixture(scope="session")
def bert_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "base"
    small_bert().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def loras(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [save_lora(folder / f"task-{i}", seed=i) for i in range(LORAS)]


@pytest.fixture(scope="session")
def subset_dir(bert_base: Path, loras: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("subsets") / "small"
    build_subset(bert_base, loras, out, stands_for="vit")
    return out


@pytest.fixture
def subset(subset_dir: Path) -> Subset:
    return open_subset(str(subset_dir))
