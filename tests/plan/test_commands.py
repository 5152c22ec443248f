"""`--dry-run`: what commands would do, and that nothing is written."""

import inspect
import math
import shutil
from pathlib import Path

import pytest
import torch

import detune
from detune.errors import InputError, OutputError
from detune.plan import plan_extraction, plan_pack, plan_push, plan_recovery
from tests.families import Fine, edit, plain_family, tree
from tests.schemas import require_valid

TOKEN = "hf_notforyoureyes"


@pytest.fixture
def fine(tmp_path: Path) -> Fine:
    return plain_family(tmp_path / "models")


def test_recover(fine, tmp_path):
    (fine.models[1] / "README.md").write_text("about")
    before = tree(tmp_path)
    options = {"adapters": tmp_path / "loras", "mask": tmp_path / "mask"}
    plan = plan_recovery(fine.specs, tmp_path / "out", **options)
    assert tree(tmp_path) == before
    assert (plan.changed, plan.copied) == (4, 3)
    checkpoint, adapters, mask = plan.writes
    detune.recover(fine.models, tmp_path / "out", **options)
    assert checkpoint.files == len(tree(tmp_path / "out"))
    assert checkpoint.size_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert adapters.files == len(tree(tmp_path / "loras"))
    factors = sum(file.stat().st_size for file in (tmp_path / "loras").rglob("*.safetensors"))
    assert adapters.size_bytes == pytest.approx(factors, rel=0.35), "but for headers"
    assert mask.size_bytes == 4 * 80 * 64
    assert [(read.files, read.tensors) for read in plan.reads] == [(1, 7)] * 3
    assert [part.what for part in plan.time] == ["opening", "recovering and fitting adapters", "reading and hashing"]
    assert all(0 < part.seconds < 100 for part in plan.time)
    assert plan.seconds == sum(part.seconds for part in plan.time)
    assert plan.time[1].source.startswith("4 matrices with 20480 entries took ")
    assert plan.time[1].source.endswith(" s here, and all have 1 times as many")


def test_extract(fine, tmp_path):
    before = tree(tmp_path)
    plan = plan_extraction(fine.specs, tmp_path / "out", base=fine.base, rank=2)
    assert tree(tmp_path) == before
    assert (plan.changed, plan.copied) == (4, 3)
    (adapters,) = plan.writes
    assert adapters.size_bytes == 3 * 4 * 2 * (80 + 64) * 4
    assert [read.spec for read in plan.reads] == [str(fine.base), *fine.specs]


@pytest.mark.parametrize("known", [False, True])
def test_pack(fine, tmp_path, known):
    before = tree(tmp_path)
    plan = plan_pack(fine.specs, tmp_path / "out", base=fine.base if known else None)
    assert tree(tmp_path) == before
    assert [part.what for part in plan.time] == [
        "opening",
        *["recovering"] * (not known),
        *("fitting adapters", "compressing", "reading and hashing"),
    ]
    (pack,) = plan.writes
    assert detune.pack(fine.models, tmp_path / "out", base=fine.base).pack_bytes < pack.size_bytes


PROGRESS = {"on_start", "on_tensor", "executor", "message"}
"""Parameters that say how a command is run or told, and change nothing of what it would do."""


@pytest.mark.parametrize(
    ("plan", "twin"),
    [
        (plan_recovery, detune.recover),
        (plan_extraction, detune.extract),
        (plan_pack, detune.pack),
        (plan_push, detune.push),
    ],
)
def test_a_plan_takes_what_its_command_takes(plan, twin):
    expected = [each for each in inspect.signature(twin).parameters.values() if each.name not in PROGRESS]
    assert list(inspect.signature(plan).parameters.values()) == expected


def test_only_headers_and_rows_of_models_on_the_hub_are_read(hub, tmp_path):
    plain_family(hub.root / "org", n=4)
    plan = plan_recovery([f"org/model-{i}" for i in range(4)], tmp_path / "out", "mean")
    assert [read.download_bytes for read in plan.reads] == [read.size_bytes for read in plan.reads]
    assert plan.time[2].what == "downloading"
    assert plan.time[2].seconds == pytest.approx(sum(read.size_bytes for read in plan.reads) / 12.5e6)
    assert not list(tmp_path.rglob("*hub-cache*/**/model.safetensors"))


def test_what_the_command_would_refuse_is_refused(fine, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="2 models given, auto needs at least three"):
        plan_recovery(fine.specs[:2], tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for plan in (plan_recovery, lambda *words: plan_extraction(*words, base=fine.base), plan_pack):
        with pytest.raises(OutputError, match="full exists"):
            plan(fine.specs, tmp_path / "full")
    edit(fine.base, lambda state: (state.clear(), state.update(other=torch.ones(8, 8))))
    with pytest.raises(InputError, match="does not fit"):
        plan_extraction(fine.specs, tmp_path / "out", base=fine.base)
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(OutputError, match="no space left"):
        plan_recovery(fine.specs, tmp_path / "out")


def test_models_that_do_not_differ_take_no_time_to_compute(fine, tmp_path):
    def level(state):
        state.update({name: torch.zeros_like(state[name]) for name in state if "layer" in name})

    for model in fine.models:
        edit(model, level)
    for i, model in enumerate(fine.models):
        edit(model, lambda state, i=i: state.update({"norm.weight": state["norm.weight"] + i}))
    plan = plan_recovery(fine.specs, tmp_path / "out")
    assert (plan.changed, plan.copied) == (1, 6)
    assert [(part.what, part.source) for part in plan.time[:1]] == [("opening", "what that took here")]
    assert [part.what for part in plan.time[1:]] == ["reading and hashing"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["recover", "{models}", "--out", "{out}"], ["4 tensors to compute, 3 to copy", "would write checkpoint "]),
        (["extract", "{models}", "--base", "{base}", "--out", "{out}"], ["would write adapters ", "11 files, about"]),
        (["pack", "{models}", "--out", "{out}"], ["would write pack ", "1 file, at most 0.3 MB", "compressing "]),
    ],
)
def test_from_the_command_line(command, fine, tmp_path, words, says):
    filled = {"{base}": [fine.base], "{models}": fine.models}
    words = [each for word in words for each in filled.get(word, [word.replace("{out}", str(tmp_path / "out"))])]
    before = tree(tmp_path)
    ran = command(*words, "--dry-run")
    assert (ran.code, ran.err) == (0, "")
    for part in [*says, "MB are free there", "to a factor of two or so; nothing was written"]:
        assert part in ran.out
    shown = require_valid("plan", command(*words, "--dry-run", "--json").out)
    assert shown["command"] == words[0]
    assert shown["time"][0]["what"] == "starting"
    assert math.isclose(shown["seconds"], sum(part["seconds"] for part in shown["time"]))
    assert tree(tmp_path) == before


def test_push_asks_the_hub_and_sends_nothing(command, hub, fine, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.token = TOKEN
    ran = command("push", fine.models[0], "org/base", "--dry-run")
    assert (ran.code, ran.err) == (0, "")
    assert "would write upload org/base: 2 files, at most 0.1 MB" in ran.out
    assert "at 100 Mbit/s, an assumption" in ran.out
    assert hub.seen == ["GET /api/whoami-v2"]
    assert command("push", fine.models[0], "else/base", "--dry-run").code == 2
