"""Pieces of work: whole files' runs of tensors, of about equal size."""

import pytest
import torch

from detune.compatibility.model_set import ModelSet
from detune.recovery.execution import make_units, units
from tests.cases import normal, seeded
from tests.families import save_plain, shard


@pytest.fixture
def family(tmp_path) -> ModelSet:
    """Two shards: three tensors of 4 kB, 12 kB and 4 kB, and four of 4 kB."""
    models = []
    for i in range(2):
        rows = {"a": 10, "b": 30, "c": 10, "d": 10, "e": 10, "f": 10, "g": 10}
        state = {name: normal(seeded(i), n, 100).float() for name, n in rows.items()}
        models.append(save_plain(tmp_path / str(i), state))
        shard(models[-1])
    return ModelSet(models)


def test_pieces_lie_in_one_file_and_are_in_order(family, monkeypatch):
    monkeypatch.setattr(units, "PIECES", 1)
    monkeypatch.setattr(units, "SMALLEST_BYTES", 1)
    monkeypatch.setattr(units, "LARGEST_BYTES", 16_000)
    # Two models: 8 kB a small tensor. 40 kB in the first shard make three pieces, 32 kB in the second make two.
    assert make_units(family, family.names) == [("a",), ("b",), ("c",), ("d", "e"), ("f", "g")]


def test_small_models_are_not_cut(family):
    assert make_units(family, family.names) == [("a", "b", "c"), ("d", "e", "f", "g")]
    assert make_units(family, ["b", "g"]) == [("b",), ("g",)]
    assert make_units(family, []) == []


def test_no_piece_is_larger_than_it_must_be(family, monkeypatch):
    monkeypatch.setattr(units, "SMALLEST_BYTES", 1)
    found = make_units(family, family.names)
    assert found == [(name,) for name in family.names]
    assert torch.float32 in family.dtypes("a")
