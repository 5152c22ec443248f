"""Traces of linear maps that are known by their action alone."""

from collections.abc import Callable

import torch
from torch import Tensor


def probe(
    measure: Callable[[Tensor], Tensor],
    shape: tuple[int, int],
    probes: int,
    generator: torch.Generator,
    like: Tensor,
    settled: Callable[[Tensor], bool] | None = None,
) -> Tensor:
    """Measure random sign matrices z, whose quadratic forms have traces for means: `E z^T B z = tr(B)`.

    Args:
        measure: Takes z to any number of figures, `(k,)`.
        shape: The shape of z.
        probes: How many z, at most.
        generator: Draws them.
        like: A tensor of the dtype and on the device that z is wanted in.
        settled: Takes the figures so far, `(used, k)`; True ends the probing.

    Returns:
        The figures of each probe, `(used, k)`, float64.

    Reference:
        Hutchinson 1990 (doi 10.1080/03610919008812866).
    """
    figures: list[Tensor] = []
    while len(figures) < probes and not (settled and figures and settled(torch.stack(figures))):
        z = torch.randint(0, 2, shape, generator=generator, device=like.device).to(like.dtype) * 2 - 1
        figures.append(measure(z).double())
    return torch.stack(figures)
