"""Hidden bases of the parts of a layer, and what choosing others does to the tensors around them.

Every matrix A on one side of a hidden basis stands against `A^-T` on the other, so that products across it stay:
`(A q)^T (A^-T k) = q^T k` for queries and keys, `O A^-1 A V = O V` for values and the output.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from detune.symmetries.action import Action
from detune.symmetries.base import Attention, FeedForward, NormInto

__all__ = ["Actions", "HeadFrame", "NeuronFrame", "NormFrame", "complex_blocks", "expand", "join"]

Actions = Mapping[str, tuple[Action, ...]]
"""The change of each tensor, by its name; the others stay."""


@dataclass(frozen=True)
class HeadFrame:
    """A frame of the heads of an attention.

    Attributes:
        order: Which query head stands at each place, `(heads,)`; heads of one group stay together.
        keys: Acts on the queries of each group, its inverse transpose on the keys, `(groups, width, width)`, float64.
        values: Acts on the values of each group, its inverse transpose on the columns of the output.
    """

    order: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None

    def actions(self, part: Attention) -> Actions:
        """The action on each tensor, by its name."""
        shared = part.heads // part.groups
        queries = groups = None
        if self.order is not None:
            queries = expand(self.order, part.width)
            groups = expand(self.order[::shared] // shared, part.width)
        q, k = _both_sides(self.keys)
        v, o = _both_sides(self.values)
        return {
            **_rows(part.query, Action(0, queries, _repeat(q, shared))),
            **_rows(part.key, Action(0, groups, k)),
            **_rows(part.value, Action(0, groups, v)),
            f"{part.output}.weight": (Action(1, queries, _repeat(o, shared)),),
        }


@dataclass(frozen=True)
class NeuronFrame:
    """A frame of the neurons of a feed-forward block.

    Attributes:
        order: Which neuron stands at each place, `(width,)`.
        scale: Scale of `up`, its inverse of `down`, `(width,)`, float64; only where there is a gate.
    """

    order: Tensor | None = None
    scale: Tensor | None = None

    def actions(self, part: FeedForward) -> Actions:
        """The action on each tensor, by its name."""
        inverse = None if self.scale is None else 1 / self.scale
        return {
            **(_rows(part.gate, Action(0, self.order)) if part.gate is not None else {}),
            **_rows(part.up, Action(0, self.order, scale=self.scale)),
            f"{part.down}.weight": (Action(1, self.order, scale=inverse),),
        }


@dataclass(frozen=True)
class NormFrame:
    """A frame of the channels between a norm and its readers.

    Attributes:
        scale: Scale of the norm's output, its inverse of the readers' columns, `(channels,)`, float64.
    """

    scale: Tensor

    def actions(self, part: NormInto) -> Actions:
        """The action on each tensor, by its name."""
        readers = {f"{reader}.weight": (Action(1, scale=1 / self.scale),) for reader in part.readers}
        return _rows(part.norm, Action(0, scale=self.scale)) | readers


def join(several: Iterable[Actions]) -> Actions:
    """One after the other.

    Args:
        several: They may touch the same tensors.
    """
    joined: dict[str, tuple[Action, ...]] = {}
    for actions in several:
        for name, done in actions.items():
            joined[name] = joined.get(name, ()) + done
    return joined


def complex_blocks(numbers: Tensor) -> Tensor:
    """The matrices that multiply channel i with channel `i + width / 2` by complex numbers.

    Rotary positions turn each such pair by an angle of its own frequency; only these commute with all of them.

    Args:
        numbers: `(groups, width / 2)`, complex128.

    Returns:
        `(groups, width, width)`, float64.
    """
    real, imaginary = torch.diag_embed(numbers.real), torch.diag_embed(numbers.imag)
    return torch.cat([torch.cat([real, -imaginary], dim=2), torch.cat([imaginary, real], dim=2)], dim=1)


def expand(order: Tensor, width: int) -> Tensor:
    """The order of channels for an order of blocks of them."""
    return (order[:, None] * width + torch.arange(width)).flatten()


def _both_sides(matrices: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if matrices is None else (matrices, torch.linalg.inv(matrices).mT)


def _repeat(matrices: Tensor | None, shared: int) -> Tensor | None:
    return None if matrices is None else matrices.repeat_interleave(shared, dim=0)


def _rows(module: str, action: Action) -> dict[str, tuple[Action, ...]]:
    return {f"{module}.{parameter}": (action,) for parameter in ("weight", "bias")}
