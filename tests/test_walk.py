"""One tensor in work, the next one read meanwhile, and no more than that in memory."""

import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from detune import walk as walking
from detune.family import Family
from detune.report import Status
from detune.walk import Answer, computing_threads, walk
from tests.families import plain_family

ANSWER = Answer(Status.AVERAGED, "mean", "for the test")


@pytest.fixture
def family(tmp_path) -> Family:
    return Family(plain_family(tmp_path).models)


class Stacks:
    """Which stacks are read, and which of them are still in memory."""

    def __init__(self, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
        self._read = family.stack
        self._held: list[weakref.ref[Tensor]] = []
        self.begun = [threading.Event() for _ in range(4)]
        monkeypatch.setattr(family, "stack", self.read)

    def read(self, name: str) -> tuple[Tensor, ...]:
        stack = self._read(name)
        self._held.append(weakref.ref(stack[0]))
        self.begun[int(name.split(".")[1])].set()
        return stack

    @property
    def in_memory(self) -> int:
        return sum(held() is not None for held in self._held)


def solve_with(act: Callable[[int], None]) -> Callable[[str, tuple[Tensor, ...]], Answer]:
    def solve(name: str, tensors: tuple[Tensor, ...]) -> Answer:
        act(int(name.split(".")[1]))
        return ANSWER

    return solve


def test_the_next_stack_is_read_while_one_is_solved(family, monkeypatch):
    # Three float32 stacks of a matrix each: room for two.
    monkeypatch.setattr(walking, "STACKS", 6)
    stacks = Stacks(family, monkeypatch)

    def act(layer: int) -> None:
        if layer < 3:
            assert stacks.begun[layer + 1].wait(timeout=10)
        assert stacks.in_memory <= 2

    rows = walk(family, lambda name: None, solve_with(act))
    assert [row.name for row in rows] == list(family.names)
    assert stacks.in_memory == 0


def test_the_next_stack_waits_where_memory_does_not_allow_both(family, monkeypatch):
    stacks = Stacks(family, monkeypatch)

    def act(layer: int) -> None:
        assert stacks.in_memory == 1
        assert not any(begun.is_set() for begun in stacks.begun[layer + 1 :])

    walk(family, lambda name: None, solve_with(act))
    assert all(begun.is_set() for begun in stacks.begun)


def test_an_error_ends_the_reading(family):
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        walk(family, lambda name: None, solve_with(lambda layer: (_ for _ in ()).throw(KeyboardInterrupt())))
    assert threading.active_count() == before


def test_small_matrices_are_computed_on_one_thread(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for entries, expected in ((walking.SHARED_OUT - 1, 1), (walking.SHARED_OUT, 2)):
            with computing_threads(entries):
                assert torch.get_num_threads() == expected
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
