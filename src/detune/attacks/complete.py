"""A base without its dominant spectrum, and a model that has it: the missing part follows from both.

A base W' = W - C lacks a part C that lies between the null spaces of W' on both sides. With projectors P and Q onto
these, C = P C Q, the difference to a whole fine-tune is

    D = W_1 - W' = C + M ,    P D (I-Q) = P M (I-Q),    (I-P) D Q = (I-P) M Q,    (I-P) D (I-Q) = (I-P) M (I-Q) :

three of four blocks show M alone. A matrix of low rank follows from these where the last has its rank:

    P M Q = (P M (I-Q)) ((I-P) M (I-Q))^+ ((I-P) M Q) ,

so C = P D Q - P M Q. One whole model is enough, whatever C is.

Reference for the last identity: Nakatsukasa, "Fast and stable randomized low-rank matrix approximation", 2020 (arXiv
2009.11392), generalised Nyström, exact for matrices of that rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from detune.attacks.rebuild import rebuild
from detune.problem import Stack

__all__ = ["Complete", "completed"]

# A singular value counts from this multiple of what storing the matrices makes of zero.
OVER_NOISE = 4.0


@dataclass(frozen=True)
class Complete:
    """Find the null spaces of the first release, and fill them from the others.

    The first release is the truncated base, as LoREnc makes it public; each of the others is a whole fine-tune, as an
    authorised user has it. Several are averaged.
    """

    name: ClassVar[str] = "complete"
    about: ClassVar[str] = "completes a base without its dominant spectrum from one whole fine-tune; knows LoREnc"
    min_models: ClassVar[int] = 2

    def run(self, models: Sequence[Path], out: Path) -> None:
        """Recover; see `Attack.run`."""
        rebuild(models, out, self.min_models, lambda name, stack: completed(stack))


def completed(stack: Stack) -> Tensor:
    """Complete one matrix from whole fine-tunes.

    Args:
        stack: The truncated base, then whole fine-tunes.

    Returns:
        The base, `(out, in)`, float64: the truncated one where nothing was taken out of it.
    """
    public, *whole = (W_i.double() for W_i in stack.matrices)
    floor = OVER_NOISE * float(stack.noise_norm(0, stack.shape[0]))
    U, S, Vh = torch.linalg.svd(public)
    rank = int(S.gt(floor).sum())
    if rank == len(S):
        return public
    # On the longer side there is no telling which of the null space was taken out: all of it may have been.
    left, right = (U[:, rank:], U[:, :rank]), (Vh[rank:].mT, Vh[:rank].mT)
    parts = [_missing(W_1 - public, left, right, floor) for W_1 in whole]
    C: Tensor = left[0] @ torch.stack(parts).mean(dim=0) @ right[0].mT
    return public + C


def _missing(D: Tensor, left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], floor: float) -> Tensor:
    """C between the bases of the null spaces; each side's is the first of its two."""
    (P, P_rest), (Q, Q_rest) = left, right
    U, S, Vh = torch.linalg.svd(P_rest.mT @ D @ Q_rest, full_matrices=False)
    r = int(S.gt(floor).sum())
    delta = (P.mT @ D @ (Q_rest @ Vh[:r].mT)) / S[:r] @ (U[:, :r].mT @ P_rest.mT @ D @ Q)
    missing: Tensor = P.mT @ D @ Q - delta
    return missing
