"""Weight-only quantisation. What is released here are the numbers that anybody has after dequantising.

Both schemes are a few lines of torch. bitsandbytes and torchao are not used for them: they bring kernels to run
quantised models with, and PEFT loads bitsandbytes wherever it is installed.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from detune.checkpoints import Checkpoint, Kind
from detune.defences.base import Change, only, option
from detune.defences.linear import linear_weights

__all__ = ["Int8", "Nf4"]

# 16 levels: quantiles of a standard normal distribution, halfway between 8 steps below zero and 9 from zero, over the
# largest, so that zero is one of them (QLoRA's Appendix E).
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@dataclass(frozen=True)
class Int8:
    """Linear layers rounded to the nearest of 255 multiples of each output channel's largest weight over 127.

        W[a, b] -> s_a round(W[a, b] / s_a),     s_a = max_b |W[a, b]| / 127

    This is the common weight-only scheme (LLM.int8(), torchao's `Int8WeightOnlyConfig`).

    Reference: Dettmers et al., "LLM.int8()", NeurIPS 2022 (arXiv 2208.07339), Section 2.1, vector-wise.
    """

    name: ClassVar[str] = "int8"
    about: ClassVar[str] = "quantise linear layers to 8 bits, a scale for each output channel"
    preserves_function: ClassVar[bool] = False
    draws: ClassVar[bool] = False

    def prepare(self, model: Checkpoint, seed: int) -> Change:
        """Nothing is drawn; see `Defence.prepare`."""
        linear = linear_weights(model)

        def change(name: str, tensor: Tensor) -> Tensor:
            exact = tensor.double()
            axis = 1 if linear[name] is Kind.LINEAR else 0
            scale = exact.abs().amax(dim=axis, keepdim=True) / 127
            scale = scale.where(scale > 0, 1.0)
            return ((exact / scale).round() * scale).to(tensor.dtype)

        return only(linear, change)


@dataclass(frozen=True)
class Nf4:
    """Linear layers in NF4: of every 64 weights the largest magnitude, and each as the nearest of 16 shares of it.

    The scales stay float32; QLoRA's double quantisation rounds them once more.

    Attributes:
        block: Weights with one scale, in the order in which they are stored.

    Reference: Dettmers et al., "QLoRA", NeurIPS 2023 (arXiv 2305.14314), Section 3.
    """

    name: ClassVar[str] = "nf4"
    about: ClassVar[str] = "quantise linear layers to 4 bits, the NF4 of QLoRA"
    preserves_function: ClassVar[bool] = False
    draws: ClassVar[bool] = False

    block: int = field(default=64, metadata=option("Weights with one scale.", least=2))

    def prepare(self, model: Checkpoint, seed: int) -> Change:
        """Nothing is drawn; see `Defence.prepare`."""
        linear = linear_weights(model)
        levels = torch.tensor(_NF4, dtype=torch.float32)

        def change(name: str, tensor: Tensor) -> Tensor:
            # The last block may be short.
            flat = tensor.float().flatten()
            blocks = torch.nn.functional.pad(flat, (0, -len(flat) % self.block)).view(-1, self.block)
            scale = blocks.abs().amax(dim=1, keepdim=True)
            shares = blocks / scale.where(scale > 0, 1.0)
            nearest = torch.bucketize(shares, (levels[1:] + levels[:-1]) / 2)
            dequantised = (levels[nearest] * scale).flatten()[: len(flat)]
            return dequantised.view(tensor.shape).to(tensor.dtype)

        return only(linear, change)
