"""The table of defences: what counts as broken, the table, and one quick run."""

import json
import shutil

import pytest

from detune.bench.defences import AttackResult, Row, RowResult, bench_defences, run_rows
from detune.bench.defences.families import trained_families
from detune.bench.defences.table import draw, markdown, to_json
from detune.demo.texts import DOMAINS
from detune.demo.train import Cloze, base_model, cloze
from detune.errors import InputError, OutputError
from tests.schemas import require_valid


def result(name: str = "noise", w_error: float = -6.0, embeddings: float = 1.0, **changes) -> RowResult:
    attacks = (AttackResult("average", -6.0, 1.0, None, 0.1), AttackResult("denoise", w_error, embeddings, None, 0.2))
    attacks += (AttackResult("recover", None, None, "not one family", 0.1),)
    return RowResult(name, "Noise(size=0.1)", 5, 0.5, 0.52, -6.0, 1.0, changes.get("attacks", attacks))


@pytest.mark.parametrize(
    ("w_error", "embeddings", "expected"),
    [
        (-6.0, 1.0, "survives"),
        (-6.5, 1.0, "survives"),  # 1.8 times in root mean square
        (-6.7, 1.0, "broken partly"),  # 2.2 times
        (-7.9, 1.0, "broken partly"),
        (-8.0, 1.0, "broken"),  # 10 times
        (-17.0, 0.0, "broken"),
        (-6.0, 0.3, "survives"),  # the root of a cosine distance is a distance
        (-6.0, 0.2, "broken partly"),
        (-5.0, 0.01, "broken"),  # further off, and yet the same model
    ],
)
def test_a_defence_is_judged_by_its_best_attack(w_error, embeddings, expected):
    assert result(w_error=w_error, embeddings=embeddings).outcome == expected


SILENT = (
    AttackResult("average", None, None, "one model holds NaN", 0.1),
    AttackResult("recover", None, None, "not one family", 0.1),
)


def test_a_row_without_an_answer_says_so_everywhere(tmp_path):
    row = result(attacks=SILENT)
    assert (row.best, row.times_closer, row.outcome) == (None, None, "no answer")
    line = markdown([row]).splitlines()[-1]
    assert line == "| noise | 5 | none | none | no answer | no answer | 0.500 (-3.8%) | no answer |"
    (stored,) = require_valid("bench-defences", to_json([row]))["rows"]
    assert (stored["times_closer"], stored["outcome"]) == (None, "no answer")
    draw([row, result()], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_cost_is_the_share_of_accuracy_lost():
    assert result().cost == pytest.approx(1 - 0.5 / 0.52)


def test_the_table_has_a_line_for_each_defence_and_the_best_in_bold():
    header, _, line = markdown([result(w_error=-8.25, embeddings=0.5)]).splitlines()
    assert header == (
        "| defence | n | average | recover | denoise | embeddings | times closer | task accuracy | outcome |"
    )
    assert line == "| noise | 5 | -6.00 | none | **-8.25** | 5.0e-01 | 13.3 | 0.500 (-3.8%) | broken |"


def test_json_says_what_follows():
    (row,) = require_valid("bench-defences", to_json([result(w_error=-8.25, embeddings=0.5)]))["rows"]
    assert (row["outcome"], len(row["attacks"])) == ("broken", 3)
    assert row["times_closer"] == pytest.approx(13.3, abs=0.05)
    assert row["cost"] == pytest.approx(1 - 0.5 / 0.52)


def test_the_command_prints_it_alone(command, tmp_path, monkeypatch):
    monkeypatch.setattr("detune.bench.defences.bench_defences", lambda *_, **__: (result(),))
    ran = command("bench", "defences", "--out", tmp_path, "--json")
    assert ran.code == 0
    assert [row["name"] for row in require_valid("bench-defences", ran.out)["rows"]] == ["noise"]


def test_the_figure_is_drawn_and_the_same_each_time(tmp_path):
    rows = [result("noise"), result("another", w_error=-12.0, embeddings=0.0)]
    for file in ("a.png", "b.png"):
        draw(rows, tmp_path / file)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


class TestQuickRun:
    @pytest.fixture(scope="class")
    @staticmethod
    def out(tmp_path_factory):
        return tmp_path_factory.mktemp("defences")

    @pytest.fixture(scope="class")
    @staticmethod
    def rows(out):
        return {row.name: row for row in bench_defences(out, quick=True, only=("none",))}

    def test_undefended_releases_are_undone(self, rows):
        assert rows["none"].outcome == "broken"
        assert rows["none"].best.w_error < -14
        assert rows["none"].best.embeddings < 1e-6

    def test_a_frozen_A_hides(self, rows, out):
        starts, begun, done = [], [], []

        def on_part(name: str, became: object) -> None:
            (begun if became is None else done).append(name)

        told = {"on_start": starts.append, "on_part": on_part}
        families = trained_families(out / "models", domains=DOMAINS[:3], steps=2, held_out=16, **told)
        (row,) = run_rows([Row("frozen A", ("average", "prior"), None, "frozen-a", 3)], families, out, **told)
        trained, attacked = starts
        assert set(trained) == {
            *(f"training on {domain}, frozen-a" for domain in DOMAINS[:3]),
            *(f"merging {domain}, {family}" for domain in DOMAINS[:3] for family in ("frozen-a", "bf16-base")),
        }
        assert list(attacked) == [f"frozen A: {what}" for what in ("average", "prior", "task quality")]
        assert begun == done
        assert sorted(begun) == sorted([*trained, *attacked])
        average, prior = row.attacks
        assert prior.w_error == pytest.approx(average.w_error, abs=0.1)

    def test_what_is_found_is_written(self, rows, out):
        stored = json.loads((out / "rows" / "none.json").read_text())
        assert stored["attacks"][0]["name"] == "average"
        assert (out / "defences.md").read_text() == markdown(list(rows.values()))
        assert (out / "defences.png").stat().st_size > 10_000

    def test_what_is_there_is_not_made_again(self, rows, out):
        starts, said = [], []
        again = bench_defences(
            out, quick=True, only=("none",), on_start=starts.append, on_part=lambda name, became: said.append(name)
        )
        assert {row.name: row for row in again} == rows
        assert starts == [{}, {}]
        assert not said

    def test_a_row_of_an_older_form_is_not_believed(self, rows, out, tmp_path, caplog):
        shutil.copytree(out, tmp_path / "older")
        stored = tmp_path / "older" / "rows" / "none.json"
        stored.write_text(json.dumps(json.loads(stored.read_text()) | {"verdict": "broken"}))
        (again,) = bench_defences(tmp_path / "older", quick=True, only=("none",))
        assert again.best.w_error == rows["none"].best.w_error
        assert "none.json holds no result of this version: the row is run again" in caplog.text

    def test_other_fine_tunes_are_not_mixed_in(self, rows, out):
        with pytest.raises(OutputError, match="holds other fine-tunes"):
            bench_defences(out)

    def test_a_row_that_is_not_there(self, rows, out):
        with pytest.raises(InputError, match=r"no row 'magic'; expected some of none, release one, .*frozen A"):
            bench_defences(out, quick=True, only=("magic",))

    def test_models_of_ones_own(self, rows, out, tmp_path, monkeypatch):
        monkeypatch.setattr("detune.bench.defences.run.QUALITY_TEXTS", 8)
        models = [out / "models" / "ordinary" / domain for domain in DOMAINS[:3]]
        (row,) = bench_defences(tmp_path / "own", base=base_model(), models=models, only=("release one",))
        assert row.attacks[0].w_error == row.undefended_w_error
        assert row.attacks[0].embeddings == pytest.approx(1.0)
        assert row.times_closer == pytest.approx(1.0)
        assert row.cost == 0


def test_a_base_without_models(tmp_path):
    with pytest.raises(InputError, match="go together; got 0 models and a base"):
        bench_defences(tmp_path, base=base_model())


def test_too_few_models(tmp_path):
    with pytest.raises(InputError, match="2 models given; expected at least three"):
        bench_defences(tmp_path, base=base_model(), models=[base_model()] * 2)


def test_cloze_is_the_chance_of_telling_a_half_from_seven_others():
    words = ("roof", "door", "wall", "floor", "stair", "lamp", "bell", "attic")
    texts = [f"the {word} of the house and its {word}" for word in words]
    found = cloze(base_model(), texts)
    assert isinstance(found, Cloze)
    # Of eight there is one choice of seven others: a hit or none.
    assert set(found.hits.tolist()) <= {0.0, 1.0}
    assert found.accuracy == float(found.hits.mean())
    with pytest.raises(InputError, match="too few texts to tell apart: got 7; expected at least 8"):
        cloze(base_model(), texts[:7])


def test_the_command_prints_the_table(command, tmp_path):
    ran = command("bench", "defences", "--out", tmp_path, "--base", base_model())
    assert ran.code == 2
    assert "the base and its fine-tunes go together" in ran.err
    assert "--only ROW" in command("bench", "defences", "--help").out
