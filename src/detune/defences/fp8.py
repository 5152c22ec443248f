"""Stochastic rounding to fp8 as ComfyUI does it: the dither is seeded by the tensor's name."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from detune.checkpoints import Checkpoint
from detune.defences.base import Change, only, option
from detune.defences.linear import linear_weights
from detune.numerics.dithered_fp8 import fp8_stochastic, named_dither

__all__ = ["Fp8"]

_GRIDS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}


@dataclass(frozen=True)
class Fp8:
    """Linear layers rounded to fp8 without a scale, up or down by chance; see `detune.numerics.dithered_fp8`.

    The release's seed is not used: the chance is the tensor's name, as in the models that ComfyUI merges. What is
    released here are the numbers after dequantising.

    Attributes:
        grid: Which fp8.
    """

    name: ClassVar[str] = "fp8"
    about: ClassVar[str] = "round linear layers to fp8 stochastically, the dither seeded by the tensor's name"
    preserves_function: ClassVar[bool] = False
    draws: ClassVar[bool] = False

    grid: Literal["float8_e4m3fn", "float8_e5m2"] = field(default="float8_e4m3fn", metadata=option("Which fp8."))

    def prepare(self, model: Checkpoint, seed: int) -> Change:
        """Nothing is drawn but from the names; see `Defence.prepare`."""
        linear = linear_weights(model)

        def change(name: str, tensor: Tensor) -> Tensor:
            return fp8_stochastic(tensor, named_dither(name, tensor.shape), _GRIDS[self.grid]).to(tensor.dtype)

        return only(linear, change)
