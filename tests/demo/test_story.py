import pytest

from detune.demo.story import METHODS, tell
from detune.errors import OutputError


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "models"
    return tell(out, steps=4), out


class TestTheStory:
    def test_recovers_the_base_where_the_published_method_does_not(self, told):
        comparisons, _ = told
        mean = {method: sum(row.w_error for row in c.differing) / len(c.differing) for method, c in comparisons.items()}
        assert list(mean) == list(METHODS)
        assert mean["auto"] <= mean["intersect"] + 0.05
        assert mean["auto"] < -14
        assert mean["spectral"] > -9

    def test_differs_only_where_it_was_fine_tuned(self, told):
        comparisons, _ = told
        assert all(row.name.endswith(("query.weight", "value.weight")) for row in comparisons["auto"].differing)

    def test_keeps_the_models_where_it_is_told_to(self, told):
        _, out = told
        assert (out / "recovered-auto" / "detune.json").is_file()
        assert (out / "recovered-auto" / "tokenizer.json").is_file()

    def test_prints_the_figures_it_returns(self, capsys, tmp_path):
        comparisons = tell(tmp_path / "again", steps=1, seed=1)
        text = capsys.readouterr().out
        worst = max(row.w_error for row in comparisons["auto"].differing)
        assert f"{worst:.2f}" in text
        assert all(method in text for method in METHODS)

    def test_overwrites_nothing(self, tmp_path):
        (tmp_path / "mine").write_text("")
        with pytest.raises(OutputError, match="exists and is not empty; choose another directory"):
            tell(tmp_path)
