"""Releases in fp8 whose dither is known, against what could be had without it and at best."""

from dataclasses import replace

import pytest
import torch

from detune.attacks.cells import CellEntries, within_cells
from detune.attacks.known_dither import KnownDither, undithered
from detune.attacks.measured_noise import denoised
from detune.defences import Fp8, defend
from detune.errors import InputError
from detune.lattice.estimate import Estimate
from detune.methods import Mean
from detune.metrics import w_error
from detune.numerics.dithered_fp8 import fp8_interval, fp8_stochastic, named_dither
from detune.problem import Stack
from tests.cases import normal, seeded
from tests.families import plain_family, tree

OUT, IN, RANK, N, NAME = 96, 128, 4, 5, "layer.0.weight"


def problem(seed: int, size: float, grid: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, Stack]:
    """A base of the size of a model's weights, deltas of a share of it, and the releases."""
    generator = seeded(seed)
    W = 0.05 * normal(generator, OUT, IN)
    deltas = torch.stack(
        [0.05 * size * normal(generator, OUT, RANK) @ normal(generator, RANK, IN) / RANK**0.5 for _ in range(N)]
    )
    dither = named_dither(NAME, W.shape)
    return W, deltas, Stack.of([fp8_stochastic((W + M_i).float(), dither, grid).float() for M_i in deltas])


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("grid", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("size", [0.02, 0.2])
def test_it_is_closer_than_taking_the_dither_for_noise(seed, grid, size):
    W, deltas, stack = problem(seed, size, grid)
    found = w_error(undithered(NAME, stack), W)
    assert found < w_error(denoised(stack), W) - 0.2
    assert found < w_error(Mean().solve(stack).weight, W) - 0.3
    cells = [fp8_interval(W_i, named_dither(NAME, W.shape), grid) for W_i in stack.matrices]
    low, high = torch.stack([cell.low for cell in cells]), torch.stack([cell.high for cell in cells])
    nothing = Estimate.nothing((OUT, IN), 1e-14)
    known = [replace(nothing, left=M_i.float(), right=torch.eye(IN)) for M_i in deltas]
    least = w_error(within_cells(CellEntries(low, high), known), W)
    assert least < found < least + 0.25


def test_another_name_is_of_no_help():
    W, _, stack = problem(0, 0.02, torch.float8_e4m3fn)
    assert w_error(undithered("another", stack), W) > w_error(undithered(NAME, stack), W) + 0.3


def test_in_files(tmp_path):
    family = plain_family(tmp_path / "family", n=3)
    releases = [tmp_path / f"release-{i}" for i in range(3)]
    for model, release in zip(family.models, releases, strict=True):
        defend(Fp8(), model, release)
    KnownDither().run(releases, tmp_path / "out")
    assert set(tree(tmp_path / "out")) == set(tree(releases[0]))


def test_releases_that_are_not_in_fp8_are_refused(tmp_path):
    family = plain_family(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(InputError, match=r"tensor 'layer.0.weight' is not in fp8; .* try the attack denoise"):
        KnownDither().run(family.models, tmp_path / "out")
    assert tree(tmp_path) == before
