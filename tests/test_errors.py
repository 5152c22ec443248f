import pytest

from detune.errors import reason_of


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
