"""One minus the cosine of two vectors, without the cancellation."""

from torch import Tensor

__all__ = ["cosine_distances"]


def cosine_distances(first: Tensor, second: Tensor) -> Tensor:
    """Compute `1 - cos(u_i, v_i)` of each pair of rows, as half the square of a chord.

        1 - cos(u, v) = |u/|u| - v/|v||² / 2

    In float64 the left side is a multiple of 1e-16, and may come out negative. On the right the rounding errors are
    squared, so that distances down to 1e-31 keep a meaning, and equal rows are at distance 0.

    Args:
        first: Shape (n, ...), any float dtype; flattened to (n, width).
        second: The same shape.

    Returns:
        Shape (n,), float64, in [0, 2]. A row of zeros has no direction: it is at distance 0 from another and 1 from
        anything else.
    """
    u, v = first.detach().double().flatten(1), second.detach().double().flatten(1)
    u_norms, v_norms = u.norm(dim=1, keepdim=True), v.norm(dim=1, keepdim=True)
    u_is_zero, v_is_zero = u_norms == 0, v_norms == 0
    chords = u / u_norms.masked_fill(u_is_zero, 1.0) - v / v_norms.masked_fill(v_is_zero, 1.0)
    distances: Tensor = chords.square().sum(dim=1) / 2
    return distances.masked_fill((u_is_zero ^ v_is_zero).squeeze(1), 1.0)
