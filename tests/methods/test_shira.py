"""Votes on single entries."""

import pytest
import torch

from detune.methods import SHiRA
from detune.problem import NotRecoverable, Stack


def votes(*columns: list[float], fill: float = 1.0, size: int = 20):
    """Three or more models of one row, alike but for the first entries: `columns` is what the models hold there."""
    models = torch.full((len(columns[0]), 1, size), fill)
    for place, values in enumerate(columns):
        models[:, 0, place] = torch.tensor(values)
    return Stack.of(models)


def test_two_that_agree_decide_to_the_bit():
    recovery = SHiRA().solve(votes([2.0, 2.0, 7.0], [3.0, 5.0, 5.0]))
    assert recovery.weight[0, :3].tolist() == [2.0, 5.0, 1.0]
    assert recovery.agreed.all()


def test_the_median_stands_in_where_none_agree():
    recovery = SHiRA().solve(votes([2.0, 4.0, 9.0]))
    assert recovery.weight[0, 0] == 4.0
    assert recovery.agreed.logical_not().nonzero().tolist() == [[0, 0]]
    assert recovery.reason.endswith("the median stands in for 1 without")


def test_two_values_with_as_many_votes_contradict_each_other():
    recovery = SHiRA().solve(votes([2.0, 2.0, 8.0, 8.0]))
    assert not recovery.agreed[0, 0]
    assert recovery.weight[0, 0] == 5.0


def test_the_mean_stands_in_where_all_changed_the_same_entries():
    """Far more entries without two that agree than independent choices leave."""
    generator = torch.Generator().manual_seed(0)
    models = torch.ones(3, 40, 40)
    models[:, :2] += torch.rand(3, 2, 40, generator=generator)
    recovery = SHiRA().solve(Stack.of(models))
    torch.testing.assert_close(recovery.weight[:2], models.double().mean(dim=0)[:2])
    assert recovery.reason.endswith("the mean stands in for 80 without")


def test_zeros_of_either_sign_are_two_values():
    recovery = SHiRA().solve(votes([-0.0, -0.0, 0.0]))
    assert torch.signbit(recovery.weight[0, 0])


def test_two_models_and_dense_changes_are_refused():
    with pytest.raises(NotRecoverable, match=r"2 models: nothing tells which of two changed an entry; add a model"):
        SHiRA().solve(votes([2.0, 3.0]))
    dense = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(NotRecoverable, match=r"no two models agree in 100 % of the entries of a 8x8 matrix"):
        SHiRA().solve(Stack.of(dense))
