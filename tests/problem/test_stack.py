import pytest
import torch

from detune.errors import InputError
from detune.problem import NonFinite, Stack
from detune.problem.stack import SMALL_ENTRIES
from detune.problem.storage_noise import storage_variance
from tests.cases import Regime, make_problem, normal, rms, seeded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
def test_storage_variance_is_that_of_rounding(dtype, size):
    exact = size * normal(seeded(), 400, 400)
    stored = exact.to(dtype)
    assert float(storage_variance(stored).mean()) == pytest.approx(rms(stored.double() - exact) ** 2, rel=0.03)


def test_storage_variance_is_ulp_squared_over_12():
    values = torch.tensor([1.0, -1.5, 1.999, 2.0, 0.25, 0.0])
    ulp = torch.tensor([1, 1, 1, 2, 0.25, 0], dtype=torch.float64) * 2.0**-23
    torch.testing.assert_close(storage_variance(values), ulp.square() / 12, rtol=1e-12, atol=1e-80)


def test_noise_is_that_of_each_model_in_its_own_dtype():
    exact = normal(seeded(), 200, 100)
    stored = [exact.to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    for noise, W_i in zip(Stack.of(stored).noise, stored, strict=True):
        assert float(noise) == pytest.approx(rms(W_i.double() - exact), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_noise_is_that_of_the_coarsest_rounding_and_not_of_the_file(dtype):
    """Many a float32 checkpoint was bf16 before."""
    exact = normal(seeded(), 200, 100)
    widened = exact.to(dtype).float()
    assert float(Stack.of([widened]).noise[0]) == pytest.approx(rms(widened.double() - exact), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_noise_norm_bounds_the_spectral_norm(dtype):
    sizes = torch.exp(normal(seeded(1), 200, 1))
    exact = sizes * normal(seeded(), 200, 150)
    stored = exact.to(dtype)
    norm = float(torch.linalg.matrix_norm(stored.double() - exact, ord=2))
    assert 0.9 * norm <= float(Stack.of([stored]).noise_norm(0, 200)) <= 3 * norm


@pytest.mark.parametrize(
    ("shape", "dtype", "scale", "expected"),
    [
        ((64, 64), torch.float32, 0.1, torch.float64),  # small: costs nothing
        ((64, 64), torch.bfloat16, 0.1, torch.float64),
        ((1100, 1000), torch.float64, 0.1, torch.float64),
        ((1100, 1000), torch.float32, 1e-5, torch.float64),
        ((1100, 1000), torch.bfloat16, 1.0, torch.float32),
        ((1100, 1000), torch.float16, 0.1, torch.float32),
        ((1100, 1000), torch.float16, 50.0, torch.float64),  # the rounding of products would show
    ],
    ids=str,
)
def test_compute_dtype_follows_the_noise(shape, dtype, scale, expected):
    assert (shape[0] * shape[1] > SMALL_ENTRIES) == (shape[0] > 64)
    base = normal(seeded(), *shape) * 0.02
    stack = torch.stack([base, base + scale * normal(seeded(1), *shape)]).to(dtype)
    assert Stack.of(stack).dtype is expected


def test_blocks_cover_all_rows_once():
    matrices = normal(seeded(), 3, 3000, 700).float()
    for stack in (Stack.of(matrices), Stack.of(matrices).transposed):
        seen = []
        for block in stack.blocks():
            seen += range(block.rows.start, block.rows.stop)
            rows = torch.stack([W_i[block.rows].to(stack.dtype) for W_i in stack.matrices])
            assert block.reference.equal(rows[0])
            torch.testing.assert_close(block.reference + block.offset, rows.mean(dim=0))
            torch.testing.assert_close(block.centred, rows - rows.mean(dim=0), rtol=0, atol=1e-12)
        assert seen == list(range(stack.shape[0]))
        assert len(seen) > stack.block_height


@pytest.mark.parametrize(
    ("size", "dtype", "units", "expected"),
    [
        (0.01, torch.bfloat16, True, torch.bfloat16),
        (0.5, torch.bfloat16, True, torch.float32),  # the differences' own rounding would show
        (0.01, torch.float16, True, torch.float32),
        (1e-3, torch.float16, True, torch.bfloat16),
        (0.01, torch.bfloat16, False, torch.float32),
        (1e-6, torch.float32, True, torch.float64),
        (0.01, torch.float64, True, torch.float64),
    ],
)
def test_sketches_are_as_coarse_as_the_noise_allows(size, dtype, units, expected, monkeypatch):
    monkeypatch.setattr("detune.problem.stack.multiplies_bfloat16", lambda device: units)
    base = normal(seeded(), 1100, 1000)
    stack = Stack.of([(base + size * normal(seeded(i), 1100, 1000)).to(dtype) for i in (1, 2)])
    assert stack.sketch_dtype is expected


def test_transposing_copies_nothing():
    stack = Stack.of(normal(seeded(), 3, 4, 5))
    assert stack.transposed.shape == (5, 4)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(stack.matrices, stack.transposed.matrices, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_names_the_matrix_that_is_not_finite(value):
    stack = make_problem(Regime(), seeded()).stack
    stack[2, 5, 5] = value
    with pytest.raises(NonFinite, match="matrix 2 holds NaN or Inf; expected finite weights; leave") as refused:
        Stack.of(stack).require_finite(stack.sum())
    assert refused.value.model == 2


def test_an_overflow_is_not_taken_for_bad_input():
    stack = Stack.of(torch.full((2, 3, 3), 3e38), dtype=torch.float32)
    with pytest.raises(
        InputError, match=r"differences overflow torch.float32: rescale the matrices or compute in"
    ) as refused:
        stack.require_finite(stack.matrices[0].sum())
    assert not isinstance(refused.value, NonFinite)


def test_models_agree_in_their_numbers_whatever_dtype_they_have():
    own, other = (normal(seeded(seed), 20, 10).bfloat16() for seed in range(2))
    zero = torch.zeros_like(own)
    assert Stack.of([own, other, own.float(), other.float()]).versions == ((0, 2), (1, 3))
    assert Stack.of([own.float(), own.float() * (1 + 2**-20)]).versions == ((0,), (1,))
    assert Stack.of([zero, -zero.float()]).versions == ((0,), (1,))


def test_a_part_of_models_that_storage_alone_has_rounded_has_no_told_noise():
    matrices = [normal(seeded(seed), 20, 10).bfloat16() for seed in range(3)]
    stack = Stack.of(matrices, noise=[None, 0.5, None])
    assert len(stack.noise_override) == 3
    assert stack.part((0, 2)).noise_override == ()
    assert stack.part((0, 1)).noise_override == stack.noise_override[:2]
