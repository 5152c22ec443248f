"""Random numbers on top: on every weight alike, or only what takes the weights off the base's grid."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from detune.checkpoints import Checkpoint
from detune.defences.base import Change, only, option
from detune.defences.linear import generator_of, linear_weights
from detune.numerics.float_grid import spacing

__all__ = ["Dither", "Noise"]

_GRIDS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Noise:
    """Independent Gaussian noise on the weights of linear layers.

    Attributes:
        size: Its standard deviation as a share of the matrix's own root mean square. The deltas would be the better
            measure, but only the owner of the base knows them, and one release does not tell.
    """

    name: ClassVar[str] = "noise"
    about: ClassVar[str] = "add Gaussian noise to the weights of linear layers"
    preserves_function: ClassVar[bool] = False
    draws: ClassVar[bool] = True

    size: float = field(default=0.03, metadata=option("Standard deviation as a share of the matrix's rms."))

    def prepare(self, model: Checkpoint, seed: int) -> Change:
        """Every tensor has random numbers of its own; see `Defence.prepare`."""
        linear = linear_weights(model)

        def change(name: str, tensor: Tensor) -> Tensor:
            exact = tensor.double()
            drawn = torch.randn(tensor.shape, generator=generator_of(seed, name), dtype=torch.float64)
            return (exact + drawn * (self.size * exact.square().mean().sqrt())).to(tensor.dtype)

        return only(linear, change)


@dataclass(frozen=True)
class Dither:
    """Uniform noise of one step of the base's grid, on every weight.

    A base that was stored in bf16 gives its bits away to float32 merges, because its entries lie on a grid. A dither of
    a whole step makes the place between two grid points uniform, whatever it was: nothing of the grid is left to a
    single release. Models that are stored on that grid themselves are rounded to it once more.

    Attributes:
        grid: The dtype whose steps count.
        steps: Width of the dither.

    Reference: Schuchman, "Dither signals and their effect on quantization noise", 1964.
    """

    name: ClassVar[str] = "dither"
    about: ClassVar[str] = "add one step's uniform noise, so that no weight lies on the base's grid"
    preserves_function: ClassVar[bool] = False
    draws: ClassVar[bool] = True

    grid: Literal["bfloat16", "float16", "float32"] = field(default="bfloat16", metadata=option("Of the base."))
    steps: float = field(default=1.0, metadata=option("Width in steps of the grid."))

    def prepare(self, model: Checkpoint, seed: int) -> Change:
        """Every tensor has random numbers of its own; see `Defence.prepare`."""
        grid = _GRIDS[self.grid]

        def change(name: str, tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            drawn = torch.rand(tensor.shape, generator=generator_of(seed, name), dtype=torch.float64) - 0.5
            return (tensor.double() + self.steps * drawn * spacing(tensor, grid)).to(tensor.dtype)

        return change
