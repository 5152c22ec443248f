"""Tensors side by side, the next one read meanwhile, and no more than that in memory."""

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from detune._runtime import use_threads
from detune.certificate.verdict import Verdict
from detune.compatibility.model_set import Held, ModelSet
from detune.origin import Origin
from detune.recovery import scheduler
from detune.recovery.loop import map_tensors
from detune.recovery.report import TensorResult
from detune.recovery.scheduler import TensorLoad, TensorScheduler, computing_threads
from detune.recovery.tensor import result_of
from tests.families import plain_family

PATIENCE_SECONDS = 10


@pytest.fixture
def family(tmp_path) -> ModelSet:
    return ModelSet(plain_family(tmp_path).models)


@pytest.fixture(autouse=True)
def large_matrices(monkeypatch):
    """Those of the tests stand for such."""
    monkeypatch.setattr(scheduler, "HELD_BYTES", 0)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request) -> Iterator[int]:
    with use_threads(request.param):
        yield request.param


class Stacks:
    """Which stacks are read, and which of them are still in memory."""

    def __init__(self, family: ModelSet, monkeypatch: pytest.MonkeyPatch) -> None:
        self._read = family.held
        self._held: list[weakref.ref[Tensor]] = []
        self.begun = [threading.Event() for _ in range(4)]
        monkeypatch.setattr(family, "held", self.read)

    def read(self, name: str) -> Held:
        held = self._read(name)
        self._held.append(weakref.ref(held.tensors[0]))
        self.begun[int(name.split(".")[1])].set()
        return held

    @property
    def in_memory(self) -> int:
        return sum(held() is not None for held in self._held)


def solve_with(act: Callable[[int], None]) -> Callable[[str, Held], tuple[TensorResult, str]]:
    def solve(name: str, held: Held) -> tuple[TensorResult, str]:
        act(int(name.split(".")[1]))
        return result_of(name, held, Verdict.AVERAGED, Origin.MEAN, "for the test"), f"found of {name}"

    return solve


def visit(*options: Any, **more: Any) -> list[TensorResult]:
    """Visit all tensors; what is found of one comes with its result, and nothing with one that is copied."""
    results = []
    for result, found in map_tensors(*options, **more):
        assert found == (None if result.verdict is Verdict.SHARED else f"found of {result.name}")
        results.append(result)
    return results


def test_the_next_stack_is_read_while_others_are_solved(family, monkeypatch, threads):
    # Three float32 models, and three float64 copies beside: room for one in work for each thread, and one more.
    monkeypatch.setattr(scheduler, "HELD", 9 * threads + 3)
    stacks = Stacks(family, monkeypatch)

    def act(layer: int) -> None:
        if layer + threads < 4:
            assert stacks.begun[layer + threads].wait(PATIENCE_SECONDS)
        assert stacks.in_memory <= threads + 1

    rows = visit(family, solve_with(act), working_copies=3)
    assert sorted(row.name for row in rows) == sorted(family.names)
    assert stacks.in_memory == 0


def test_tensors_are_solved_side_by_side(family, monkeypatch):
    monkeypatch.setattr(scheduler, "HELD", 100)
    both = threading.Barrier(2, timeout=PATIENCE_SECONDS)
    with use_threads(2):
        rows = visit(family, solve_with(lambda layer: both.wait() and None))
    assert sorted(row.name for row in rows) == sorted(family.names)


def test_the_next_stack_waits_where_memory_does_not_allow_both(family, monkeypatch, threads):
    stacks = Stacks(family, monkeypatch)

    def act(layer: int) -> None:
        assert stacks.in_memory == 1
        assert not any(begun.is_set() for begun in stacks.begun[layer + 1 :])

    visit(family, solve_with(act))
    assert all(begun.is_set() for begun in stacks.begun)


def test_an_error_ends_the_reading(family, threads):
    before = threading.active_count()
    with pytest.raises(ArithmeticError):
        visit(family, solve_with(lambda layer: layer // 0))
    assert threading.active_count() == before
    assert torch.get_num_threads() == threads


def test_leaving_the_loop_ends_the_computation(family, threads):
    """Nothing of it runs on when the next statement does."""
    before = threading.active_count()
    for _ in map_tensors(family, solve_with(lambda layer: None)):
        break
    assert threading.active_count() == before
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("entries", "expected"),
    [(1000, 1), (scheduler.SHARED_OUT, 1), (25 * scheduler.SHARED_OUT, 2), (50 * scheduler.SHARED_OUT, 4)],
    ids=["small", "four beside each other", "two beside each other", "the largest"],
)
def test_threads_are_shared_out_by_size(entries, expected):
    load, largest = (bf16_models(size) for size in (entries, 50 * scheduler.SHARED_OUT))
    with use_threads(4), TensorScheduler([load, largest]) as shared:
        assert shared.threads(load) == expected


def bf16_models(entries: int, n: int = 3) -> TensorLoad:
    return TensorLoad(entries, 2 * n * entries, (2 * n + 4 * 3) * entries)


def test_a_gpu_takes_one_at_a_time(family, monkeypatch, threads):
    monkeypatch.setattr(scheduler, "HELD", 100)
    inside = threading.Semaphore(1)

    def act(layer: int) -> None:
        assert inside.acquire(blocking=False)
        # Time for another to come in.
        time.sleep(0.05)
        inside.release()

    visit(family, solve_with(act), device="cuda")


def test_small_matrices_are_computed_on_one_thread():
    with use_threads(2):
        for entries, expected in ((scheduler.SHARED_OUT - 1, 1), (scheduler.SHARED_OUT, 2)):
            with computing_threads(entries):
                assert torch.get_num_threads() == expected
            assert torch.get_num_threads() == 2
