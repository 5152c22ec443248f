"""Quantised releases: levels read off them, and the base between their cells, against what could be had at best."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from detune.attacks.cells import CellEntries, Cells, between_levels, within_cells
from detune.attacks.measured_noise import denoised
from detune.checkpoints import open_checkpoint
from detune.compatibility.quantisation_levels import levels_of
from detune.defences import Int8, Nf4
from detune.errors import InputError
from detune.lattice.estimate import Estimate
from detune.methods import Mean
from detune.metrics import w_error
from detune.problem import Stack
from tests.cases import normal, seeded
from tests.families import plain_family, tree

OUT, IN, RANK, N = 96, 128, 4, 5
NAME = "layer.0.weight"
DEFENCES = {"int8": Int8(), "nf4": Nf4(), "nf4, blocks of 32": Nf4(block=32)}


@pytest.fixture(scope="module")
def quantise(tmp_path_factory):
    """A defence's change of one matrix; what is a linear layer, a checkpoint says."""
    model = plain_family(tmp_path_factory.mktemp("family")).base
    with open_checkpoint(model) as opened:
        changes = {name: defence.prepare(opened, 0) for name, defence in DEFENCES.items()}
    return lambda name, matrix: changes[name](NAME, matrix)


def problem(seed: int, size: float, shared: float = 0.0) -> tuple[Tensor, Tensor]:
    """A base, and deltas with entries of `size` beside its own of 1; rows of all share the part `shared`."""
    generator = seeded(seed)
    W = normal(generator, OUT, IN)
    common = normal(generator, RANK, IN)
    deltas = []
    for _ in range(N):
        A = shared * common + (1 - shared**2) ** 0.5 * normal(generator, RANK, IN)
        deltas.append(size * normal(generator, OUT, RANK) @ A / RANK**0.5)
    return W, torch.stack(deltas)


def known(deltas: Tensor) -> list[Estimate]:
    """Estimates that are the deltas themselves, `(n, out, in)`, to 1e-7."""
    nothing = Estimate.nothing((deltas.shape[1], deltas.shape[2]), 1e-14)
    return [replace(nothing, left=M_i.float(), right=torch.eye(deltas.shape[2])) for M_i in deltas]


@pytest.mark.parametrize("name", DEFENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(96, 128), (31, 70)])
class TestLevels:
    def test_every_entry_was_in_its_cell(self, quantise, name, dtype, shape):
        W = normal(seeded(1), *shape).float()
        cells = levels_of(quantise(name, W).to(dtype))
        assert bool((cells.low <= W).all())
        assert bool((cells.high >= W).all())

    def test_cells_are_no_wider_than_levels_are_apart(self, quantise, name, dtype, shape):
        W = normal(seeded(2), *shape).float()
        quantised = quantise(name, W)
        cells = levels_of(quantised.to(dtype))
        rms = float((quantised - W).square().mean().sqrt())
        # In bf16 a level may be off by as much as int8's are apart.
        room = 1.1 if dtype is torch.float32 else 1.6
        assert float((cells.high - cells.low).square().mean().sqrt()) / 12**0.5 < room * rms

    def test_a_matrix_that_is_not_quantised_is_refused(self, name, dtype, shape):
        matrix = normal(seeded(3), *shape).to(dtype)
        with pytest.raises(InputError, match=rf"{shape[0]}x{shape[1]} is not quantised; .* try the attack denoise"):
            levels_of(matrix)


def test_channels_may_be_columns(quantise):
    W = normal(seeded(4), 96, 128).float()
    cells, turned = levels_of(quantise("int8", W.mT).mT), levels_of(quantise("int8", W.mT))
    torch.testing.assert_close(cells.low, turned.low.mT)
    torch.testing.assert_close(cells.high, turned.high.mT)


def test_the_largest_weight_of_a_channel_is_known(quantise):
    W = normal(seeded(5), 96, 128).float()
    cells = levels_of(quantise("int8", W))
    known = cells.high - cells.low < 1e-5
    assert bool((W.abs() == W.abs().amax(dim=1, keepdim=True))[known].all())
    assert int(known.sum()) > 0.8 * len(W)
    torch.testing.assert_close(((cells.low + cells.high) / 2)[known], W.double()[known], rtol=0, atol=1e-6)


class TestAttack:
    @pytest.mark.parametrize("seed", range(2))
    @pytest.mark.parametrize("shared", [0.0, 0.95])
    @pytest.mark.parametrize(("name", "size"), [("int8", 0.02), ("int8", 0.2), ("nf4", 0.1)])
    def test_it_is_closer_than_taking_cells_for_noise(self, quantise, name, size, shared, seed):
        W, deltas = problem(seed, size, shared)
        models = [quantise(name, (W + M_i).float()) for M_i in deltas]
        stack = Stack.of(models)
        found = w_error(between_levels(stack), W)
        assert found < w_error(denoised(stack), W) - 0.08
        assert found < w_error(Mean().solve(stack).weight, W) - 0.25
        cells = [levels_of(model) for model in models]
        low, high = torch.stack([cell.low for cell in cells]), torch.stack([cell.high for cell in cells])
        least = w_error(within_cells(CellEntries(low, high), known(deltas)), W)
        assert least < found < least + (0.15 if not shared else 0.35)

    def test_releases_that_hardly_differ(self, quantise):
        """Nothing of the deltas shows, and W is in the middle of its cell."""
        W, deltas = problem(0, 1e-5)
        models = [quantise("nf4", (W + M_i).float()) for M_i in deltas]
        assert w_error(between_levels(Stack.of(models)), W) < w_error(models[0], W)

    def test_releases_that_are_not_quantised_are_refused(self, tmp_path):
        family = plain_family(tmp_path)
        before = tree(tmp_path)
        with pytest.raises(InputError, match=r"is not quantised; .* try the attack denoise"):
            Cells().run(family.models, tmp_path / "out")
        assert tree(tmp_path) == before


class TestWithinCells:
    def test_without_doubt_it_is_what_the_cells_have_in_common(self):
        W = 100 * normal(seeded(0), 4, 50)
        low = W + torch.tensor([-0.5, -0.1, -0.8], dtype=torch.float64)[:, None, None]
        m = normal(seeded(1), 3, 4, 50)
        found = within_cells(CellEntries(low + m, low + m + 1), known(m))
        torch.testing.assert_close(found, W + 0.05, rtol=0, atol=1e-3)

    def test_in_a_wide_cell_small_weights_are_likelier(self):
        generator = seeded(0)
        W = normal(generator, 4, 400)
        low, high = torch.where(W > 0, 0.0, -8.0)[None], torch.where(W > 0, 8.0, 0.0)[None]
        found = within_cells(CellEntries(low, high), known(torch.zeros_like(low)))
        assert float((found - W).square().mean()) < 0.5 * float(((low + high)[0] / 2 - W).square().mean())
