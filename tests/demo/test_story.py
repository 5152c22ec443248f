import pytest

from detune.demo.language_model import FINE_TUNES
from detune.demo.story import QUESTIONS, tell
from detune.errors import OutputError

METHOD = "intersect"  # the fastest


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "models"
    return tell(out, method=METHOD), out


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
        _, out = told
        assert {path.name for path in out.iterdir()} == {
            "base",
            *(f"merged-{domain}" for domain in FINE_TUNES),
            *(f"recovered-{method}" for method in ("mean", "spectral", METHOD)),
        }
        assert (out / f"recovered-{METHOD}" / "detune.json").is_file()
        assert (out / f"recovered-{METHOD}" / "tokenizer.json").is_file()


def test_prints_the_figures_it_returns_and_trains_when_told_to(capsys, tmp_path):
    story = tell(tmp_path / "again", method="mean", train=True, steps=1)
    text = capsys.readouterr().out
    assert list(story.comparisons) == ["mean", "spectral"]
    for comparison in story.comparisons.values():
        assert f"{100 * comparison.summary['bit_identical']:.1f} %" in text
    assert "The LoRAs were trained just now." in text
    assert {f"adapter-{domain}" for domain in FINE_TUNES} < {path.name for path in (tmp_path / "again").iterdir()}


def test_overwrites_nothing(tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(OutputError, match="exists and is not empty; choose another directory"):
        tell(tmp_path)
