"""Changes of bytes and of JSON, drawn from a generator."""

import copy
import json
from pathlib import Path
from random import Random
from typing import Any

__all__ = ["edit_json", "mutated_bytes", "mutated_json", "to_json"]

# Ends of the ranges that sizes and offsets are kept in.
NUMBERS = (0, 1, -1, 2, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 2**70, -(2**63), 10**400)
TEXTS = (
    "",
    " ",
    "a\0b",
    "\ud800",
    "\x1b[2J",
    "[/bold]",
    "../x",
    "/x",
    "a/b",
    "..",
    ".",
    "x" * 300,
    "w" * 5000,
    "é\u202ex",
    "nan",
    "(a|a)*b",
    "%s",
    "__metadata__",
    "weight",
)


def mutated_bytes(draw: Random, data: bytes, changes: int = 1) -> bytes:
    """Flip, overwrite, cut, double or drop some bytes, as often as `changes` says."""
    raw = bytearray(data)
    for _ in range(changes):
        place = draw.randrange(len(raw) + 1)
        end = min(len(raw), place + draw.choice((1, 2, 4, 8, 30, 200)))
        match draw.randrange(7):
            case 0 if place < len(raw):
                raw[place] ^= 1 << draw.randrange(8)
            case 1 if place < len(raw):
                raw[place] = draw.randrange(256)
            case 2:
                size = draw.choice((1, 2, 4, 8))
                raw[place : place + size] = (draw.choice(NUMBERS[:-1]) % 2 ** (8 * size)).to_bytes(size, "little")
            case 3:
                del raw[place:end]
            case 4:
                raw[place:place] = raw[place:end]
            case 5:
                raw[place:place] = draw.randbytes(end - place)
            case _:
                del raw[draw.randrange(len(raw) + 1) :]
    return bytes(raw)


def mutated_json(draw: Random, value: Any, changes: int = 1) -> Any:
    """Exchange, drop, add or rename some parts of a JSON value; it is copied first."""
    value = copy.deepcopy(value)
    for _ in range(changes):
        places = list(_places(value))
        if not places:
            return _hostile(draw)
        holder, key = draw.choice(places)
        match draw.randrange(6):
            case 0 | 1 | 2:
                holder[key] = _near(draw, holder[key])
            case 3:
                del holder[key]
            case 4:
                other, other_key = draw.choice(places)
                holder[key] = copy.deepcopy(other[other_key])
            case _ if isinstance(holder, dict):
                holder[draw.choice(TEXTS) if draw.random() < 0.7 else str(key) + draw.choice(TEXTS)] = holder.pop(key)
            case _:
                holder.insert(key, _hostile(draw))
    return value


def to_json(value: Any) -> bytes:
    """JSON with everything that Python's own reader takes: half surrogate pairs, NaN, numbers of 400 digits."""
    return json.dumps(value).encode()


def edit_json(draw: Random, path: Path) -> None:
    """Change a JSON file: its parts, or now and then its bytes."""
    data = path.read_bytes()
    if draw.random() < 0.2:
        path.write_bytes(mutated_bytes(draw, data, draw.choice((1, 1, 3))))
    else:
        path.write_bytes(to_json(mutated_json(draw, json.loads(data), draw.choice((1, 1, 1, 2, 3)))))


def _places(value: Any) -> Any:
    """Each part of a value: what holds it, and under which key or index."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def _near(draw: Random, value: Any) -> Any:
    """Something of the same kind, or of any."""
    if draw.random() < 0.4:
        return _hostile(draw)
    match value:
        case bool():
            return not value
        case int() | float():
            # An earlier change may have left a number of 400 digits.
            other = float(value) if abs(value) < 2.0**1000 else -1.0
            return draw.choice((value + 1, value - 1, -value, value * 2, value // 2, other))
        case str():
            cut = draw.randrange(len(value) + 1)
            return draw.choice(
                (value[:cut], value + draw.choice(TEXTS), value[:cut] + "." + value[cut:], value.upper())
            )
        case list() if value:
            return draw.choice((value[1:], value + value, value[::-1], value[0]))
    return _hostile(draw)


def _hostile(draw: Random) -> Any:
    return draw.choice(
        (
            None,
            True,
            1.5,
            float("nan"),
            float("inf"),
            draw.choice(NUMBERS),
            draw.choice(NUMBERS),
            draw.choice(TEXTS),
            draw.choice(TEXTS),
            [],
            {},
            [draw.choice(NUMBERS)],
            {draw.choice(TEXTS): draw.choice(NUMBERS)},
            [[[[1]]]],
        )
    )
