"""Settings of an adapter by module: `rank_pattern` and `alpha_pattern` of PEFT's configurations.

Their keys are regular expressions for the end of a module's name, the first that fits counts, and an adapter from
anybody may have one that takes for ever. Keys that are plain names, as nearly all are, are looked up; the others are
matched by the library `regex`, which can be told when to stop.
"""

import re
import time
from collections.abc import Iterable
from typing import Any

import regex

from detune.errors import InputError, parsing

__all__ = ["by_module"]

_AGAIN = "copy the adapter again"

# A LoRA has some hundred modules, and a pattern for all of one kind is some characters long.
MAX_EXPRESSIONS = 100
MAX_EXPRESSION_LENGTH = 1000
# The time for all modules of an adapter; one match takes microseconds.
MAX_SECONDS = 5.0

# A dot is any character to an expression; in a name it is meant as a dot, and hardly any other name has another there.
_PLAIN = re.compile(r"[\w.-]+", re.ASCII)


def by_module(patterns: Any, default: Any, modules: Iterable[str], what: str) -> dict[str, Any]:
    r"""The value of a setting for each module.

    Args:
        patterns: What the configuration has for it: a table of expressions and values, or nothing.
        default: The value of modules that none fits.
        modules: Their names.
        what: The setting, for messages.

    Returns:
        Name to value.

    Raises:
        InputError: It is no table of expressions, one of them is none, or matching them takes too long.

    Example:
        >>> by_module({"q": 4, r"layers\.(1|2)\.k": 8}, 16, ["layers.1.q", "layers.1.k", "layers.3.k"], "rank_pattern")
        {'layers.1.q': 4, 'layers.1.k': 8, 'layers.3.k': 16}
    """
    if not isinstance(patterns or {}, dict):
        raise InputError(f"{what} is malformed", f"got {type(patterns).__name__}, expected a table", _AGAIN)
    places = {pattern: place for place, pattern in enumerate(patterns or {})}
    plain = {pattern: place for pattern, place in places.items() if _PLAIN.fullmatch(pattern)}
    expressions = [(places[pattern], pattern) for pattern in places if pattern not in plain]
    if len(expressions) > MAX_EXPRESSIONS or any(len(text) > MAX_EXPRESSION_LENGTH for _, text in expressions):
        raise InputError(
            f"{what} has too long or too many expressions",
            f"expected at most {MAX_EXPRESSIONS} of at most {MAX_EXPRESSION_LENGTH} characters",
            _AGAIN,
        )
    compiled = [(place, _compiled(text, what)) for place, text in expressions]
    values = list((patterns or {}).values())
    stop = time.monotonic() + MAX_SECONDS
    found: dict[str, Any] = {}
    for module in modules:
        ends = [module] + [module[dot.end() :] for dot in re.finditer(r"\.", module)]
        first = min((plain[end] for end in ends if end in plain), default=len(values))
        for place, expression in compiled:
            if place > first:
                break
            try:
                fits = expression.match(module, timeout=max(stop - time.monotonic(), 1e-3))
            except TimeoutError as error:
                raise InputError(
                    f"{what} has an expression that takes too long",
                    f"{expression.pattern!r} was still looking at module {module!r} after {MAX_SECONDS} s",
                    "do not trust this adapter",
                ) from error
            if fits:
                first = place
                break
        found[module] = values[first] if first < len(values) else default
    return found


def _compiled(text: str, what: str) -> "regex.Pattern[str]":
    with parsing(f"the expression {text!r} in {what}", _AGAIN):
        return regex.compile(rf"(.*\.)?({text})$")
