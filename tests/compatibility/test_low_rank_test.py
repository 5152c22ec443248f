import pytest
import torch
from torch import Tensor

from detune.compatibility.low_rank_test import FIRST_SAMPLE, RelationKind, relate, rounded_to, sample, split
from detune.problem import NonFinite
from tests.cases import normal, rms, seeded
from tests.families import delta

HALF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def merges(
    shape: tuple[int, int], ranks: tuple[int, ...], sizes: tuple[float, ...], dtype: torch.dtype
) -> list[Tensor]:
    generator = seeded(3)
    # Columns of different size, and an outlier among the rows: storage noise is not the same everywhere.
    W = normal(generator, *shape) * torch.exp(0.7 * normal(generator, shape[1]))
    W[3] *= 15
    W = W.to(dtype).double()
    return [(W + delta(generator, W, r, size)).to(dtype) for r, size in zip(ranks, sizes, strict=True)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("shape", "ranks", "sizes"),
    [
        ((96, 96), (4, 4), (0.1, 0.1)),
        ((96, 128), (16, 16), (0.3, 0.03)),
        ((64, 64), (28, 28), (1.0, 1.0)),
        ((300, 96), (1, 16), (0.01, 0.001)),
        ((768, 768), (64, 64), (0.02, 0.002)),
    ],
    ids=str,
)
def test_loras_differ_by_a_low_rank(shape, ranks, sizes, dtype):
    relation = relate(*merges(shape, ranks, sizes, dtype))
    assert relation.kind is not RelationKind.FULL_RANK
    # In float32 nothing of these LoRAs is below the noise; in float64 the rounding of their own products is above it.
    if dtype is torch.float32:
        assert relation.rank == sum(ranks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [0.006, 0.02, 0.1, 2**0.5])
@pytest.mark.parametrize("shape", [(96, 96), (128, 300), (400, 96)], ids=str)
def test_a_change_of_every_entry_is_of_full_rank(shape, size, dtype):
    lora = merges(shape, (8,), (0.01,), dtype)[0]
    change = normal(seeded(7), *shape)
    full = (lora.double() + change * size * rms(lora)).to(dtype)
    assert relate(lora, full).kind is RelationKind.FULL_RANK


def test_what_is_below_the_rounding_is_no_difference():
    """A change of a thirtieth of a unit in the last place: it moves few entries, and those by no more than rounding."""
    W = normal(seeded(1), 128, 128).bfloat16()
    change = normal(seeded(2), 128, 128) * W.double().abs() * HALF[torch.bfloat16] / 30
    assert relate(W, (W.double() + change).bfloat16()).kind is RelationKind.SAME


def test_equal_is_the_same():
    W = normal(seeded(), 100, 80)
    assert relate(W, W.clone()).kind is RelationKind.SAME


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float16, torch.bfloat16),
        (torch.float64, torch.float32),
    ],
    ids=str,
)
def test_dtypes_may_differ_and_the_base_may_have_been_converted_first(first, second):
    generator = seeded(5)
    W = normal(generator, 128, 160)
    merged = [(W.to(dtype).double() + delta(generator, W, 8, 0.03)).to(dtype) for dtype in (first, second)]
    assert relate(*merged).kind is RelationKind.LOW_RANK


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_saved_as_float32_beside_float32(dtype):
    generator = seeded(5)
    W = normal(generator, 128, 160).to(dtype).double()
    merged = [(W + delta(generator, W, 8, 0.1)).to(dtype).float(), (W + delta(generator, W, 8, 0.1)).float()]
    relation = relate(*merged)
    assert relation.kind is RelationKind.LOW_RANK
    assert relation.coarse


def test_delta_may_be_rounded_before_it_is_added():
    generator = seeded(5)
    W = normal(generator, 128, 160).bfloat16()
    merged = [W + delta(generator, W, 8, 1.0).bfloat16() for _ in range(2)]
    assert relate(*merged).kind is RelationKind.LOW_RANK


def test_versions_are_grouped():
    generator = seeded(8)
    bases = [normal(generator, 96, 80) for _ in range(3)]
    order = (1, 0, 0, 2, 0, 1)
    versions = [(bases[b] + delta(generator, bases[b], 4)).float() for b in order]
    assert split(versions) == ((1, 2, 4), (0, 5), (3,))


def test_a_coarse_version_hides_no_difference_between_fine_ones():
    """A small full fine-tune in float32 vanishes in the rounding of a bf16 model that comes first."""
    generator = seeded(9)
    W = normal(generator, 128, 128)
    fine = [(W + delta(generator, W, 4, 0.02)).float() for _ in range(2)]
    full = (W + 5e-4 * normal(generator, 128, 128)).float()
    coarse = (W + delta(generator, W, 4, 0.02)).bfloat16()
    assert relate(coarse, full).kind is RelationKind.LOW_RANK
    assert split([coarse, full, *fine]) == ((0, 2, 3), (1,))


def test_the_sample_is_of_the_same_rows_and_columns_for_every_matrix():
    numbers = torch.arange(400 * 500).reshape(400, 500)
    first, second = sample(numbers, FIRST_SAMPLE, seed=1), sample(numbers + 1, FIRST_SAMPLE, seed=1)
    assert first.shape == (FIRST_SAMPLE, FIRST_SAMPLE)
    assert (second - first).eq(1).all()
    assert sample(numbers, 1000).equal(numbers)


def test_names_the_damaged_version():
    versions = [normal(seeded(i), 70, 70) for i in range(3)]
    versions[1][4, 5] = float("nan")
    with pytest.raises(NonFinite) as error:
        split(versions)
    assert error.value.model == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_knows_what_values_were_rounded_to(dtype):
    values = normal(seeded(), 20, 20).to(dtype)
    assert rounded_to(values) is dtype
    assert rounded_to(values.double()) is (torch.float64 if dtype is torch.float32 else dtype)


def test_what_lapack_cannot_do_in_float32_is_done_in_float64(monkeypatch):
    """It gives up on some products of differences of which most rows are zero."""
    eigvalsh = torch.linalg.eigvalsh

    def failing(matrix: Tensor) -> Tensor:
        if matrix.dtype is torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return eigvalsh(matrix)

    monkeypatch.setattr(torch.linalg, "eigvalsh", failing)
    base = normal(seeded(), 80, 60)
    relation = relate(base.float(), (base + delta(seeded(1), base, 3)).float())
    assert (relation.kind, relation.rank) == (RelationKind.LOW_RANK, 3)
