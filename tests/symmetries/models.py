"""Tiny random transformers of every kind whose symmetries are known, and what each puts out."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detune._runtime import global_seed, quiet
from detune.checkpoints import CheckpointWriter, open_checkpoint
from detune.defences.base import Defence

HIDDEN = 64
LAYERS = 2


@dataclass(frozen=True)
class Kind:
    """An architecture: how to make one, and what to ask it."""

    make: Callable[[], Any]
    ask: Callable[[Any], Tensor]
    targets: tuple[str, ...]
    attention: tuple[str, ...]


def _bert(head: bool) -> Any:
    from transformers import BertConfig, BertForMaskedLM, BertModel

    config = BertConfig(
        vocab_size=50,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        intermediate_size=96,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    return (BertForMaskedLM if head else BertModel)(config)


def _vit() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        intermediate_size=96,
        image_size=16,
        patch_size=8,
        initializer_range=0.2,
    )
    return ViTForImageClassification(config)


def _causal(name: str, groups: int) -> Any:
    import transformers

    config = getattr(transformers, f"{name}Config")(
        vocab_size=50,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=groups,
        intermediate_size=96,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    return getattr(transformers, f"{name}ForCausalLM")(config)


@torch.no_grad()
def _of_tokens(model: Any) -> Tensor:
    tokens = torch.randint(0, 50, (3, 12), generator=torch.Generator().manual_seed(1))
    output = model(tokens)
    return output.logits if "logits" in output else output.last_hidden_state


@torch.no_grad()
def _of_images(model: Any) -> Tensor:
    dtype = next(model.parameters()).dtype
    return model(
        torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    ).logits


_BERT = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
_BERT_HEADS = ("query", "value")
_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_VIT = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")

KINDS = {
    "bert": Kind(partial(_bert, head=False), _of_tokens, _BERT, _BERT_HEADS),
    "bert with a head": Kind(partial(_bert, head=True), _of_tokens, _BERT, _BERT_HEADS),
    "vit": Kind(_vit, _of_images, _VIT, ("q_proj", "v_proj")),
    "llama": Kind(partial(_causal, "Llama", 8), _of_tokens, _LLAMA, ("q_proj", "v_proj")),
    "mistral, grouped": Kind(partial(_causal, "Mistral", 4), _of_tokens, _LLAMA, ("q_proj", "v_proj")),
}


def build(kind: str, seed: int = 0) -> Any:
    """A random model in float32, biases and norms not at their defaults."""
    with global_seed(seed), quiet():
        model = KINDS[kind].make().eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def load(model: Any, path: Path) -> Any:
    """A checkpoint of the class of a model."""
    with quiet():
        return type(model).from_pretrained(path, dtype="auto").eval()


def defended(path: Path, out: Path, seed: int, *defences: Defence) -> Path:
    """A checkpoint changed by one defence after the other."""
    with open_checkpoint(path) as model:
        changes = [defence.prepare(model, seed) for defence in defences]
        with CheckpointWriter(model, out) as writer:
            for name in model.tensors:
                tensor = model.read(name)
                for change in changes:
                    tensor = change(name, tensor)
                writer.write(name, tensor)
    return out
