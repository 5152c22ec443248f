"""Tables, plots and studies, from real runs on the small subset."""

import pandas as pd
import pytest
from PIL import Image

from detune.bench.build import build_subset
from detune.bench.methods import find_method
from detune.bench.results import ResultStore
from detune.bench.run import plan, run
from detune.bench.studies import STUDIES, Bench, run_study
from detune.bench.table import PAPER, markdown, tables, to_json, write_table
from detune.errors import InputError
from tests.bench.conftest import save_lora
from tests.schemas import require_valid


@pytest.fixture(scope="module")
def store(subset_dir, tmp_path_factory) -> ResultStore:
    from detune.bench.subsets import open_subset

    subset = open_subset(str(subset_dir))
    store = ResultStore(tmp_path_factory.mktemp("results"))
    methods = [find_method(name, subset) for name in ("auto", "mean")]
    run(subset, plan(subset, methods, [3, 4], [0, 1]), store)
    run(subset, plan(subset, methods, [3], rank_known=False), store)
    return store


def test_a_row_is_a_mean_over_draws(store):
    results = store.read_all()
    table = tables(results)["small"]
    row = table[(table["method"] == "auto") & (table["n"] == "3") & (table["rank"] == "told")].iloc[0]
    errors = [r.w_error for r in results if r.cell.method == "auto" and len(r.cell.loras) == 3 and r.cell.rank_known]
    assert (row["draws"], row["W-Error"]) == ("2", f"{sum(errors) / 2:.2f}")
    assert list(table["method"][:3]) == ["mean", "mean", "auto"], "by models, baselines first"


def test_the_papers_figures_stand_beside_ours_and_are_marked(store):
    table = tables(store.read_all())["small"]  # it stands for vit
    published = table[table["method"].str.contains("published")]
    assert sorted(float(value) for value in published["W-Error"]) == sorted(
        figure.w_error for figure in PAPER if figure.subset == "vit"
    )
    assert "second-hand note" in markdown(store.read_all())


def test_json_has_the_figures_in_full(store):
    rows = require_valid("bench-table", to_json(store.read_all()))["rows"]
    published = [row for row in rows if row["source"] != "detune"]
    assert sorted(row["w_error"] for row in published) == sorted(f.w_error for f in PAPER if f.subset == "vit")
    assert all(row["draws"] is None and row["seconds"] is None for row in published)
    (row,) = (row for row in rows if (row["method"], row["models"], row["rank"]) == ("auto", 3, "told"))
    errors = [r.w_error for r in store.read_all() if r.cell.method == "auto" and len(r.cell.loras) == 3]
    assert row["draws"] == 2
    assert min(errors) < row["w_error"] < max(errors)


def test_table_and_plot_are_written(store):
    text, sheet, png, svg = write_table(store)
    assert text.read_text().startswith("### small\n\n| method")
    frame = pd.read_csv(sheet)
    assert list(frame["source"]).count("detune") == 6
    assert len(frame) == 6 + 3, "and the paper's three of ViT"
    assert frame["w_error"].max() < 0
    with Image.open(png) as image:
        assert image.size[0] > 400
    assert "<svg" in svg.read_text()


def test_methods_of_one_name_are_not_averaged(subset, tmp_path):
    store = ResultStore(tmp_path / "results")
    file = tmp_path / "mine.py"
    for place in (0, 1):
        file.write_text(f"def best(models, rank):\n    return models[{place}]\n")
        run(subset, plan(subset, [find_method(f"{file}:best", subset)], [3]), store)
    table = tables(store.read_all())["small"]
    ours = table[table["method"] == "mine.best"]
    assert len(ours) == 2
    assert ours["version"].nunique() == 2
    assert "version: one name stands for several" in markdown(store.read_all())


def test_the_same_results_give_the_same_files(store):
    before = [file.read_bytes() for file in write_table(store)]
    assert [file.read_bytes() for file in write_table(store)] == before


@pytest.mark.parametrize("name", ["models", "scheduler", "ranks", "depth"])
def test_a_study_writes_its_figures(name, subset, store, tmp_path):
    bench = Bench((subset,), ResultStore(tmp_path), models=(3,))
    result = run_study(name, bench)
    assert [file.suffix for file in result.files] == [".csv", ".png", ".svg"]
    assert all(file.stat().st_size > 0 for file in result.files)
    assert (result.frame["w_error"].dropna() < 0).all()


def test_rank_by_models_compares_subsets_of_different_rank(subset, bert_base, tmp_path):
    wide = [save_lora(tmp_path / f"wide-{i}", seed=20 + i, rank=4) for i in range(4)]
    other = build_subset(bert_base, wide, tmp_path / "wide")
    result = run_study("rank-by-models", Bench((subset, other), ResultStore(tmp_path / "results")))
    assert set(result.frame["r"]) == {2, 4}


def test_ranks_are_compared_with_the_loras(subset, tmp_path):
    frame = run_study("ranks", Bench((subset,), ResultStore(tmp_path), models=(3,))).frame
    found = frame[(frame["method"] == "auto") & (frame["rank"] == "found")]
    assert list(found["ranks_exact"]) == [1.0]


def test_the_scheduler_study_traces_every_iteration(subset, tmp_path):
    frame = run_study("scheduler", Bench((subset,), ResultStore(tmp_path), models=(4,))).frame
    trace = frame[frame["label"] == "with the scheduler"]
    assert list(trace["iteration"]) == list(range(subset.iterations))
    assert trace["rank"].iloc[0] == 1
    assert trace["rank"].iloc[-1] == 2
    assert trace["loss"].iloc[-1] < trace["loss"].iloc[0]


def test_a_study_wants_each_subset_once(subset, tmp_path):
    with pytest.raises(InputError, match=r"subsets small, small; expected one or more, each once"):
        run_study("models", Bench((subset, subset), ResultStore(tmp_path)))


def test_the_help_names_every_study(command):
    assert f"A STUDY is one of {', '.join(STUDIES)}." in " ".join(command("bench", "study", "--help").out.split())
