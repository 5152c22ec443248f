"""Random sets of checkpoints whose origin is known: fine-tunes of one base, and strangers."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

WIDTHS = (96, 128, 192, 256)
LAYERS = 6
RANKS = (1, 2, 4, 8, 16)
State = dict[str, Tensor]


class Role(StrEnum):
    """What a model of a set is."""

    LORA = "LoRA"
    HEAD = "LoRA, new head"
    OTHER = "another base"
    FULL = "full fine-tune"
    PERMUTED = "permuted neurons"

    @property
    def belongs(self) -> bool:
        """Whether it is of the family."""
        return self in (Role.LORA, Role.HEAD)


@dataclass(frozen=True)
class RandomSet:
    """Checkpoints on disk.

    Attributes:
        models: One file each.
        roles: What each is.
        head: Name of the tensor that a new head replaces.
    """

    models: tuple[Path, ...]
    roles: tuple[Role, ...]
    head: str


@dataclass(frozen=True)
class _Draw:
    """What a set is drawn from.

    Attributes:
        generator: Of everything.
        dtypes: Of the models; one is drawn for each.
        least_full: Smallest size of a full fine-tune, relative to the weights.
    """

    generator: torch.Generator
    dtypes: tuple[torch.dtype, ...]
    least_full: float

    def number(self, low: int, high: int) -> int:
        """Uniform from `low` to `high`, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def size(self, low: float, high: float) -> float:
        """Log-uniform."""
        return low * math.exp(float(torch.rand((), generator=self.generator)) * math.log(high / low))

    def normal(self, *shape: int) -> Tensor:
        """Standard normal, float64."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def permutation(self, n: int) -> Tensor:
        """A random order of n things."""
        return torch.randperm(n, generator=self.generator)

    def dtype(self) -> torch.dtype:
        """One of the dtypes."""
        return self.dtypes[self.number(0, len(self.dtypes) - 1)]


def random_set(folder: Path, seed: int, dtypes: tuple[torch.dtype, ...], least_full: float) -> RandomSet:
    """Write 3 to 15 models with 0 to 3 strangers, always fewer than members.

    A member is a LoRA of rank 1 to 16 on some of the layers, from 0.001 to 0.3 of the weights' size, with flat or
    decaying singular values, on a base stored in the first dtype; one in ten has a new head, but never all but one.
    Strangers of another base share it.

    Args:
        folder: An empty directory.
        seed: Of everything.
        dtypes: Storage dtypes; one is drawn for each model.
        least_full: Smallest size of a full fine-tune, relative to the weights; the largest is 0.1.
    """
    draw = _Draw(torch.Generator().manual_seed(seed), dtypes, least_full)
    widths = [WIDTHS[draw.number(0, len(WIDTHS) - 1)] for _ in range(LAYERS + 1)]
    base, other = _base(draw, widths), _base(draw, widths)
    n = draw.number(3, 15)
    strangers = draw.number(0, min(3, (n - 1) // 2, n - 3))
    roles = [(Role.OTHER, Role.FULL, Role.PERMUTED)[draw.number(0, 2)] for _ in range(strangers)]
    roles += [Role.LORA] * 2 + [Role.HEAD if draw.number(1, 10) == 1 else Role.LORA for _ in range(n - strangers - 2)]
    roles = [roles[i] for i in draw.permutation(n)]
    make: dict[Role, Callable[[], State]] = {
        Role.LORA: lambda: _lora(draw, base),
        Role.HEAD: lambda: _lora(draw, base) | {_name(LAYERS - 1): _matrix(draw, widths[-1], widths[-2])},
        Role.OTHER: lambda: _lora(draw, other),
        Role.FULL: lambda: _full(draw, base),
        Role.PERMUTED: lambda: _lora(draw, _permuted(draw, base)),
    }
    paths = []
    for i, role in enumerate(roles):
        dtype = draw.dtype()
        path = folder / f"model-{i}.safetensors"
        save_file({name: weight.to(dtype).contiguous() for name, weight in make[role]().items()}, path)
        paths.append(path)
    return RandomSet(tuple(paths), tuple(roles), _name(LAYERS - 1))


def _name(layer: int) -> str:
    return f"layers.{layer}.weight"


def _base(draw: _Draw, widths: list[int]) -> State:
    """A chain of layers, as stored."""
    layers = zip(widths[1:], widths[:-1], strict=True)
    return {
        _name(i): _matrix(draw, out, columns).to(draw.dtypes[0]).double() for i, (out, columns) in enumerate(layers)
    }


def _matrix(draw: _Draw, out: int, columns: int) -> Tensor:
    """Gaussian, with columns of different size as trained weights have them."""
    return draw.normal(out, columns) * torch.exp(0.5 * draw.normal(columns)) / math.sqrt(columns)


def _lora(draw: _Draw, base: State) -> State:
    """A LoRA of one rank and size on some of the layers, merged."""
    rank, size, decay = RANKS[draw.number(0, len(RANKS) - 1)], draw.size(1e-3, 0.3), 4.0 * draw.number(0, 1)
    touched = set(draw.permutation(len(base))[: draw.number(2, len(base))].tolist())
    sigma = torch.exp(-decay * torch.linspace(0, 1, rank, dtype=torch.float64))
    state = dict(base)
    for i, (name, weight) in enumerate(base.items()):
        if i in touched:
            delta = (draw.normal(weight.shape[0], rank) * sigma) @ draw.normal(rank, weight.shape[1])
            state[name] = weight + delta * (size * weight.norm() / delta.norm())
    return state


def _full(draw: _Draw, base: State) -> State:
    """Every entry of every layer changed."""
    size = draw.size(draw.least_full, 0.1)
    changes = {name: draw.normal(*weight.shape) for name, weight in base.items()}
    return {
        name: weight + changes[name] * (size * weight.norm() / changes[name].norm()) for name, weight in base.items()
    }


def _permuted(draw: _Draw, base: State) -> State:
    """A network with its hidden neurons in another order."""
    state = dict(base)
    for layer in range(len(base) - 1):
        order = draw.permutation(base[_name(layer)].shape[0])
        state[_name(layer)] = state[_name(layer)][order]
        state[_name(layer + 1)] = state[_name(layer + 1)][:, order]
    return state
