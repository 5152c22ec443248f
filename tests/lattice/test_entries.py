"""Entries as intervals: those of the storage grid, for any part of the matrices, in any order of reading."""

import numpy as np
import pytest
import torch

from detune.lattice import entries as module
from detune.lattice.entries import StoredEntries, grid_of, row_blocks
from detune.numerics import float_grid
from tests.cases import normal, seeded
from tests.lattice.problems import LatticeProblem

MIXED = LatticeProblem((40, 24), n=3, merge=(torch.bfloat16, torch.float32, torch.float16)).entries


def test_blocks_are_the_numbers_that_round_to_each_models_own_dtype():
    low, high = MIXED.block(slice(8, 20))
    for i, W_i in enumerate(MIXED.matrices):
        expected = float_grid.interval(W_i[8:20])
        np.testing.assert_array_equal(low[i], expected.low)
        np.testing.assert_array_equal(high[i], expected.high)


def test_a_part_is_those_rows_and_columns():
    rows, columns = torch.tensor([3, 5, 30]), torch.tensor([0, 22])
    for whole, part in zip(MIXED.block(slice(None)), MIXED.part(rows, columns).block(slice(None)), strict=True):
        np.testing.assert_array_equal(part, whole[:, rows][:, :, columns])
    assert MIXED.part(rows, None).shape == (3, 24)
    assert MIXED.part(None, columns).shape == (40, 2)


def test_transposed_blocks():
    assert MIXED.transposed.shape == (24, 40)
    for whole, turned in zip(MIXED.block(slice(None)), MIXED.transposed.block(slice(4, 9)), strict=True):
        np.testing.assert_array_equal(turned, whole.transpose(0, 2, 1)[:, 4:9])


@pytest.mark.parametrize("rows", [1, 31, 32, 100])
def test_row_blocks_are_all_rows_once_and_no_more_at_a_time_than_memory_allows(rows, monkeypatch):
    monkeypatch.setattr(module, "TOGETHER", 1 << 10)
    monkeypatch.setattr(module, "LEAST_ROWS", 4)
    entries = StoredEntries((normal(seeded(), rows, 48).float(),) * 3)
    blocks = list(row_blocks(entries))
    assert [row for block in blocks for row in range(rows)[block]] == list(range(rows))
    assert max(block.stop - block.start for block in blocks) * 48 * 3 <= 1 << 10


def test_no_grid_is_zeros():
    assert not grid_of(None).any()
    assert grid_of(torch.bfloat16).tolist() == [2.0**-7, 2.0**-126]
