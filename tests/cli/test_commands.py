"""The command as its users meet it: what it prints, how it exits, and that a failure leaves nothing behind."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file

import detune.cli
from detune.methods import SOLVERS, Auto
from tests.cases import normal, seeded
from tests.command import Ran
from tests.families import (
    Fine,
    State,
    add,
    delta,
    edit,
    plain_family,
    plain_state,
    same_bits,
    save_plain,
    shard,
    stored,
)

COMMAND = [sys.executable, "-c", "from detune.cli import main; main()"]


@pytest.fixture
def family(tmp_path: Path) -> Fine:
    return plain_family(tmp_path / "models")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work" / "out"


# --- what it does ---


def test_recovers_and_says_so(command, family, out):
    ran = command("recover", *family.specs, "--out", out)
    assert ran.code == 0
    assert ran.err == ""
    assert "layer.*.weight ×4" in ran.out
    assert "4 tensors to the storage floor" in ran.out
    assert "3 tensors identical in all models, copied" in ran.out
    assert f"wrote {out}" in ran.out
    for name, tensor in stored(family.base).items():
        torch.testing.assert_close(stored(out)[name], tensor, rtol=0, atol=1e-6)
    assert os.listdir(out.parent) == ["out"]


def test_prints_the_report_as_json(command, family, out):
    ran = command("recover", *family.specs, "--out", out, "--json")
    assert ran.err == ""
    written = json.loads((out / "detune.json").read_text())
    assert written.pop("files").keys() == {"README.md", "config.json", "model.safetensors"}
    for row, model in zip(written["inputs"], family.models, strict=True):
        assert row["spec"] == f"../../models/{model.name}", "a file that may be given away names no home"
        row["spec"] = str(model)
    assert json.loads(ran.out)["tensors"] == written["tensors"]
    assert json.loads(ran.out)["inputs"] == written["inputs"]
    assert json.loads(ran.out).keys() == written.keys()


def test_inspects_without_writing(command, family, out):
    before = sorted(out.parent.parent.rglob("*"))
    ran = command("inspect", *family.specs, "--json")
    assert (ran.code, ran.err) == (0, "")
    assert json.loads(ran.out)["summary"]["to the storage floor"] == 4
    ran = command("inspect", *family.specs)
    assert (ran.code, ran.err) == (0, "")
    assert "4 tensors to the storage floor" in ran.out
    assert sorted(out.parent.parent.rglob("*")) == before


def test_compares(command, family):
    ran = command("compare", family.models[0], family.base)
    assert (ran.code, ran.err) == (0, "")
    assert "3 of 7 tensors" in ran.out
    assert json.loads(command("compare", family.models[0], family.base, "--json").out)["summary"]["tensors"] == 7


def test_mean_takes_two_models(command, family, out):
    ran = command("recover", *family.specs[:2], "--out", out, "--method", "mean")
    assert (ran.code, ran.err) == (0, "")
    first, second = (stored(model)["layer.0.weight"] for model in family.models[:2])
    torch.testing.assert_close(stored(out)["layer.0.weight"], (first + second) / 2)


def test_rank_is_taken_as_the_most(command, family, out):
    command("recover", *family.specs, "--out", out, "--rank", "16")
    rows = json.loads((out / "detune.json").read_text())["tensors"]
    assert {tuple(row["ranks"]) for row in rows if row["ranks"]} == {(2, 2, 2)}


def test_overwrites_when_told(command, family, out):
    assert command("recover", *family.specs, "--out", out, "--method", "single").code == 0
    assert command("recover", *family.specs, "--out", out, "--overwrite").code == 0
    torch.testing.assert_close(stored(out)["layer.0.weight"], plain_state()["layer.0.weight"], rtol=0, atol=1e-6)
    assert os.listdir(out.parent) == ["out"]


def test_a_name_with_markup_in_it_is_printed_as_it_is(command, tmp_path):
    family = plain_family(tmp_path / "[bold]models")
    ran = command("recover", *family.specs, "--out", tmp_path / "[red]out")
    assert ran.code == 0
    assert "[red]out" in ran.out


def test_methods_are_named_as_their_files_are():
    assert list(detune.cli.METHODS) == list(SOLVERS)
    assert [solver.__module__ for solver in SOLVERS.values()] == [f"detune.methods.{name}" for name in SOLVERS]


def test_help_answers_without_torch():
    code = "import sys, detune.cli\ntry:\n  detune.cli.main()\nexcept SystemExit:\n  print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True)
    assert "recover" in done.stdout
    assert done.stdout.endswith("False\n")


# --- bad input: exit code 2, one line, nothing half-written ---


class Bad(NamedTuple):
    """One bad input.

    Attributes:
        spoil: Spoils a sound family, and returns the arguments to `detune recover` besides --out.
        says: Parts of the message, in order.
    """

    spoil: Callable[[Fine], Sequence[object]]
    says: tuple[str, ...]


def _changing(change: Callable[[State], Any], model: int = 2) -> Callable[[Fine], Sequence[object]]:
    def spoil(family: Fine) -> Sequence[object]:
        edit(family.models[model], change)
        return family.specs

    return spoil


def _truncate(family: Fine) -> Sequence[object]:
    file = family.models[1] / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    return family.specs


def _corrupt(family: Fine) -> Sequence[object]:
    with (family.models[1] / "model.safetensors").open("r+b") as file:
        file.seek(9)
        file.write(b"\xff\xfe")
    return family.specs


def _drop_shard(family: Fine) -> Sequence[object]:
    shard(family.models[1]).unlink()
    return family.specs


def _truncate_shard(family: Fine) -> Sequence[object]:
    file = shard(family.models[1])
    os.truncate(file, 40)
    return family.specs


def _copy(family: Fine) -> Sequence[object]:
    copied = family.models[0].with_name("copy")
    shutil.copytree(family.models[0], copied)
    return [*family.specs, copied]


def _other_base(family: Fine) -> Sequence[object]:
    """Two fine-tunes of one base, and one of another."""

    def replace(state: State) -> None:
        generator = seeded(5)
        state |= {name: normal(generator, *state[name].shape).float() for name in state if "layer" in name}

    extra = family.models[0].with_name("stranger")
    shutil.copytree(family.models[0], extra)
    edit(extra, replace)
    return [*family.specs[:2], extra]


def _all_strangers(family: Fine) -> Sequence[object]:
    for i, model in enumerate(family.models):
        generator = seeded(20 + i)
        edit(
            model,
            lambda state, generator=generator: state.update(
                {name: normal(generator, *state[name].shape).float() for name in state if "layer" in name}
            ),
        )
    return family.specs


def _high_ranks(family: Fine) -> Sequence[object]:
    """Differences of 56 of 64 dimensions still have a low rank, and leave more unknowns than numbers."""
    generator = seeded(6)
    base = normal(generator, 64, 64)
    states = [{"square.weight": add(base, delta(generator, base, 28))} for _ in range(3)]
    return [save_plain(family.base.with_name(f"square-{i}"), state) for i, state in enumerate(states)]


def _pickle(family: Fine) -> Sequence[object]:
    model = family.models[2]
    (model / "model.safetensors").unlink()
    torch.save({"layer.0.weight": Bomb(model)}, model / "pytorch_model.bin")
    return family.specs


class Bomb:
    """Leaves a file when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder / "exploded"),)


def _exchange(state: State) -> None:
    state.clear()
    state["attention.weight"] = torch.ones(8, 8)


def _rename(state: State) -> None:
    state["layer.9.weight"] = state.pop("layer.3.weight")


def _poison(value: float, name: str = "layer.2.weight") -> Callable[[State], None]:
    def poison(state: State) -> None:
        state[name] = state[name].clone()
        state[name].reshape(-1)[5] = value

    return poison


def _grow(name: str, rows: int) -> Callable[[State], None]:
    def grow(state: State) -> None:
        state[name] = torch.cat([state[name], torch.ones(rows, *state[name].shape[1:])])

    return grow


BAD = {
    "one model": Bad(lambda f: f.specs[:1], ("1 model given, auto needs at least three", "add a model")),
    "two models": Bad(lambda f: f.specs[:2], ("2 models given", "three", "splits into two adapters", "--method mean")),
    "no such model": Bad(lambda f: [*f.specs, "nowhere/at/all"], ("no such model", "nowhere/at/all", "check")),
    "an empty directory": Bad(
        lambda f: [*f.specs, (f.base.with_name("empty").mkdir(), f.base.with_name("empty"))[1]], ("empty", "weights")
    ),
    "not a checkpoint": Bad(lambda f: [*f.specs, f.base / "config.json"], ("config.json", "is not a weight file")),
    "another architecture": Bad(
        _changing(_exchange), ("model-2", "does not fit", "model-0", "0 of 7 tensors are alike", "one architecture")
    ),
    "truncated": Bad(_truncate, ("model-1", "model.safetensors", "truncated", "again")),
    "truncated shard": Bad(_truncate_shard, ("model-1", "model-00002-of-00002", "truncated", "again")),
    "corrupt": Bad(_corrupt, ("model-1", "model.safetensors", "not valid JSON", "again")),
    "missing shard": Bad(
        _drop_shard, ("model-1", "model.safetensors.index.json", "missing file", "model-00002-of-00002")
    ),
    "NaN": Bad(_changing(_poison(float("nan"))), ("layer.2.weight", "model-2", "holds NaN or Inf", "leave it out")),
    "Inf": Bad(_changing(_poison(float("inf")), 0), ("layer.2.weight", "model-0", "holds NaN or Inf")),
    "NaN in a vector": Bad(_changing(_poison(float("nan"), "norm.weight")), ("norm.weight", "model-2", "NaN")),
    "given twice": Bad(lambda f: [*f.specs, f.specs[1]], ("model-1", "given twice", "the same path", "once")),
    "given twice under another name": Bad(
        lambda f: [*f.specs, f"{f.models[1]}/../model-1"], ("model-1", "given twice", "the same path")
    ),
    "a copy": Bad(_copy, ("copy", "given twice", "model-0", "once")),
    "another base": Bad(_other_base, ("stranger", "full rank", "layer.0.weight", "leave it out", "at least 3")),
    "three bases": Bad(_all_strangers, ("model-0", "model-1", "full rank", "fine-tunes of one base")),
    "high ranks": Bad(_high_ranks, ("square.weight", "too high", "64x64", "add models")),
    "pickled code": Bad(_pickle, ("model-2", "pytorch_model.bin", "never runs code", "convert")),
    "unknown device": Bad(lambda f: [*f.specs, "--device", "abacus"], ("abacus", "--device cpu")),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=[name.replace(" ", "_") for name in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(command, family, out, bad):
    arguments = bad.spoil(family)
    ran = command("recover", *arguments, "--out", out)
    assert_refused(ran, bad.says)
    assert os.listdir(out.parent) == []
    assert not list(family.base.parent.rglob("exploded"))


def assert_refused(ran: Ran, says: Sequence[str]) -> None:
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.startswith("detune: error: ")
    assert ran.err.endswith("\n")
    assert len(ran.err.splitlines()) == 1
    for part in says:
        assert part in ran.err


@pytest.mark.parametrize("name", ["NaN", "another base", "another architecture", "truncated", "given twice"])
def test_inspect_refuses_the_same(command, family, name):
    arguments = BAD[name].spoil(family)
    assert_refused(command("inspect", *arguments), BAD[name].says)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            _rename,
            ["model-2: it lacks 'layer.3.weight'", "it has in addition 'layer.9.weight'", "2 of 3 models have it"],
        ),
        (_grow("layer.1.weight", 3), ["'layer.1.weight' takes no part: shape [83, 64] instead of [80, 64]"]),
        (_grow("embed_tokens.weight", 4), ["'embed_tokens.weight' has 54 rows in it"]),
    ],
)
def test_what_fits_in_part_takes_part_there_and_that_is_said(command, family, tmp_path, change, says):
    edit(family.models[2], change)
    ran = command("recover", *family.specs, "--out", tmp_path / "out")
    assert ran.code == 0
    for sentence in says:
        assert sentence in ran.out


def test_compare_refuses_what_does_not_fit(command, family):
    edit(family.models[0], _grow("layer.1.weight", 3))
    says = ["layer.1.weight", "model-0", "[83, 64]", "[80, 64]", "one architecture"]
    assert_refused(command("compare", family.models[0], family.base), says)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--rank", "0"], "neither a positive number nor 'auto'"),
        (["--rank", "many"], "neither a positive number nor 'auto'"),
        (["--method", "magic"], "'magic' is not one of"),
        (["--merge-dtype", "int8"], "'int8' is not one of"),
        (["--fast"], "--fast"),
    ],
)
def test_bad_options_exit_with_2(command, family, out, words, says):
    ran = command("recover", *family.specs, "--out", out, *words)
    assert ran.code == 2
    assert says in ran.err
    assert os.listdir(out.parent) == []


@pytest.mark.parametrize("verb", ["inspect", "recover"])
def test_what_is_wrong_on_the_hub_is_one_line(command, hub, out, verb):
    plain_family(hub.root / "org")
    words = ["--out", out] if verb == "recover" else []
    models = ["org/model-0", "org/model-1", "org/model-2@v9"]
    says = ["'org/model-2' has no revision 'v9' on the Hub; it answered 404", "give a branch, a tag or a commit"]
    assert_refused(command(verb, *models, *words), says)
    assert os.listdir(out.parent) == []


def test_inspect_and_family_say_how_much_they_read(command, family):
    for verb in ("inspect", "family"):
        ran = command(verb, *family.specs, "--rows", "64")
        # 4 layers of 80 rows; what else there is, is read whole.
        assert "looked at 64 rows of each matrix at most: read 0.2 MB of 0.3 MB, 80.8 %; the rest may differ" in ran.out
        assert "looked at" not in command(verb, *family.specs).out
        assert_refused(command(verb, *family.specs, "--rows", "8"), ["8 rows of each matrix", "64 at least"])
        assert "neither a number nor 'auto' or 'all'" in command(verb, *family.specs, "--rows", "few").err


@pytest.mark.parametrize("content", ["notes.txt", "config.json"])
def test_output_that_is_not_empty_stays_as_it_is(command, family, out, content):
    out.mkdir()
    (out / content).write_text("mine")
    ran = command("recover", *family.specs, "--out", out)
    assert_refused(ran, [str(out), "exists and is not empty", "choose another"])
    assert (out / content).read_text() == "mine"
    assert os.listdir(out.parent) == ["out"]


def test_overwrite_spares_what_is_no_checkpoint(command, family, out):
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert_refused(
        command("recover", *family.specs, "--out", out, "--overwrite"), ["cannot be overwritten", "it holds notes.txt"]
    )
    assert os.listdir(out) == ["notes.txt"]


def test_overwrite_spares_its_inputs(command, family):
    before = stored(family.models[1])
    ran = command("recover", *family.specs, "--out", family.models[1], "--overwrite")
    assert_refused(ran, ["model-1", "cannot be overwritten", "input"])
    assert all(same_bits(before[name], tensor) for name, tensor in stored(family.models[1]).items())


def test_failure_keeps_the_checkpoint_that_was_to_be_overwritten(command, family, out):
    assert command("recover", *family.specs, "--out", out, "--method", "single").code == 0
    edit(family.models[2], _poison(float("nan")))
    before = (out / "model.safetensors").read_bytes()
    assert command("recover", *family.specs, "--out", out, "--overwrite").code == 2
    assert (out / "model.safetensors").read_bytes() == before
    assert os.listdir(out.parent) == ["out"]


# --- no space left ---


def test_too_small_a_disk_is_noticed_before_anything_is_written(command, family, out, monkeypatch):
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
    assert_refused(command("recover", *family.specs, "--out", out), ["no space left", str(out), "1000 available"])
    assert os.listdir(out.parent) == []


def test_a_disk_that_fills_up_on_the_way(command, family, out, monkeypatch):
    real, left = os.pwrite, [30_000]

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    assert_refused(command("recover", *family.specs, "--out", out), ["no space left", "model.safetensors", "free"])
    assert [name[:16] for name in os.listdir(out.parent)] == [".out.recovering-"]


# --- interruption ---


def test_ctrl_c_leaves_nothing_that_passes_for_a_result(command, family, out, monkeypatch):
    def solve(self: Auto, stack: Any, rank: int | None = None) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Auto, "solve", solve)
    ran = command("recover", *family.specs, "--out", out)
    assert ran.code == 130
    assert ran.err.strip() == "detune: interrupted, nothing unfinished passes for a result"
    # The embedding was complete.
    assert [name[:16] for name in os.listdir(out.parent)] == [".out.recovering-"]


def test_a_real_run_reports_on_stdout_and_fails_on_stderr(family, out):
    words = ["recover", *family.specs, "--out", str(out), "--json"]
    done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert json.loads(done.stdout)["summary"]["to the storage floor"] == 4
    again = subprocess.run([*COMMAND, *words], capture_output=True, text=True, check=False)
    assert_refused(Ran(again.returncode, again.stdout, again.stderr), ["exists and is not empty"])


def test_what_the_disk_refuses_is_one_line(command, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "results/a.json")

    monkeypatch.setattr(detune.cli, "cli", refuse)
    ran = command("inspect", "a")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == ("detune: error: cannot read or write results/a.json; No space left on device; check the disk\n")


def test_so_is_what_it_refuses_safetensors(command, monkeypatch, tmp_path):
    monkeypatch.setattr(detune.cli, "cli", lambda **_: save_file({"a": torch.zeros(9)}, tmp_path / "gone" / "file"))
    ran = command("demo")
    assert (ran.code, ran.out) == (2, "")
    assert re.fullmatch(r"detune: error: cannot write a file; .*I/O error.*No such file.*; check the disk\n", ran.err)
