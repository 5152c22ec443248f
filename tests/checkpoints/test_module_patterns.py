import re
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detune.checkpoints.module_patterns import MAX_EXPRESSIONS, by_module
from detune.errors import InputError

MODULES = [f"model.layers.{i}.{kind}" for i in range(12) for kind in ("attn.q_proj", "attn.v_proj", "mlp.up")]
PATTERNS = ["q_proj", "attn.q_proj", r".*\.1\..*", "layers.(1|11).mlp.up", "^model.*", r"layers\.\d\.mlp", "up", "proj"]


def as_peft_does(patterns: dict[str, Any], default: Any, module: str) -> Any:
    """PEFT's documented rule: the first expression that matches the end of the name, behind a dot or all of it."""
    found = [value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)]
    return found[0] if found else default


@settings(max_examples=60, deadline=None, derandomize=True)
@given(chosen=st.lists(st.sampled_from(PATTERNS), unique=True))
def test_the_first_that_fits(chosen: list[str]) -> None:
    patterns = {pattern: place for place, pattern in enumerate(chosen)}
    expected = {module: as_peft_does(patterns, "default", module) for module in MODULES}
    assert by_module(patterns, "default", MODULES, "rank_pattern") == expected


def test_a_pattern_for_each_of_many_modules() -> None:
    modules = [f"layers.{i}.q" for i in range(20_000)]
    patterns = {module: place for place, module in enumerate(modules)}
    assert by_module(patterns, None, modules, "rank_pattern") == patterns


@pytest.mark.parametrize("patterns", [None, {}])
def test_none(patterns: Any) -> None:
    assert by_module(patterns, 3, ["a"], "rank_pattern") == {"a": 3}


@pytest.mark.parametrize("evil", [r"(a+)+b", r"(.*)*b", r"(a*)*(a*)*b", r"((a+)+)+b", r"(a|aa)+b", r"(a|a)*b"])
def test_expressions_that_never_end(evil: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own matcher would try 2^60 ways; the library sees through most of them and stops at the others."""
    monkeypatch.setattr("detune.checkpoints.module_patterns.MAX_SECONDS", 0.2)
    started = time.monotonic()
    try:
        assert by_module({evil: 1}, 2, ["a" * 60 + "bc"], "rank_pattern") == {"a" * 60 + "bc": 2}
    except InputError:
        assert evil in (r"(a|a)*b", r"(a|aa)+b")
    assert time.monotonic() - started < 10


def test_an_expression_that_takes_too_long_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detune.checkpoints.module_patterns.MAX_SECONDS", 0.2)
    with pytest.raises(InputError, match=r"rank_pattern has an expression that takes too long; '.*\(a\|a\)\*b.*do not"):
        by_module({"(a|a)*b": 1}, 3, ["a" * 60 + "bc"], "rank_pattern")


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ([1], "rank_pattern is malformed; got list, expected a table"),
        ("q", "rank_pattern is malformed; got str"),
        ({"(": 1}, r"the expression '\(' in rank_pattern is damaged"),
        ({"a{99999999999999999999}": 1}, "rank_pattern|takes too long"),
        ({"[" + "a" * 2000 + "]": 1}, "too long or too many expressions"),
        ({f"[{i}]": 1 for i in range(MAX_EXPRESSIONS + 1)}, "too long or too many expressions"),
    ],
)
def test_malformed(patterns: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        by_module(patterns, 3, ["module"], "rank_pattern")
