"""DSiRe: the size of a training set by the singular values of a LoRA."""

from math import log

import pytest
import torch

from detune.audit.dataset_size import Reference, estimate_size, held_out_errors, spectrum_of
from detune.errors import InputError
from tests.cases import normal, seeded

SIZES = (10, 100, 1000)


def spectra(generator: torch.Generator, size: int, spread: float = 0.05, layers: int = 5) -> dict[str, torch.Tensor]:
    """Spectra that fall with the size of the training set."""
    values = torch.tensor([4.0, 2.0, 1.0, 0.5], dtype=torch.float64) / log(size)
    return {f"layer-{i}": values * (1 + spread * normal(generator, 4)) for i in range(layers)}


def references(spread: float = 0.05, groups: int = 6) -> list[Reference]:
    generator = seeded(0)
    return [Reference(spectra(generator, size, spread), size, f"task-{g}") for g in range(groups) for size in SIZES]


@pytest.mark.parametrize("shape", [(30, 40, 3), (8, 50, 8), (50, 8, 1)])
def test_a_spectrum_is_that_of_the_product(shape):
    out, width, rank = shape
    B, A = normal(seeded(1), out, rank), normal(seeded(2), rank, width)
    expected = torch.linalg.svdvals(0.5 * B @ A)[:rank]
    torch.testing.assert_close(spectrum_of(A.float(), B.float(), -0.5), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", SIZES)
def test_the_size_of_a_clear_case_is_told(size):
    found = estimate_size(spectra(seeded(9), size), references())
    assert found.examples == size
    assert found.votes == 1
    assert found.layers == 5
    assert found.low == found.high == size, "none of those that were held out was missed"


def test_the_majority_of_the_layers_decides():
    mixed = spectra(seeded(9), 100) | {"layer-0": spectra(seeded(9), 10)["layer-0"]}
    found = estimate_size(mixed, references())
    assert (found.examples, found.votes) == (100, 0.8)


def test_where_references_are_often_wrong_the_range_is_wide_and_holds():
    known = references(spread=1.0, groups=12)
    errors = held_out_errors(known)
    assert sum(error == 0 for error in errors) < len(errors)
    found = estimate_size(spectra(seeded(3), 100, spread=1.0), known)
    assert found.high / found.low >= 10
    assert found.low <= 100 <= found.high


def test_a_group_is_left_out_as_a_whole():
    """Were one task's LoRAs alike whatever their size, the others of the task would give a wrong one away."""
    known = [
        Reference({"layer": torch.tensor([float(g), size / 1e6], dtype=torch.float64)}, size, f"task-{g}")
        for g in range(4)
        for size in SIZES
    ]
    alone, grouped = held_out_errors(known, by_group=False), held_out_errors(known)
    assert all(error != 0 for error in alone)
    assert all(error == 0 for error in grouped)
    assert len(known) == len(alone) == len(grouped)


def test_adapters_of_other_ranks_can_be_compared():
    cut = {name: values[:2] for name, values in spectra(seeded(9), 100).items()}
    assert estimate_size(cut, references()).examples == 100


class TestBadInput:
    def test_too_few_groups(self):
        with pytest.raises(InputError, match="references of 2 groups; expected at least three to measure errors by"):
            estimate_size(spectra(seeded(0), 10), references(groups=2))

    def test_no_layer_in_common(self):
        with pytest.raises(InputError, match=r"no layer of this adapter is in the references; got 1 layers, first 'x'"):
            estimate_size({"x": torch.ones(2)}, references())
