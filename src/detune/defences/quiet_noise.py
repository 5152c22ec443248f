"""Random numbers where the model hardly looks: in input directions that its texts do not use."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from detune.checkpoints import Checkpoint, Kind, find_places
from detune.defences.base import Change, only, option
from detune.defences.linear import generator_of, linear_weights
from detune.defences.running import input_moments
from detune.errors import InputError

__all__ = ["Padding", "QuietNoise"]

# Directions that the texts do not use at all get as much noise as one of this share of the mean variance.
LEAST_VARIANCE = 1e-3

# The noise for a matrix `(out, in)`, from the variances (ascending) and directions of its inputs, and a generator.
Draw = Callable[[Tensor, Tensor, Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class QuietNoise:
    """Gaussian noise on linear layers, the more in an input direction the less the inputs vary along it.

    Along the eigenvector v_j of the inputs' second moments, with eigenvalue l_j, the noise has the variance
    `size^2 ms(W) in (1/l_j) / sum_j (1/l_j)`: every direction then disturbs the output alike, and the whole
    of it less than white noise of the same size does.

    Attributes:
        texts: A file with a text on each line, like those that the model is for.
        size: Root mean square of the noise, as a share of the matrix's own.
    """

    name: ClassVar[str] = "quiet-noise"
    about: ClassVar[str] = "add Gaussian noise in the input directions that cost the model least"
    preserves_function: ClassVar[bool] = False
    draws: ClassVar[bool] = True

    texts: Path = field(metadata=option("A file, a text on each line."))
    size: float = field(default=0.1, metadata=option("Root mean square as a share of the matrix's own."))

    def prepare(self, model: Checkpoint, seed: int) -> Change:
        """Run the model on the texts; see `Defence.prepare`."""

        def draw(W: Tensor, variances: Tensor, directions: Tensor, generator: torch.Generator) -> Tensor:
            share = 1 / variances.clamp(min=LEAST_VARIANCE * float(variances.mean()))
            scale = (share / share.mean()).sqrt() * (self.size * W.square().mean().sqrt())
            white = torch.randn(W.shape, generator=generator, dtype=W.dtype)
            return (white * scale) @ directions.mT

        return _along_inputs(model, self.texts, seed, draw)


@dataclass(frozen=True)
class Padding:
    """A random matrix of just over half the full rank, all its singular values equal, where inputs vary least.

    Then `rank(M_i) + rank(M_j)` is more than the matrix has, every difference has full rank, and no closed form
    applies. Its row space is that of the inputs' least directions, its column space is random.

    Attributes:
        texts: A file with a text on each line, like those that the model is for.
        size: Root mean square of what is added, as a share of the matrix's own.
    """

    name: ClassVar[str] = "padding"
    about: ClassVar[str] = "add a matrix of more than half the full rank in the input directions that cost least"
    preserves_function: ClassVar[bool] = False
    draws: ClassVar[bool] = True

    texts: Path = field(metadata=option("A file, a text on each line."))
    size: float = field(default=0.03, metadata=option("Root mean square as a share of the matrix's own."))

    def prepare(self, model: Checkpoint, seed: int) -> Change:
        """Run the model on the texts; see `Defence.prepare`."""

        def draw(W: Tensor, variances: Tensor, directions: Tensor, generator: torch.Generator) -> Tensor:
            rank = min(W.shape) // 2 + 1
            drawn = torch.randn(W.shape[0], rank, generator=generator, dtype=W.dtype)
            left: Tensor = torch.linalg.qr(drawn)[0]
            # All of its singular values are 1, so its norm is the root of its rank.
            return left @ directions[:, :rank].mT * float(self.size * W.norm() / rank**0.5)

        return _along_inputs(model, self.texts, seed, draw)


def _along_inputs(model: Checkpoint, texts: Path, seed: int, draw: Draw) -> Change:
    """A change of every linear weight that knows its inputs' directions."""
    linear, moments = linear_weights(model), input_moments(model.root, texts)
    places = find_places(model)
    seen = {name: moments[places[name].module] for name in linear if name in places and places[name].module in moments}
    if not seen:
        raise InputError(
            f"no linear layer of {model.spec} was seen at work", "its modules have other names in memory", "use noise"
        )

    def change(name: str, tensor: Tensor) -> Tensor:
        # A layer that the texts do not reach, a pooler that nothing reads for instance, stays as it is.
        transposed = linear[name] is Kind.TRANSPOSED
        W = tensor.double().mT if transposed else tensor.double()
        variances, directions = torch.linalg.eigh(seen[name])
        changed = W + draw(W, variances, directions, generator_of(seed, name))
        return (changed.mT if transposed else changed).to(tensor.dtype)

    return only(seen, change)
