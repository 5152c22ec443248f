"""Undetected directions: the strength up to which a direction of an adapter escapes notice.

A direction `s u v^T` of `M_i` that is not in its recovered ranks goes into W and into those deltas whose row
spaces hold v (or whose column spaces hold u): then W is off by it, and the misfit hardly shows it. With u outside
all column spaces, what remains of it in the data is

    s^2 rho^2,    rho^2 = v^T (I - R_i G^-1 R_i) v,    G = sum_j R_j,

the Schur complement of least squares over W and the other factors, and W moves by `s u (G^-1 R_i v)^T`. It is noticed
if `s rho` is above the largest singular value of noise. LoRAs of one seed have small rho: their row spaces nearly
coincide.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from detune.fitting.normal_operator import NormalOperator

# A direction of which at least half shows in the data is no undetected one, by definition.
HALF = 0.5
# The smallest share of a direction that float64 tells from none: fifty times its precision (derived).
SMALLEST = 1e-14


@dataclass(frozen=True)
class UndetectedDirections:
    """Directions of one model, on one side, that hardly show.

    Attributes:
        model: Which.
        columns: Whether these are column directions.
        strengths: Singular values that they could have unnoticed, descending.
        moves: By how much W moves for each, times their own singular value.
    """

    model: int
    columns: bool
    strengths: Tensor
    moves: Tensor


def undetected_directions(
    operator: NormalOperator, noise_norm: float, least: Sequence[float] | None = None
) -> tuple[UndetectedDirections, ...]:
    """Find what could have escaped, model by model, first on the rows' side and then on the columns'.

    Args:
        operator: The operator at the recovered spaces, float64.
        noise_norm: Singular value from which a direction is told from noise.
        least: For each model, the singular value below which nothing is asked: models and sides where nothing can be
            stronger are left out, which is quick to see. None asks for all.
    """
    found = []
    n = len(operator.a)
    rows, columns = (
        (operator.spectrum_V, operator.inverse_G_V, operator.b),
        (operator.spectrum_U, operator.inverse_G_U, operator.a),
    )
    for is_columns, (spectrum, inverse, coordinates) in ((False, rows), (True, columns)):
        # The least eigenvalue of G: no part of the inverse exceeds the whole.
        least_shown = n - float(spectrum[-1]) if len(spectrum) else float(n)
        for i, c_i in enumerate(coordinates):
            if least is not None and least_shown > 1 and (1 - 1 / least_shown) * least[i] ** 2 >= noise_norm**2:
                continue
            free = torch.eye(len(inverse), dtype=inverse.dtype, device=inverse.device) - c_i @ c_i.mT
            shared, vectors = torch.linalg.eigh(free @ inverse @ free)
            hard = shared > HALF
            rho = (1 - shared[hard]).clamp(min=SMALLEST).sqrt()
            moves = torch.linalg.vector_norm(inverse @ vectors[:, hard], dim=0)
            order = rho.argsort()
            found.append(UndetectedDirections(i, is_columns, noise_norm / rho[order], moves[order]))
    return tuple(found)
