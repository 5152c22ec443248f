"""Fewer bits: what half-precision releases hold."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from detune.checkpoints import Checkpoint
from detune.defences.base import Change
from detune.errors import InputError

__all__ = ["Bf16", "Fp16"]


@dataclass(frozen=True)
class Bf16:
    """Every weight rounded to bfloat16: 8 bits of fraction. The file keeps its dtype; its numbers are those of bf16."""

    name: ClassVar[str] = "bf16"
    about: ClassVar[str] = "round every weight to bfloat16"
    preserves_function: ClassVar[bool] = False
    draws: ClassVar[bool] = False

    def prepare(self, model: Checkpoint, seed: int) -> Change:
        """Nothing is drawn; see `Defence.prepare`."""
        return lambda name, tensor: _rounded(name, tensor, torch.bfloat16)


@dataclass(frozen=True)
class Fp16:
    """Every weight rounded to float16: 11 bits of fraction. The file keeps its dtype; its numbers are those of fp16."""

    name: ClassVar[str] = "fp16"
    about: ClassVar[str] = "round every weight to float16"
    preserves_function: ClassVar[bool] = False
    draws: ClassVar[bool] = False

    def prepare(self, model: Checkpoint, seed: int) -> Change:
        """Nothing is drawn; see `Defence.prepare`."""
        return lambda name, tensor: _rounded(name, tensor, torch.float16)


def _rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    rounded = tensor.to(dtype).to(tensor.dtype)
    if not bool(torch.isfinite(rounded).all()):
        raise InputError(
            f"tensor {name!r} does not fit into {dtype}",
            f"its largest entry is {float(tensor.abs().max()):.3g}",
            "release in bf16",
        )
    return rounded
