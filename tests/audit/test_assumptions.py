"""What the assumptions are judged by."""

from types import SimpleNamespace

from detune.audit.assumptions import _low_rank
from detune.origin import Origin


def evidence(*outcomes: tuple[Origin, tuple[int, ...]]) -> SimpleNamespace:
    entry = SimpleNamespace(shape=(64, 48))
    found = [(entry, SimpleNamespace(origin=origin, ranks=ranks)) for origin, ranks in outcomes]
    ranked = [(entry, outcome) for entry, outcome in found if outcome.ranks]
    return SimpleNamespace(matrices=[entry] * len(found), used=3, outcomes=found, ranked=ranked)


def test_a_matrix_that_one_model_left_alone_is_counted_with_the_others():
    held, message = _low_rank(evidence((Origin.SOLVED, (2, 2, 2)), (Origin.UNCHANGED, (2, 0, 2))))
    assert held is True
    assert message == "2 of 2 matrices do: rank 2 of 48 at most"


def test_a_matrix_without_ranks_is_not_asked_about():
    held, message = _low_rank(evidence((Origin.SOLVED, (2, 2, 2)), (Origin.UNCHANGED, ())))
    assert held is True
    assert message == "1 of 1 matrix do: rank 2 of 48 at most"
