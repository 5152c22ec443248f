"""What can be gained over the average of quantised models, by an oracle that knows the adapters' spectra.

Three LoRAs of one seed on all-MiniLM-L6-v2, as `forms.py` trains them (its cache is used), in GGUF's Q8_0. The base is
the mean of the models less the mean of the adapters: its error is that of the mean of the noise and that of what is
known of the adapters' mean. The second is given by the Bayesian Cramér-Rao bound (Van Trees 1968) at the true adapters,

    M_i = L_i R_i^T ,  a row of [L_1 ... L_n] ~ N(0, K_L) ,  a row of [R_1 ... R_n] ~ N(0, K_R) ,

where both covariances are the true ones, which no method knows. An oracle that knows the R_i themselves is beside it,
one that knows nothing of the L_i besides, and one to whom the noise of each block is told instead of its mean.

    python benchmarks/noise_oracle.py --steps 24
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import torch
from safetensors.torch import load_file
from torch import Tensor

from detune.checkpoints import open_checkpoint
from detune.demo.train import base_model

CACHE = Path(__file__).parent / ".cache"
CHANGED = ("query.weight", "value.weight")
BLOCK, RANK, MODELS = 32, 16, 3
# More of conjugate gradients changes no figure.
STEPS, SMALL = 400, 1e-6
# A prior so wide that it says nothing.
WIDE = 1e4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--every", type=int, default=4, metavar="N", help="look at one matrix of N")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = CACHE / f"forms-{options.steps}"
    models = [load_file(path / "model.safetensors") for path in sorted(folder.glob("merged-*"))[:MODELS]]
    gains: dict[str, list[float]] = {}
    with open_checkpoint(base_model()) as base:
        for name in [name for name in base.tensors if name.endswith(CHANGED)][:: options.every]:
            W = base.read(name).double()
            for oracle, gain in gains_of(W, [model[name].double() - W for model in models]).items():
                gains.setdefault(oracle, []).append(gain)
    print(f"{'the oracle knows':44} {'better than the average by':>26}")
    for oracle, each in gains.items():
        print(f"{oracle:44} {fmean(each):26.2f}")


def gains_of(W: Tensor, deltas: list[Tensor]) -> dict[str, float]:
    """How much of W-Error each oracle gains over the mean of the quantised models."""
    stored, steps = zip(*(q8_0(W + M_i) for M_i in deltas), strict=True)
    average = float((torch.stack(stored).mean(dim=0) - W).square().mean())
    variances = torch.stack(steps).square() / 12
    even = torch.full_like(variances, float(variances.mean()))
    split = [torch.linalg.svd(M_i) for M_i in deltas]
    L = [s.U[:, :RANK] * s.S[:RANK].sqrt() for s in split]
    R = [s.Vh[:RANK].mT * s.S[:RANK].sqrt() for s in split]
    own = torch.block_diag(*[torch.ones(RANK, RANK, dtype=W.dtype)] * MODELS)
    K_L, K_R = (torch.cat(F, dim=1).mT @ torch.cat(F, dim=1) / len(F[0]) for F in (L, R))
    errors = {
        "all adapters": float((1 / (1 / even).sum(dim=0)).mean()),
        "their row spaces and K_L": bound(L, R, even, K_L * own, 0 * K_R),
        "their row spaces": bound(L, R, even, WIDE * K_L * own, 0 * K_R),
        "K_L, and K_R over all models": bound(L, R, even, K_L * own, K_R),
        "K_L over all models, and K_R": bound(L, R, even, K_L, K_R * own),
        "both over all models": bound(L, R, even, K_L, K_R),
        "both over all models, and each block's noise": bound(L, R, variances, K_L, K_R),
    }
    return {oracle: math.log10(average / error) for oracle, error in errors.items()}


def q8_0(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix in Q8_0 and back, and the distance of levels at each entry."""
    blocks = matrix.reshape(-1, BLOCK)
    step = (blocks.abs().amax(dim=1, keepdim=True) / 127).half().double()
    return ((blocks / step).round() * step).view(matrix.shape), step.expand_as(blocks).reshape(matrix.shape)


def bound(L: list[Tensor], R: list[Tensor], variances: Tensor, K_L: Tensor, K_R: Tensor) -> float:
    """Mean square error of the base by the bound, from one sample: noise and prior are drawn, and the equations solved.

    Args:
        L: Left factors, `(out, r)` each.
        R: Right factors, `(in, r)` each.
        variances: Of the noise, `(n, out, in)`.
        K_L: Covariance of a row of the left factors, `(n r, n r)`.
        K_R: Of the right factors.
    """
    precision, roots = 1 / variances, (root(K_L), root(K_R))
    total = precision.sum(dim=0)

    def changes(x: list[Tensor]) -> Tensor:
        dL, dR = (each @ half for each, half in zip(x, roots, strict=True))
        parts = zip(dL.split(RANK, dim=1), dR.split(RANK, dim=1), L, R, strict=True)
        return torch.stack([dL_i @ R_i.mT + L_i @ dR_i.mT for dL_i, dR_i, L_i, R_i in parts])

    def back(D: Tensor) -> list[Tensor]:
        """The adjoint, after what a change of the base would explain has been taken off."""
        E = precision * (D - (precision * D).sum(dim=0) / total)
        sides = (
            [E_i @ R_i for E_i, R_i in zip(E, R, strict=True)],
            [E_i.mT @ L_i for E_i, L_i in zip(E, L, strict=True)],
        )
        return [torch.cat(side, dim=1) @ half for side, half in zip(sides, roots, strict=True)]

    generator = torch.Generator().manual_seed(0)

    def drawn(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype)

    wanted = [each + drawn(each) for each in back(drawn(variances) * variances.sqrt())]
    x = solved(lambda y: [y_k + b_k for y_k, b_k in zip(y, back(changes(y)), strict=True)], wanted)
    common = (precision * changes(x)).sum(dim=0) / total
    return float((1 / total).mean() + common.square().mean())


def solved(apply: Callable[[list[Tensor]], list[Tensor]], wanted: list[Tensor]) -> list[Tensor]:
    """Conjugate gradients."""
    x, left, towards = [torch.zeros_like(each) for each in wanted], wanted, wanted
    first = now = inner(left, left)
    for _ in range(STEPS):
        applied = apply(towards)
        length = now / inner(towards, applied)
        x = [a + length * b for a, b in zip(x, towards, strict=True)]
        left = [a - length * b for a, b in zip(left, applied, strict=True)]
        before, now = now, inner(left, left)
        if now < SMALL * first:
            break
        towards = [a + now / before * b for a, b in zip(left, towards, strict=True)]
    return x


def inner(one: list[Tensor], other: list[Tensor]) -> float:
    return sum(float((a * b).sum()) for a, b in zip(one, other, strict=True))


def root(K: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(K)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.mT


if __name__ == "__main__":
    main()
