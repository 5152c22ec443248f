import json
import math
from pathlib import Path

import pytest

from detune.documents import document, to_json


def test_the_format_comes_first():
    assert list(document("detune-compare/1", {"rows": []})) == ["format", "rows"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_does_not_have_is_null(value):
    text = to_json(document("detune-compare/1", {"rows": ({"w_error": value, "deep": {1: [value]}},), "sum": value}))
    assert json.loads(text) == {
        "format": "detune-compare/1",
        "rows": [{"w_error": None, "deep": {"1": [None]}}],
        "sum": None,
    }
    assert text.endswith("}\n")


def test_a_path_is_text():
    assert document("detune-pack/1", {"path": Path("a/b")})["path"] == "a/b"


def test_what_no_json_holds_is_a_defect_of_ours():
    with pytest.raises(TypeError, match="not JSON serializable"):
        to_json({"at": object()})
