from functools import partial

import pytest
import torch

from detune.attacks.groups import Complex, Invertible, Orthogonal
from detune.attacks.procrustes import FALLS, Side, fit, stay
from detune.symmetries import complex_blocks
from tests.cases import normal, seeded

HEADS, WIDTH, OTHER, RANK = 8, 8, 64, 2
ROWS = HEADS * WIDTH


def orthogonal(generator):
    return torch.linalg.qr(normal(generator, HEADS, WIDTH, WIDTH))[0]


def invertible(generator):
    scales = torch.exp2(4 * torch.rand(HEADS, WIDTH, generator=generator, dtype=torch.float64) - 2)
    return orthogonal(generator) * scales[:, None, :] @ orthogonal(generator)


def complex_numbers(generator):
    numbers = torch.complex(normal(generator, HEADS, WIDTH // 2), normal(generator, HEADS, WIDTH // 2))
    return complex_blocks(numbers + 0.2 * numbers / numbers.abs())


GROUPS = {
    "orthogonal": (Orthogonal(), orthogonal),
    "complex": (Complex(), complex_numbers),
    "invertible": (Invertible(), invertible),
}


def low_rank(generator, rank=RANK, size=0.4):
    change = normal(generator, ROWS, rank) @ normal(generator, rank, OTHER)
    return size * change / change.std()


def problem(draw, seed=0, dtype=torch.float32, change=low_rank):
    """Two releases of a layer that differ by a turn of each head and by adapters, and the turn."""
    generator = seeded(seed)
    A = draw(generator)
    big = torch.block_diag(*A)
    one, other = normal(generator, ROWS, OTHER), normal(generator, ROWS, OTHER)
    sources = [(matrix + change(generator)).to(dtype) for matrix in (one, other)]
    inverse = torch.linalg.inv(big).mT
    turned = [big @ (one + change(generator)), inverse @ (other + change(generator))]
    return A, [matrix.to(dtype) for matrix in turned], sources


def sides(targets, sources):
    return [
        Side.of(target, source, HEADS, WIDTH, is_dual=is_dual)
        for target, source, is_dual in zip(targets, sources, (False, True), strict=True)
    ]


@pytest.mark.parametrize("name", GROUPS)
class TestFit:
    def test_is_exact_in_spite_of_the_adapters(self, name):
        group, draw = GROUPS[name]
        A, targets, sources = problem(draw)
        found = fit(sides(targets, sources), group)
        assert found.at_noise
        assert float((found.A - A).norm() / A.norm()) < 3e-8

    @pytest.mark.parametrize("seed", range(3))
    def test_adapters_of_a_rank_as_high_as_a_head_is_wide(self, name, seed):
        group, draw = GROUPS[name]
        A, targets, sources = problem(draw, seed, change=partial(low_rank, rank=WIDTH, size=1.0))
        found = fit(sides(targets, sources), group, fall=FALLS[1])
        assert found.at_noise
        assert float((found.A - A).norm() / A.norm()) < 6e-8

    def test_least_squares_alone_is_off_by_the_adapters(self, name):
        """The case is one: without the low rank taken out there would be nothing to see."""
        group, draw = GROUPS[name]
        A, targets, sources = problem(draw)
        once = fit(sides(targets, sources), group).A
        unrelated = problem(draw, change=lambda g: 0.4 * normal(g, ROWS, OTHER))
        blind = fit(sides(*unrelated[1:]), group)
        assert float((blind.A - unrelated[0]).norm() / A.norm()) > 1e-3 > float((once - A).norm() / A.norm())
        assert not blind.at_noise

    def test_the_more_precise_the_weights_the_more_precise_it_is(self, name):
        group, draw = GROUPS[name]
        errors = {}
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            A, targets, sources = problem(draw, dtype=dtype)
            errors[dtype] = float((fit(sides(targets, sources), group).A - A).norm() / A.norm())
        assert errors[torch.bfloat16] < 2e-2
        assert errors[torch.float32] < 3e-8
        assert errors[torch.float64] < 1e-13

    def test_nothing_was_turned(self, name):
        group, _ = GROUPS[name]
        _, targets, sources = problem(lambda _: torch.eye(WIDTH, dtype=torch.float64).expand(HEADS, WIDTH, WIDTH))
        found = fit(sides(targets, sources), group)
        assert float((found.A - torch.eye(WIDTH)).abs().max()) < 1e-6
        assert stay(sides(targets, sources)).at_noise


def test_a_scale_is_no_rotation():
    _, targets, sources = problem(invertible)
    assert not stay(sides(targets, sources)).at_noise
    assert not fit(sides(targets, sources), Orthogonal()).at_noise
    assert fit(sides(targets, sources), Invertible()).at_noise


def test_one_side_is_enough_for_scales_that_are_nearly_known():
    generator = seeded(4)
    matrix = normal(generator, ROWS, OTHER)
    scales = torch.exp2(4 * torch.rand(ROWS, generator=generator, dtype=torch.float64) - 2)
    source = (matrix + low_rank(generator)).float()
    target = (scales[:, None] * (matrix + low_rank(generator))).float()
    start = (scales * (1 + 1e-4 * normal(generator, ROWS))).reshape(-1, 1, 1)
    found = fit([Side.of(target, source, ROWS, 1)], Invertible(), start)
    assert float((found.A.flatten() / scales - 1).abs().max()) < 1e-6


def test_numbers_that_commute_with_rotary_positions():
    generator = seeded(5)
    A = complex_numbers(generator)
    angles = normal(generator, 1, WIDTH // 2).expand(HEADS, -1)
    turn = complex_blocks(torch.polar(torch.ones_like(angles), angles))
    assert torch.allclose(A @ turn, turn @ A)
