"""The solvers' work does not grow unnoticed: operations and bytes against stored counts."""

import pytest
import torch

from benchmarks.counting import WATCHED, Counts, count, count_watched, stored

MORE = 1.03
RENEW = "if that is meant: python benchmarks/counting.py --store"


@pytest.mark.parametrize("name", WATCHED)
def test_no_more_work_than_when_it_was_last_looked_at(name):
    before, now = stored()[name], count_watched(name)
    assert now.flops <= MORE * before.flops, RENEW
    assert now.bytes <= MORE * before.bytes, RENEW


def test_counts_are_those_of_the_operations():
    A, B = torch.zeros(6, 5), torch.zeros(5, 7)
    product = Counts(2 * 6 * 5 * 7, 4 * (6 * 5 + 5 * 7 + 6 * 7))
    assert count(lambda: A @ B) == product
    assert count(lambda: A[:, :5].mT) == Counts(0, 0)
    # In place: the target is read and written.
    C = torch.zeros(6, 7)
    assert count(lambda: C.addmm_(A, B)) == Counts(product.flops, product.bytes + C.nbytes)


def test_more_models_cost_no_more_each():
    """The products of the closed form are linear in the number of models; the chord of an even ring is a pair more."""
    three, six = (count_watched(f"intersect 1152x1024 r=16 n={n}") for n in (3, 6))
    assert six.flops <= 2.4 * three.flops
    assert six.bytes <= 2.1 * three.bytes
