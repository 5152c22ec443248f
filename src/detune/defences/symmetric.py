"""The core of defences by symmetry: a frame drawn for every layer, and its action on each tensor."""

import hashlib
import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from detune.checkpoints import Checkpoint, round_to
from detune.defences.base import Change
from detune.errors import InputError
from detune.symmetries import Actions, Attention, HeadFrame, Layer, act, complex_blocks, read_layers

__all__ = ["Draw", "change_of", "check_spread", "complex_numbers", "orthogonal", "scaled_channels", "scales"]

LARGEST_SPREAD = 2.0**10

Draw = Callable[[Layer, Callable[[str], torch.Generator]], Actions]
"""From a layer, and a source of random numbers for each purpose by its name, to what is done to the layer's tensors."""


def change_of(model: Checkpoint, seed: int, draw: Draw) -> Change:
    """The change of a model by a frame for each layer.

    Each layer's numbers are drawn from the seed and its name, when one of its tensors comes along; so any order of
    tensors gives the same model, and no more than a few layers' frames are held.

    Args:
        model: The fine-tune.
        seed: Seed of all frames.
        draw: The frame of a layer.

    Returns:
        See `Change`: numbers that are only moved keep their bits, others are computed in float64 and rounded once.

    Raises:
        InputError: The architecture is not known, or the tensors are not those of the config.
    """
    layers = read_layers(model.root, {name: info.shape for name, info in model.tensors.items()})
    owners = {name: layer for layer in layers for name in model.tensors if name.startswith(f"{layer.name}.")}

    @lru_cache(maxsize=2)
    def actions_of(layer: Layer) -> Actions:
        return draw(layer, lambda purpose: _generator(seed, layer.name, purpose))

    def change(name: str, tensor: Tensor) -> Tensor:
        actions = actions_of(owners[name]).get(name, ()) if name in owners else ()
        if not actions:
            return tensor
        if not tensor.is_floating_point():
            raise InputError(
                f"tensor {name!r} of {model.spec} is stored as {tensor.dtype}", "expected floats", "dequantise it first"
            )
        return round_to(act(actions, tensor), tensor.dtype)

    return change


def orthogonal(heads: Attention, generator: torch.Generator) -> Tensor:
    """Uniform over the orthogonal matrices, one for each group (Mezzadri 2007, arXiv math-ph/0609050)."""
    gaussian = torch.randn(heads.groups, heads.width, heads.width, generator=generator, dtype=torch.float64)
    Q, R = torch.linalg.qr(gaussian)
    signs: Tensor = R.diagonal(dim1=1, dim2=2).sign()
    signed: Tensor = Q * signs.unsqueeze(1)
    return signed


def complex_numbers(heads: Attention, generator: torch.Generator, sizes: Tensor | None = None) -> Tensor:
    """A complex number for each rotary frequency of each group, of any angle.

    Args:
        heads: With rotary positions.
        generator: Draws the angles.
        sizes: The absolute values, `(groups, width / 2)`, float64; None makes them 1.

    Returns:
        Their matrices, see `complex_blocks`.
    """
    angles = 2 * torch.pi * torch.rand(heads.groups, heads.width // 2, generator=generator, dtype=torch.float64)
    return complex_blocks(torch.polar(torch.ones_like(angles) if sizes is None else sizes, angles))


def scales(spread: float, generator: torch.Generator, *shape: int, exact: bool = False) -> Tensor:
    """Numbers between `1 / spread` and `spread`, uniform in their logarithm, float64; exact ones are powers of two."""
    exponents = (2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1) * math.log2(spread)
    return torch.exp2(exponents.round() if exact else exponents)


def scaled_channels(
    heads: Attention, spread: float, generator: Callable[[str], torch.Generator], *, exact: bool = False
) -> HeadFrame:
    """A scale for each channel of keys and of values; queries and the output have the inverse.

    Args:
        heads: Their widths.
        spread: See `scales`.
        generator: Draws for "keys" and "values".
        exact: See `scales`.
    """
    keys = scales(spread, generator("keys"), heads.groups, heads.width // (1 + heads.rotary), exact=exact)
    # Two channels that rotary positions turn into one another have one scale.
    keys = keys.repeat(1, 1 + heads.rotary)
    values = scales(spread, generator("values"), heads.groups, heads.width, exact=exact)
    return HeadFrame(keys=torch.diag_embed(keys), values=torch.diag_embed(values))


def check_spread(spread: float) -> None:
    """Refuse scales that are none, or that cost a third of float32's digits.

    Raises:
        InputError: The spread is 1 or less, or more than 1024.
    """
    if not 1 < spread <= LARGEST_SPREAD:
        raise InputError(f"scales up to {spread}", "expected more than 1 and at most 1024", "4 is the default")


def _generator(*key: object) -> torch.Generator:
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
