import io
import json
from contextlib import redirect_stdout

import pytest

from detune.demo.language_model import FINE_TUNES
from detune.demo.story import QUESTIONS, tell
from detune.errors import OutputError
from tests.schemas import require_valid

METHOD = "intersect"  # the fastest


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "models"
    with redirect_stdout(io.StringIO()) as printed:
        story = tell(out, method=METHOD)
    return story, out, printed.getvalue()


class TestTheStory:
    def test_recovers_most_bits_where_the_published_method_does_not(self, told):
        bits = {method: comparison.summary["bit_identical"] for method, comparison in told[0].comparisons.items()}
        assert list(bits) == ["mean", "spectral", METHOD]
        assert bits["mean"] < bits["spectral"] < 0.7
        assert bits[METHOD] > 0.9

    def test_the_recovered_model_writes_what_the_base_writes_and_a_fine_tune_does_not(self, told):
        answers = told[0].answers
        assert list(answers) == ["base", "merged-language", "recovered"]
        assert answers["recovered"] == answers["base"]
        assert all(one != other for one, other in zip(answers["merged-language"], answers["base"], strict=True))
        assert len(answers["base"]) == len(QUESTIONS)

    def test_keeps_the_models_where_it_is_told_to(self, told):
        _, out, _ = told
        assert {path.name for path in out.iterdir()} == {
            "base",
            *(f"merged-{domain}" for domain in FINE_TUNES),
            *(f"recovered-{method}" for method in ("mean", "spectral", METHOD)),
        }
        assert (out / f"recovered-{METHOD}" / "detune.json").is_file()
        assert (out / f"recovered-{METHOD}" / "tokenizer.json").is_file()

    def test_prints_what_it_returns(self, told):
        story, _, text = told
        for comparison in story.comparisons.values():
            assert f"{100 * comparison.summary['bit_identical']:.1f} %" in text
        assert "recovered: 3 of 3 answers are the base's, word for word" in text
        assert "The LoRAs come with detune; --train trains them again." in text

    def test_is_json_as_well(self, told):
        content = require_valid("demo", told[0].to_json())
        assert list(content["fine_tunes"]) == [f"merged-{domain}" for domain in FINE_TUNES]
        assert list(content["methods"]) == ["mean", "spectral", METHOD]
        assert all(len(given) == len(QUESTIONS) for given in content["answers"].values())


def test_prints_json_alone_where_it_is_told_to(command, monkeypatch):
    monkeypatch.setattr("detune.demo.story._attack", lambda *_: {})
    monkeypatch.setattr("detune.demo.story._ask", lambda *_: {})
    ran = command("demo", "--json")
    assert ran.code == 0
    assert list(require_valid("demo", ran.out)["fine_tunes"]) == [f"merged-{domain}" for domain in FINE_TUNES]


def test_trains_where_it_is_told_to(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("detune.demo.story._attack", lambda *_: {})
    monkeypatch.setattr("detune.demo.story._ask", lambda *_: {})
    tell(tmp_path / "models", train=True, steps=1)
    assert "The LoRAs were trained just now." in capsys.readouterr().out
    for domain in FINE_TUNES:
        assert len(json.loads((tmp_path / "models" / f"adapter-{domain}" / "losses.json").read_text())) == 1


def test_overwrites_nothing(tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(OutputError, match="exists and is not empty; choose another directory"):
        tell(tmp_path)
