"""Is a block of the third model's rows enough? The row spaces from these rows of all three, the rest from two models.

Rows of `W_i = W + M_i` show the whole row space of `M_i`. With the row spaces of two models known, their difference
`M_1 - M_2` splits on every row, so that the third model need not be fetched whole. What is lost: the third model's
share in averaging the storage noise, and the row spaces are known from fewer rows. Where they nearly coincide, as those
of LoRAs trained from one seed, the whole third model lets the column spaces decide, and a block of rows does not.

Expected, to be worth an option: the error of a block of a quarter of the rows at most 0.3 (a factor of 2) above that of
all three models, on trained LoRAs too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean

import torch
from minilm import RANK, merged_models
from problems import random_problem, verdict
from torch import Tensor

from detune.checkpoints import open_checkpoint
from detune.demo.train import base_model
from detune.fitting.least_squares import w_step_given_rows
from detune.methods import Auto
from detune.metrics import w_error
from detune.problem import NotRecoverable, Stack

SHARES = (2, 4, 8, 16)
METHOD = Auto(lattice=None)


@dataclass(frozen=True)
class Case:
    """Matrices to recover.

    Attributes:
        name: What they are.
        stacks: For each, the base and three models, `(out, in)`, float32.
    """

    name: str
    stacks: tuple[tuple[Tensor, Tensor], ...]


def cases() -> Iterator[Case]:
    for shape, rank, decay in (((768, 768), 16, 0.0), ((768, 768), 64, 0.0), ((2048, 768), 16, 7.0)):
        problem = random_problem(*shape, rank, 3, decay=decay, relative_size=0.01)
        name = f"random {shape[0]}x{shape[1]}, r={rank}" + f", decaying to e^-{decay:.0f}" * bool(decay)
        yield Case(name, ((problem.W, problem.models),))
    base = open_checkpoint(base_model())
    models = [open_checkpoint(path) for path in merged_models(3)]
    names = [name for name in base.tensors if name.endswith(("query.weight", "value.weight"))]
    stacks = [(base.read(name), torch.stack([model.read(name) for model in models])) for name in names]
    yield Case(f"MiniLM 384x384, r={RANK}, trained, one seed", tuple(stacks))


def frugal(models: Tensor, share: int) -> Tensor:
    """`W_star` from two models and every `share`-th row of the third."""
    spaces = METHOD.solve(Stack.of(models[:, ::share], torch.float64))
    V = [torch.linalg.qr(M_i.right.double())[0] for M_i in spaces.deltas[:2]]
    return w_step_given_rows(Stack.of(models[:2], torch.float64), V).weight


def with_true_spaces(W: Tensor, models: Tensor) -> Tensor:
    """Two models with row spaces that no rows have to tell: the best that they could give."""
    ranks = [M_i.rank for M_i in METHOD.solve(Stack.of(models)).deltas]
    spaces = [torch.linalg.svd(W_i.double() - W.double())[2] for W_i in models[:2]]
    V = [Vh[:r].mT for Vh, r in zip(spaces, ranks, strict=False)]
    return w_step_given_rows(Stack.of(models[:2], torch.float64), V).weight


def mean_error(case: Case, share: int | None) -> float | None:
    """Mean W-Error; None where the method does not apply to a matrix."""
    try:
        answers = [
            METHOD.solve(Stack.of(models)).weight if share is None else frugal(models, share)
            for _, models in case.stacks
        ]
    except NotRecoverable:
        return None
    # As it would be stored.
    return fmean(w_error(answer.float(), W) for answer, (W, _) in zip(answers, case.stacks, strict=True))


def main() -> None:
    torch.set_num_threads(1)
    print("float32 merges, 3 models; mean W-Error, lower is better")
    shares = "".join(f"{f'1/{share}':>9}" for share in SHARES)
    print(f"{'rows of the third model':45} {'all':>8}{shares} {'none, true row spaces':>22}")
    worst = 0.0
    for case in cases():
        whole = mean_error(case, None)
        parts = {share: mean_error(case, share) for share in SHARES}
        line = "".join(f"{'none' if part is None else f'{part:.2f}':>9}" for part in parts.values())
        known = fmean(w_error(with_true_spaces(W, models).float(), W) for W, models in case.stacks)
        print(f"{case.name:45} {whole:8.2f}{line} {known:22.2f}")
        worst = max(worst, float("inf") if parts[4] is None else parts[4] - whole)
    print(verdict("largest excess with a quarter of the rows", worst, 0.3))


if __name__ == "__main__":
    main()
