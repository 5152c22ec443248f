"""A short run of each fuzzer, the same every time; `make fuzz` runs them for longer."""

import json
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest

from detune.errors import InputError
from tests.fuzzing import runner
from tests.fuzzing.mutation import mutated_bytes, mutated_json, to_json
from tests.fuzzing.runner import Target, Wrong, fuzz
from tests.fuzzing.targets import TARGETS

MUTATIONS = {"config": 15, "names": 4, "commands": 6, "lora": 30}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_nothing_is_found(target: Target) -> None:
    counts, findings = fuzz(target, range(MUTATIONS.get(target.name, 60)), seed=2402)
    assert not findings
    # A pack's sums find every change; what a configuration or a card says keeps no model from being used.
    assert counts["read"] > 0 or target.name == "pack"
    assert counts["refused"] > 0 or target.name in ("config", "card")


# --- the fuzzers themselves ---


def outcomes(read: Any, tmp_path: Path) -> list[str]:
    """The findings of one file that is read so."""
    target = Target("x", lambda to: (to / "a").write_text("a"), lambda draw, to: None, lambda work, sound: read())
    _, findings = fuzz(target, range(1), seed=0)
    return [finding.what for finding in findings]


def refuse(*parts: str, cause: BaseException | None = None) -> None:
    raise InputError(*parts) from cause


def wait() -> None:
    while True:
        time.sleep(0.01)


def work() -> None:
    while True:
        pass


def take() -> None:
    taken = [bytearray(2**27) for _ in range(8)]
    for each in taken:
        each[::4096] = b"x" * len(each[::4096])


def answer_wrongly() -> None:
    raise Wrong("4 for 2 + 3")


@pytest.mark.parametrize(
    ("read", "what"),
    [
        (lambda: None, []),
        (lambda: refuse("a", "b", "c"), []),
        (lambda: refuse("a", "b"), ["no line in three parts: 'a; b'"]),
        (lambda: refuse("a", "b", "c", cause=MemoryError()), ["more than 536870912 bytes of memory"]),
        (lambda: {}["a"], ["KeyError is not ours"]),
        (answer_wrongly, ["a wrong answer: 4 for 2 + 3"]),
        (take, ["more than 536870912 bytes of memory"]),
    ],
)
def test_what_is_found(read: Any, what: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "MEMORY_BYTES", 2**29)
    assert outcomes(read, tmp_path) == what


@pytest.mark.parametrize("read", [wait, work])
def test_what_does_not_end_is_found(read: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "SECONDS", 0.3)
    monkeypatch.setattr(runner, "WAITING_SECONDS", 0.3)
    assert outcomes(read, tmp_path) == ["still at it after 0.3 s"]


def test_a_seed_is_one_run(tmp_path: Path) -> None:
    value = {"a": [1, 2, {"b": "text"}], "c": None, "d": 10**400}
    for seed in range(200):
        one, other = (
            (to_json(mutated_json(Random(seed), value, 2)), mutated_bytes(Random(seed), b"some bytes", 2))
            for _ in range(2)
        )
        assert one == other
        json.loads(one[0])
    assert value == {"a": [1, 2, {"b": "text"}], "c": None, "d": 10**400}
