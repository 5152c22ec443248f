import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detune.checkpoints.pickles import MAX_OPERATIONS, Foreign, read_pickle
from detune.errors import InputError

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.text() | st.integers(-(2**40), 2**40) | st.none(), inner)
        | st.tuples(inner)
        | st.tuples(inner, inner, inner, inner)
    ),
)


def read(data: bytes) -> Any:
    return read_pickle(io.BytesIO(data))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(value=PLAIN, protocol=st.integers(3, 5))  # protocol 2 has no bytes and makes them by a call
def test_plain_data_comes_back(value: Any, protocol: int) -> None:
    assert read(pickle.dumps(value, protocol)) == value


def test_a_list_that_holds_itself() -> None:
    value: list[Any] = [1]
    value.append(value)
    found = read(pickle.dumps(value, 2))
    assert found[0] == 1
    assert found[1] is found


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ({1, 2}, "set"),
        (frozenset({1}), "frozenset"),
        (Path("x"), "pathlib.PosixPath"),
        (1j, "builtins.complex"),
        (slice(1), "builtins.slice"),
    ],
)
@pytest.mark.parametrize("protocol", [4, 5])
def test_what_is_no_plain_data_stays_a_name(value: Any, what: str, protocol: int) -> None:
    found = read(pickle.dumps([value, 3], protocol))
    assert isinstance(found[0], Foreign)
    assert (found[0].what, found[1]) == (what, 3)


def test_objects_with_attributes_and_items_are_not_made() -> None:
    class Table(dict[str, int]):
        pass

    Table.__qualname__ = "Table"
    globals()["Table"] = Table
    table = Table(a=1)
    table.__dict__["b"] = 2
    found = read(pickle.dumps({"t": table}, 2))
    assert isinstance(found["t"], Foreign)
    assert found["t"].what.endswith("Table") or found["t"].what == "copyreg.__newobj__"


@pytest.mark.parametrize("call", [b"cposix\nsystem\n(S'x'\ntR.", b"cbuiltins\neval\nX\1\0\0\0x\x85R."])
def test_nothing_is_called(call: bytes) -> None:
    try:
        found = read(call)
    except (KeyError, ValueError):  # operations of protocol 0, which torch.save never wrote
        return
    assert isinstance(found, Foreign)
    assert found.what == "builtins.eval"


def test_a_tuple_of_tuples_is_no_key() -> None:
    """2^60 paths lead through it; its hash would follow each."""
    bomb = b"\x80\x02})" + b"2\x86" * 60 + b"K\1s."
    (key,) = read(bomb)
    assert isinstance(key, Foreign)


def test_long_pickles_are_refused() -> None:
    with pytest.raises(InputError, match=rf"a pickle is too long; expected at most {MAX_OPERATIONS} operations"):
        read(b"\x80\x02" + b"N0" * MAX_OPERATIONS)


def test_copies_of_a_long_list_count() -> None:
    pairs = b"](" + b"NN\x86" * 10_000 + b"eq\0" + b"ccollections\nOrderedDict\nq\1"
    with pytest.raises(InputError, match="too long"):
        read(b"\x80\x02" + pairs + b"h\1h\0\x85R0" * 1000 + b".")


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"\x80\x02",
        b"\x80\x02.",
        b"\x80\x02(.",
        b"\x80\x02K",
        b"\x80\x02s.",
        b"\x80\x02}(K\1u.",
        b"\x80\x02h\5.",
        b"\x80\x02X\xff\xff\xff\xffab.",
        b"\x80\x02NQ.",
        b"\x80\x02NR.",
        b"\x80\x05\x97.",
        b"\x80\x02c" + b"a" * 2000 + b"\nb\n.",
    ],
)
def test_damage_is_an_exception(damaged: bytes) -> None:
    with pytest.raises((ValueError, LookupError, TypeError)):
        read(damaged)


def test_places_of_tensors() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    stream = io.BytesIO()

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            if not isinstance(value, torch.storage.TypedStorage):
                return None
            return ("storage", torch.FloatStorage, "7", "cpu", base.numel())

    Pickler(stream, 2).dump({"w": base[1:, 1:]})
    found = read(stream.getvalue())["w"]
    assert (found.storage.key, found.storage.nbytes, found.dtype) == ("7", 48, torch.float32)
    assert (found.offset, found.shape, found.stride, found.lazy) == (5, (2, 3), (4, 1), False)
