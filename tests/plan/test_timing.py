"""How long matrices take: which are computed, and when no further one is begun."""

import time
from collections.abc import Iterator, Sequence

import pytest

from detune.plan import timing
from detune.plan.timing import WARMING_ENTRIES


class Computer:
    """Takes a second for a thousand entries, and three more the first time."""

    def __init__(self, entries: dict[str, int], clock: list[float]) -> None:
        self.entries, self.clock, self.runs = entries, clock, list[list[str]]()

    def __call__(self, names: Sequence[str]) -> Iterator[tuple[str, Sequence[int | None]]]:
        self.clock[0] += 3.0 * (not self.runs)
        self.runs.append([])
        for name in names:
            self.runs[-1].append(name)
            self.clock[0] += self.entries[name] / 1000
            yield name, (4, None)


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_matrices_of_all_sizes_are_computed_after_one_that_compiles(clock):
    entries = {f"large{i}": 2000 for i in range(8)} | {f"small{i}": 1000 for i in range(8)}
    computer = Computer(entries, clock)
    timed = timing._timed(entries, 4, computer)
    assert computer.runs[0] == ["large7"], "no matrix is so large that it certainly compiles the loops: the largest"
    assert [name[:5] for name in computer.runs[1]] == ["small", "small", "large", "large"]
    assert (timed.matrices, timed.entries, timed.seconds) == (4, 6000, pytest.approx(6.0))
    assert timed.ranks == (4,) * 4
    assert timed.first_seconds == pytest.approx(3.0 + 2.0)
    opened = timing.opening(0.5, timed, None)
    assert (opened.seconds, opened.source) == (pytest.approx(5.5), "what that took here, with a first matrix")


def test_the_first_is_no_larger_than_it_must_be(clock):
    entries = {"huge": 9 * WARMING_ENTRIES, "enough": WARMING_ENTRIES, "small": 1000}
    timed = timing._timed(entries, 4, computer := Computer(entries, clock))
    assert computer.runs == [["enough"], ["small", "enough"]]
    assert timed.seconds == pytest.approx((1000 + WARMING_ENTRIES) / 1000)


def test_after_a_while_no_further_one_is_begun(clock):
    entries = {f"{i}": 9000 for i in range(8)}
    timed = timing._timed(entries, 8, computer := Computer(entries, clock))
    assert computer.runs[1] == ["0", "1", "2"]
    assert (timed.matrices, timed.entries, timed.seconds) == (3, 27000, pytest.approx(27.0))


def test_without_a_matrix_nothing_is_timed(clock):
    computer = Computer({}, clock)
    assert timing._timed({}, 4, computer) is None
    assert computer.runs == []
