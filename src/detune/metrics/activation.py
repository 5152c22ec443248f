"""The activation distance: how differently two models see the same inputs."""

from collections.abc import Sequence
from statistics import fmean

from torch import Tensor

from detune.errors import InputError
from detune.metrics.cosine import cosine_distances

__all__ = ["activation_distance"]


def activation_distance(original: Sequence[Tensor], recovered: Sequence[Tensor]) -> float:
    """Mean cosine distance of two models' hidden states, over inputs and then over layers.

        mean_l mean_i (1 - cos(h_l(x_i), h'_l(x_i)))

    The states of all positions of an input are one vector. `cosine_distances` says how tiny distances survive.

    Args:
        original: States of the original model: for each layer, shape (inputs, ...), any float dtype.
        recovered: States of the recovered model on the same inputs, of the same shapes.

    Returns:
        The distance in [0, 2]; 0 where all states are equal.

    Raises:
        InputError: The two have other layers or shapes, or there are none.

    Example:
        >>> import torch
        >>> activation_distance([torch.eye(2)], [torch.eye(2).flip(1)])
        1.0

    Reference:
        Horwitz, Kahana & Hoshen 2024 (arXiv 2402.10208), Section 5: what ViT is compared by.
    """
    shapes = [[tuple(state.shape) for state in states] for states in (original, recovered)]
    if shapes[0] != shapes[1] or any(len(shape) < 2 or 0 in shape for shape in shapes[0]) or not original:
        raise InputError(
            "hidden states of two models cannot be compared",
            f"got shapes {shapes[0]} and {shapes[1]}, expected the same (inputs, ...) for each layer, none empty",
            "run both models on the same inputs",
        )
    return fmean(float(cosine_distances(u, v).mean()) for u, v in zip(original, recovered, strict=True))
