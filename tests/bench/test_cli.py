"""`detune bench` as its users meet it."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.bench.conftest import LORAS
from tests.schemas import require_valid

COMMAND = [sys.executable, "-c", "from detune.cli import main; main()", "bench"]


def test_list_names_every_subset_and_recipe(command):
    ran = command("bench", "list")
    assert ran.code == 0
    for name in ("vit", "stable-diffusion-1.5", "mistral-7b-v0.1-dpo", "sd-mini", "minilm"):
        assert f"\n{name} " in f"\n{ran.out}"
    assert "hf download Eliahu/LoWRA-Bench" in ran.out


def test_list_as_json(command):
    ran = command("bench", "list", "--json")
    assert (ran.code, ran.err) == (0, "")
    listed = require_valid("bench-list", ran.out)
    assert listed["published"]["vit"]["layers"] == listed["recipes"]["vit-mini"]["layers"] == 24


def test_build_run_table_study_and_merge(command, bert_base, loras, tmp_path):
    subset, results = tmp_path / "mine", tmp_path / "results"
    ran = command("bench", "build", "--base", bert_base, *loras, "--out", subset)
    assert ran.code == 0
    assert f"mine: 4 layers in {subset}" in ran.out
    ran = command("bench", "run", subset, "--methods", "mean,auto", "--models", "3-4", "--out", results, "--threads", 1)
    assert ran.code == 0
    assert len(list(results.glob("*.json"))) == 4
    assert "behaviour was not compared: no base at hand" in ran.out
    ran = command("bench", "table", results)
    assert ran.code == 0
    lines = [line.split()[:2] for line in ran.out.splitlines() if line.startswith(("mean", "auto"))]
    assert lines == [["mean", "3"], ["auto", "3"], ["mean", "4"], ["auto", "4"]]
    assert {file.name for file in results.iterdir()} >= {"table.md", "table.csv", "w-error.png", "w-error.svg"}
    printed = [
        command("bench", *words, "--json")
        for words in (
            ("run", subset, "--methods", "mean,auto", "--models", "3-4", "--out", results),
            ("table", results),
        )
    ]
    assert [(ran.code, ran.err) for ran in printed] == [(0, "")] * 2
    run, table = (require_valid("bench-table", ran.out) for ran in printed)
    assert run == table
    assert [(row["method"], row["models"], row["layers"]) for row in table["rows"]] == [
        (method, models, 4) for method in ("auto", "mean") for models in (3, 4)
    ]
    assert "behaviour was not compared: no base at hand" in " ".join(table["remarks"])
    ran = command("bench", "study", "models", subset, "--models", "3,4", "--out", results)
    assert ran.code == 0
    assert f"wrote {results / 'studies' / 'models.mine.csv'}" in ran.out
    ran = command("bench", "merge", subset, "--base", bert_base, "--out", tmp_path / "merged")
    assert ran.code == 0
    assert len(list((tmp_path / "merged").iterdir())) == LORAS
    ran = command("recover", *sorted((tmp_path / "merged").iterdir()), "--out", tmp_path / "recovered")
    assert ran.code == 0


@pytest.mark.parametrize(
    ("words", "amount"),
    [
        (["build", "--base", "BASE", "LORAS", "--out", "OUT"], r"0\.0 MB of 0\.0 MB"),
        (["merge", "SUBSET", "--base", "BASE", "--out", "OUT"], r"0\.\d MB of 0\.\d MB"),
        (["run", "SUBSET", "--methods", "mean", "--models", "3", "--out", "OUT"], "of 4 "),
        (["study", "depth", "SUBSET", "--models", "3", "--out", "OUT"], "of 8 "),
    ],
)
def test_a_bar_says_how_much_of_how_much(command, subset_dir, bert_base, loras, tmp_path, monkeypatch, words, amount):
    monkeypatch.setattr("detune.cli.progress.WORTH_TELLING_SECONDS", 0.0)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    filled = {"BASE": [bert_base], "SUBSET": [subset_dir], "LORAS": loras}

    def run(*more: str):
        return command("bench", *(each for word in words for each in filled.get(word, [word])), *more)

    filled["OUT"] = [tmp_path / "out"]
    ran = run()
    assert ran.code == 0
    assert re.search(amount, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", ran.err))
    assert "took longest: " in ran.out
    filled["OUT"] = [tmp_path / "quiet"]
    assert run("--quiet") == (0, "", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "vitt", "--out", "OUT"], "detune: error: no subset 'vitt'; expected a folder"),
        (["run", "vit", "--out", "OUT"], "detune: error: cannot read Eliahu/LoWRA-Bench from the Hub; "),
        (["run", "SUBSET", "--methods", "spectrum", "--out", "OUT"], "did you mean 'spectral'?"),
        (["run", "SUBSET", "--models", "3,x", "--out", "OUT"], "'3,x' is no list of numbers like 3,5,8 or 2-15."),
        (["run", "SUBSET", "--models", "8-3", "--out", "OUT"], "'8-3' is no list of numbers like 3,5,8 or 2-15."),
        (
            ["run", "SUBSET", "--methods", "auto", "--models", "2", "--out", "OUT"],
            "detune: error: auto needs at least 3",
        ),
        (["run", "SUBSET", "--inputs", "nowhere", "--out", "OUT"], "are given, but no base at hand; "),
        (["build", "vit-mini", "--name", "mine", "--out", "OUT"], "--name and --stands-for need --base."),
        (["build", "x", "--base", "BASE", "--quick", "--out", "OUT"], "are for a RECIPE, not for --base."),
        (["run", "SUBSET", "--models", "20", "--out", "OUT"], "detune: error: 20 models asked for; "),
        (["run", "SUBSET", "--device", "cuda:9", "--out", "OUT"], "detune: error: no device 'cuda:9' here; "),
        (["run", "SUBSET", "--base", "nowhere", "--out", "OUT"], "detune: error: no model in nowhere; "),
        (["build", "vit-min", "--out", "OUT"], "detune: error: no recipe 'vit-min'; expected one of vit-mini"),
        (["build", "vit-mini", "minilm", "--out", "OUT"], "give one RECIPE, or --base BASE with the ADAPTERs."),
        (["build", "nothing", "--base", "BASE", "--out", "OUT"], "detune: error: no such model: 'nothing'; "),
        (["merge", "SUBSET", "--out", "OUT"], "has no base beside its rows"),
        (["table", "OUT"], "holds no results; expected *.json"),
        (
            ["study", "depths", "SUBSET", "--out", "OUT"],
            "no study 'depths'; expected one of models, ",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(command, subset_dir, bert_base, tmp_path, words, message):
    places = {"SUBSET": subset_dir, "BASE": bert_base, "OUT": tmp_path / "out"}
    ran = command("bench", *(places.get(word, word) for word in words))
    assert ran.code == 2
    assert message in ran.err
    assert "Traceback" not in ran.err
    assert ran.err.rstrip().count("\n") <= 3, "usage errors are click's own lines"


def test_a_real_kill_loses_no_finished_layer(subset_dir, tmp_path):
    method = tmp_path / "slow.py"
    method.write_text("import time\n\ndef slow(models, rank):\n    time.sleep(0.5)\n    return models[0]\n")
    words = [*COMMAND, "run", str(subset_dir), "--methods", f"{method}:slow", "--models", "3"]
    words += ["--out", str(tmp_path / "results")]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(done := list((tmp_path / "results").glob(".partial/*/*.txt"))) < 2 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    times = {file: file.stat().st_mtime_ns for file in done}
    assert not list((tmp_path / "results").glob("*.json"))
    began = time.time()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    (file,) = (tmp_path / "results").glob("*.json")
    assert len(json.loads(file.read_text())["layers"]) == 4
    assert all(time_ns < began * 1e9 for time_ns in times.values())
