from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from detune.checkpoints.paths import inside, is_plain_path
from detune.errors import InputError

NAMES = st.lists(
    st.one_of(st.sampled_from(["..", ".", "", "/", "a", "b.txt", "~", "\\", "\0", "\n", "\x1b", "-rf"]), st.text()),
    max_size=6,
).map("/".join)


@given(NAMES)
@example("/etc/passwd")
@example("../x")
@example("a/../../x")
@example("a\n")
@example("\ud800")
def test_a_name_leads_inside_or_is_refused(name: str) -> None:
    directory = Path("/nowhere/out")
    if is_plain_path(name):
        path = inside(directory, name)
        assert path.resolve() == path
        assert path != directory
        assert path.is_relative_to(directory)
    else:
        with pytest.raises(InputError, match="would be written outside /nowhere/out"):
            inside(directory, name)


def test_a_link_that_is_in_the_way_is_not_followed(tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (out / "folder").symlink_to(elsewhere)
    (out / "file").symlink_to(elsewhere / "file")
    (out / "dangling").symlink_to(tmp_path / "nothing")
    for name in ("folder/x", "file", "dangling"):
        with pytest.raises(InputError, match=f"{name!r} would be written outside {out}"):
            inside(out, name)
    # A target that was given as a link is the user's own choice.
    (tmp_path / "link").symlink_to(out)
    assert inside(tmp_path / "link", "x") == tmp_path / "link" / "x"
