"""A truncated base and one whole fine-tune: what was taken out follows from both."""

import pytest
import torch

from detune.attacks.complete import Complete, completed
from detune.checkpoints import open_checkpoint
from detune.defences import LoREnc, defend
from detune.methods import Mean
from detune.metrics import w_error
from detune.problem import Stack
from detune.recovery.compare import compare
from tests.cases import normal, seeded
from tests.families import plain_family


def problem(seed: int, shape: tuple[int, int], k: int = 8, r: int = 4, n: int = 1) -> tuple[torch.Tensor, Stack]:
    """A base whose spectrum falls, without its k largest singular values, and n fine-tunes of the whole."""
    generator = seeded(seed)
    U, _, Vh = torch.linalg.svd(normal(generator, *shape), full_matrices=False)
    S = torch.linspace(0, -2, min(shape), dtype=torch.float64).exp()
    W = U * S @ Vh
    public = (U[:, k:] * S[k:] @ Vh[k:]).float()
    tuned = [(W + 0.02 * normal(generator, shape[0], r) @ normal(generator, r, shape[1])).float() for _ in range(n)]
    return W, Stack.of([public, *tuned])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [(64, 64), (96, 48), (48, 96)])
def test_one_whole_model_is_enough(seed, shape):
    W, stack = problem(seed, shape)
    assert w_error(stack.matrices[0], W) > -4
    assert w_error(completed(stack), W) < -13.5


def test_more_of_them_average_the_rounding():
    one, many = (
        sum(w_error(completed(stack), W) for W, stack in (problem(seed, (64, 64), n=n) for seed in range(5)))
        for n in (1, 4)
    )
    assert many < one


@pytest.mark.parametrize("r", [24, 60])
def test_adapters_of_more_rank_than_the_rest_of_the_base_leave_a_part(r):
    """The last block, 40x40, has no more rank than 40: with 24 it tells all, with 60 it cannot."""
    W, stack = problem(0, (64, 64), k=24, r=r)
    error = w_error(completed(stack), W)
    assert error < -12 if r == 24 else error > -6


def test_a_base_that_nothing_was_taken_out_of_stays():
    W, stack = problem(0, (64, 64), k=0)
    assert torch.equal(completed(stack), stack.matrices[0].double())
    assert w_error(completed(stack), W) < w_error(Mean().solve(stack).weight, W)


def test_LoREnc_is_undone_in_files(tmp_path):
    family = plain_family(tmp_path / "family")
    defend(LoREnc(family.base, rank=3), family.base, tmp_path / "public", 0)
    defend(LoREnc(family.base, rank=3, adapter=True), family.models[0], tmp_path / "whole", 1)
    Complete().run([tmp_path / "public", tmp_path / "whole"], tmp_path / "out")
    with open_checkpoint(family.base) as base:
        matrices = [name for name, info in base.tensors.items() if len(info.shape) == 2]
    errors = {row.name: row.w_error for row in compare(tmp_path / "out", family.base).rows}
    assert max(errors[name] for name in matrices) < -12.5
