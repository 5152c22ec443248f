"""Adapters as PEFT trains and merges them, and a model with every kind of layer."""

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn


class Mixed(nn.Module):
    """Every kind of layer that is merged, in shapes that tell rows from columns."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.linear = nn.Linear(6, 10)
        self.square = nn.Linear(8, 8)
        self.conv = nn.Conv2d(3, 5, 3)
        self.pointwise = nn.Conv2d(4, 6, 1)
        self.conv1d = nn.Conv1d(3, 4, 5)


def train(model: nn.Module, config: LoraConfig, path: Path, dtype: torch.dtype | None = None) -> None:
    """Save an adapter whose factors are all random (B would start at zero)."""
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns when it corrects fan_in_fan_out
        adapted = get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0, 0.1)
        adapted.save_pretrained(path)
    file = path / "adapter_model.safetensors"
    if dtype is not None:
        save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)


def merge_model(model: nn.Module, path: Path) -> Any:
    """Merge as PEFT does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(model, path).merge_and_unload()


def merge(model: nn.Module, path: Path) -> dict[str, torch.Tensor]:
    return merge_model(model, path).state_dict()
