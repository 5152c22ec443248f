import hashlib
import html
import json
import re
from importlib import resources
from itertools import pairwise
from pathlib import Path

import plotly.graph_objects as go
import pytest
from plotly.offline import get_plotlyjs_version

from detune.audit import AuditReport, audit
from detune.audit.figures import charts
from detune.audit.page import PLOTLY, render
from detune.certificate.verdict import Verdict
from tests.families import plain_family, plain_state, save_plain

PLOTLY_SHA256 = "79542150855a52c567260e3137095dbe2b744e6d702a5cabe67da246942fba7a"
MOST_BYTES = 4_000_000


def asset(name: str) -> bytes:
    return resources.files("detune.audit").joinpath("assets", name).read_bytes()


@pytest.fixture(scope="module")
def page(report: AuditReport) -> str:
    return render(report)


class TestPlotly:
    def test_is_the_published_file(self):
        assert hashlib.sha256(asset(PLOTLY)).hexdigest() == PLOTLY_SHA256

    def test_is_the_version_that_figures_are_written_for(self):
        head = asset(PLOTLY)[:400].decode()
        assert f"plotly.js (cartesian - minified) v{get_plotlyjs_version()}" in head
        assert "Licensed under the MIT license" in head

    def test_its_licence_and_its_origin_travel_with_it(self):
        assert asset("plotly-LICENSE.txt").startswith(b"MIT License")
        assert f"plotly.js-cartesian-dist-min@{get_plotlyjs_version()}".encode() in asset("README.md")


class TestThePage:
    def test_is_small(self, page):
        assert len(page.encode()) < MOST_BYTES

    def test_tells_the_verdict(self, page, report):
        assert f"<h1>{report.verdict.headline}</h1>" in page
        assert all(sentence in page for sentence in report.verdict.sentences)

    def test_names_nothing_to_fetch(self, page):
        markup = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
        markup = re.sub(r"<style>.*?</style>", "", markup, flags=re.DOTALL)
        assert re.findall(r"\b(?:src|href)=\"(?!data:)", markup) == []
        assert "url(" not in asset("page.css").decode()
        assert "@import" not in asset("page.css").decode()

    def test_lets_only_its_own_scripts_run(self, page):
        policy = html.unescape(re.search(r"Content-Security-Policy\" content=\"([^\"]*)\"", page)[1])
        assert policy.startswith("default-src 'none'; script-src 'sha256-")
        scripts = policy.partition("script-src")[2].partition(";")[0]
        assert "unsafe" not in scripts
        assert scripts.count("sha256-") == 2

    def test_has_a_chart_for_each_question(self, page, report):
        shown = charts(report)
        assert [chart.id for chart in shown] == ["curve", "map", "spectra", "scatter"]
        for chart in shown:
            assert f'id="{chart.id}" role="img" aria-label="' in page
            go.Figure(chart.figure)  # plotly refuses what plotly.js does not know

    def test_without_the_base_there_is_no_truth_to_compare_with(self, blind):
        assert [chart.id for chart in charts(blind)] == ["curve", "map", "spectra"]
        assert "true W-Error" not in render(blind)
        assert "predicted W-Error" in render(blind)

    def test_shows_a_range_where_no_more_is_known(self, blind):
        """A tensor has one, and all of them together have one at the top."""
        known = {"predicted_w_error": -6.6, "best_w_error": -6.9, "worst_w_error": -4.1}
        entry = blind.matrices[0]
        last = entry.outcomes[-1].model_copy(update={"verdict": Verdict.APPROXIMATE, **known})
        changed = entry.model_copy(update={"outcomes": (*entry.outcomes[:-1], last)})
        point = blind.curve[-1].model_copy(update=known | {"worst_w_error": -5.1})
        page = render(
            blind.model_copy(
                update={
                    "tensors": tuple(changed if tensor is entry else tensor for tensor in blind.tensors),
                    "curve": (*blind.curve[:-1], point),
                }
            )
        )
        assert "<td>−6.9 to −4.1</td>" in page
        assert "<dd><small>−6.9 to −5.1</small></dd>" in page
        assert r"\u22126.9 to \u22124.1, approximate" in page

    @pytest.mark.parametrize("count", [1, 2])
    def test_is_made_where_nothing_is_given_away(self, fine, count):
        page = render(audit(fine.models[:count], fine.base))
        assert 'class="hero note"' in page
        assert "Kept" in page

    def test_shows_what_is_exact(self, tmp_path):
        """A matrix that two releases left alone has no error at all."""
        models = plain_family(tmp_path, n=3).models
        base = save_plain(tmp_path / "truth", plain_state())
        report = audit([*models[:1], *[_with_one_layer(tmp_path / str(i), i) for i in (1, 2, 3)]], base)
        cells = {chart.id: chart for chart in charts(report)}["map"].figure["data"][-1]["text"]
        assert "exact" in {text for row in cells for text in row}

    def test_headings_do_not_skip_a_level(self, page):
        levels = [int(level) for level in re.findall(r"<h([1-6])", page)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after <= before + 1 for before, after in pairwise(levels))


def _with_one_layer(path: Path, i: int) -> Path:
    """A model of which only layer 3 was fine-tuned."""
    base = plain_state()
    return save_plain(
        path, base | {"layer.3.weight": base["layer.3.weight"] + i * base["layer.3.weight"].flip(0)[:, :1]}
    )


class TestHostileNames:
    def test_stay_text_in_the_markup(self, hostile_page):
        markup = re.sub(r"<script.*?</script>", "", hostile_page, flags=re.DOTALL)
        assert "&lt;script&gt;alert(1)" in markup
        assert "<script>alert" not in hostile_page
        assert "<img" not in markup

    def test_stay_text_in_the_figures(self, hostile_page):
        (content,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', hostile_page, re.DOTALL)
        assert "<" not in content
        texts = json.dumps(json.loads(content))
        assert "&lt;script&gt;" in texts
        assert "<script" not in texts
        assert "<a href" not in texts
        assert r"\\u202e" in texts
        assert "&gt;%{x}" not in texts

    def test_turn_no_writing(self, hostile_page):
        markup = re.sub(r"<script.*?</script>", "", hostile_page, flags=re.DOTALL)
        assert r"\u202e\x1b[31m\u2028" in markup
        assert [each for each in markup if not each.isprintable() and each != "\n"] == []
