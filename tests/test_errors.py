import errno
import os

import pytest

from detune.errors import InputError, OutputError, parsing, reason_of


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("no connection", "no connection"),
        ("\n  no\tconnection \n\nTried: a, b", "no connection"),
        ("Errors in loading:\n\n\tsize of a\n\tsize of b", "Errors in loading: size of a"),
        ("Errors:", "Errors:"),
        ("", "ValueError"),
        ("\n", "ValueError"),
    ],
)
def test_one_line(text, reason):
    assert reason_of(ValueError(text)) == reason


@pytest.mark.parametrize(
    "error", [KeyError("x"), AssertionError(), RecursionError("deep"), MemoryError(), LookupError("a\nb")]
)
def test_whatever_a_parser_raises_names_the_file(error):
    with (
        pytest.raises(InputError, match=rf"^x\.bin is damaged; {type(error).__name__}: [^\n]+; copy it$"),
        parsing("x.bin", "copy it"),
    ):
        raise error


def test_what_the_system_refuses_is_no_damage():
    with (
        pytest.raises(
            InputError, match=r"^cannot read x\.bin; Permission denied; change its permissions, or ask its owner$"
        ),
        parsing("x.bin"),
    ):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def test_a_part_that_never_ends_loses_its_middle():
    text = str(InputError("a" * 10**6, "b", "c"))
    assert len(text) < 6000
    assert text.endswith("aaa; b; c")
    assert str(InputError("a" * 4000)) == "a" * 4000


@pytest.mark.parametrize("error", [OutputError("a", "b", "c"), KeyboardInterrupt()])
def test_what_is_no_fault_of_the_file_passes(error):
    with pytest.raises(type(error)) as caught, parsing("x.bin"):
        raise error
    assert caught.value is error
