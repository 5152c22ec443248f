"""The runner: cells, draws, resuming, methods of the user's, and what it says when they fail."""

import errno
import json
import math
import os
from pathlib import Path

import pytest
import torch

from detune._runtime import global_seed
from detune.bench import run as runner
from detune.bench.behaviour import Differences
from detune.bench.methods import find_method
from detune.bench.results import EXACT_W_ERROR, Environment, ResultStore
from detune.bench.run import Judge, draw, plan, run, run_all
from detune.checkpoints import open_checkpoint
from detune.errors import InputError, OutputError
from detune.methods import SOLVERS, Spectral
from detune.metrics import w_error


def methods(subset, *names):
    return [find_method(name, subset) for name in names]


@pytest.fixture
def store(tmp_path) -> ResultStore:
    return ResultStore(tmp_path / "results")


def test_a_cell_holds_what_the_solver_gives(subset, store):
    (result,) = run(subset, plan(subset, methods(subset, "auto"), [3]), store)
    layers = list(subset.layers())
    assert [layer.name for layer in result.layers] == [layer.name for layer in layers]
    for found, layer in zip(result.layers, layers, strict=True):
        recovery = SOLVERS["auto"]().solve(stack_of(layer, result.cell.loras), 2)
        assert found.w_error == w_error(recovery.weight.float(), layer.weight)
        assert found.ranks == (2, 2, 2)
        assert found.seconds > 0
    assert result.w_error == pytest.approx(sum(layer.w_error for layer in result.layers) / 4)
    assert result.w_error < -15
    assert result.environment.threads == 1
    assert len(result.environment.code_sha256) == 64


def stack_of(layer, loras):
    from detune.problem import Stack

    return Stack.of([layer.merged(i) for i in loras])


def test_a_finished_cell_is_never_run_again(subset, store, monkeypatch):
    tasks = plan(subset, methods(subset, "mean", "auto"), [3])
    first = run(subset, tasks, store)
    monkeypatch.setattr(runner, "solve_layer", None)
    assert run(subset, tasks, store) == first


def test_a_killed_run_goes_on_with_the_layer_it_was_at(subset, store, monkeypatch):
    tasks = plan(subset, methods(subset, "mean", "auto"), [3])
    solve, solved = runner.solve_layer, []

    def count(layer, task, device):
        if len(solved) == 5:
            raise KeyboardInterrupt
        solved.append((layer.index, task.cell.method))
        return solve(layer, task, device)

    monkeypatch.setattr(runner, "solve_layer", count)
    with pytest.raises(KeyboardInterrupt):
        run(subset, tasks, store)
    assert not list(store.folder.glob("*.json")), "nothing unfinished looks finished"
    monkeypatch.setattr(
        runner, "solve_layer", lambda *args: (solved.append((args[0].index, args[1].cell.method)), solve(*args))[1]
    )
    results = run(subset, tasks, store)
    assert len(solved) == len(set(solved)) == 8
    assert [len(result.layers) for result in results] == [4, 4]
    assert not (store.folder / ".partial").exists()


@pytest.mark.parametrize("writes", [0, 1, 3, 5])
def test_a_full_disk_is_one_line_and_the_run_goes_on_later(subset, store, monkeypatch, writes):
    tasks = plan(subset, methods(subset, "mean"), [3])
    write_bytes, left = Path.write_bytes, [writes]

    def until_full(path, data):
        left[0] -= 1
        if left[0] < 0:
            write_bytes(path, data[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write_bytes(path, data)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", until_full)
        with pytest.raises(OutputError, match=r"^no space left for [^\n]*; free some space or choose another disk$"):
            run(subset, tasks, store)
    (result,) = run(subset, tasks, store)
    assert len(result.layers) == 4
    assert not list(store.folder.rglob(".*.json.*"))


def test_a_method_named_twice_is_one_cell(subset, store):
    results = run(subset, plan(subset, methods(subset, "mean", "mean"), [3]), store)
    assert results[0] == results[1]
    assert len(results[0].layers) == 4
    assert len(list(store.folder.glob("*.json"))) == 1


def test_two_runs_at_one_cell_are_refused(subset, store):
    tasks = plan(subset, methods(subset, "mean"), [3])
    with (
        store.claim(tasks[0].cell, Environment.now("cpu")),
        pytest.raises(OutputError, match=r"another run is at small\.mean\.n3.*; wait for it"),
    ):
        run(subset, tasks, store)
    run(subset, tasks, store)


def test_what_other_code_left_unfinished_is_dropped(subset, store):
    (task,) = plan(subset, methods(subset, "mean"), [3])
    here = Environment.now("cpu")
    result, _ = runner.solve_layer(subset.first(), task)
    with store.claim(task.cell, here.model_copy(update={"code_sha256": "0"})):
        store.keep_layer(task.cell, result, None)
    with store.claim(task.cell, here):
        assert not store.has_layer(task.cell, 0, with_weight=False)
        store.keep_layer(task.cell, result, None)
    with store.claim(task.cell, here):
        assert store.has_layer(task.cell, 0, with_weight=False)


@pytest.mark.parametrize("what", ["00000.txt", "00000.safetensors"])
@pytest.mark.parametrize(
    "damage", [lambda data: data[:-2], lambda data: b"", lambda data: data[:-2] + b"\7" + data[-1:]]
)
def test_a_layer_that_was_damaged_since_is_computed_again(subset, store, what, damage):
    (task,) = plan(subset, methods(subset, "mean"), [3])
    result, weight = runner.solve_layer(subset.first(), task)
    with store.claim(task.cell, Environment.now("cpu")):
        store.keep_layer(task.cell, result, weight)
        assert store.has_layer(task.cell, 0, with_weight=True)
        (file,) = store.folder.rglob(what)
        file.write_bytes(damage(file.read_bytes()))
        assert not store.has_layer(task.cell, 0, with_weight=True)
    run(subset, [task], store)
    assert store.read(task.cell).layers[0].mse == result.mse


def test_an_exact_layer_counts_as_better_than_any_error(subset, store):
    (result,) = run(subset, plan(subset, methods(subset, "auto"), [4]), store)
    exact = result.layers[0].model_copy(update={"mse": 0.0})
    better = result.model_copy(update={"layers": (exact, *result.layers[1:])})
    assert exact.w_error == EXACT_W_ERROR < -31
    assert better.w_error < result.w_error
    every = result.model_copy(update={"layers": (exact,) * 4})
    assert every.w_error == pytest.approx(EXACT_W_ERROR)


def test_draws_are_nested_and_differ():
    assert set(draw(15, 3, 7)) < set(draw(15, 8, 7))
    assert len({draw(15, 5, seed) for seed in range(6)}) > 3
    assert draw(4, 4, 1) == (0, 1, 2, 3)


def test_the_key_of_a_cell_is_all_that_decides_the_answer(subset):
    def name(**changes):
        (task,) = plan(subset, changes.pop("methods", methods(subset, "auto")), [3], **changes)
        return task.cell.name

    from detune.bench.methods import Method

    other = [Method.of(Spectral(iterations=7), "spectral")]
    names = {
        name(),
        name(seeds=[1]),
        name(rank_known=False),
        name(methods=methods(subset, "spectral")),
        name(methods=other),
    }
    assert len(names) == 5
    assert name() == name()


def test_cells_with_too_few_models_are_left_out(subset):
    tasks = plan(subset, methods(subset, "auto", "spectral", "mean"), [1, 2, 3])
    counts = [(task.cell.method, len(task.cell.loras)) for task in tasks]
    assert counts == [("auto", 3), ("spectral", 2), ("spectral", 3), ("mean", 1), ("mean", 2), ("mean", 3)]


def test_a_method_that_never_has_enough_models_is_named(subset):
    with pytest.raises(InputError, match=r"auto needs at least 3 models; asked for 1, 2; .*give --models 3"):
        plan(subset, methods(subset, "mean", "auto"), [1, 2])


@pytest.mark.parametrize("n", [0, 5])
def test_more_models_than_there_are_is_an_error(subset, n):
    with pytest.raises(InputError, match=rf"{n} models asked for; .* has 4 LoRAs; ask for 1 to 4"):
        plan(subset, methods(subset, "mean"), [n])


def test_where_a_method_has_no_answer_the_average_stands_in(subset, store):
    # Three LoRAs of rank 2 are solved; a method that is told that ranks are at most 1 cannot.
    from detune.bench.methods import Method
    from detune.problem import NotRecoverable, Recovery

    def refuse(stack, rank) -> Recovery:
        raise NotRecoverable("not today")

    tasks = plan(subset, [*methods(subset, "mean"), Method("never", "never", 1, refuse)], [3])
    mean, never = run(subset, tasks, store)
    assert [layer.failure for layer in never.layers] == ["not today"] * 4
    assert never.w_error == mean.w_error


class TestMethodsOfTheUsers:
    def write(self, folder: Path, body: str) -> str:
        file = folder / "mine.py"
        file.write_text(f"import torch\n\ndef best(models, rank):\n    {body}\n", encoding="utf-8")
        return f"{file}:best"

    def test_a_function_in_a_file_is_a_method(self, subset, store, tmp_path):
        name = self.write(tmp_path, "return models.median(dim=0).values")
        (task,) = plan(subset, methods(subset, name), [3])
        (result,) = run(subset, [task], store)
        layer = subset.first()
        expected = torch.stack([layer.merged(i) for i in task.cell.loras]).median(dim=0).values
        assert result.cell.method == "mine.best"
        assert result.layers[0].w_error == w_error(expected, layer.weight)

    def test_a_changed_file_is_another_cell(self, subset, tmp_path):
        cells = [
            plan(subset, methods(subset, self.write(tmp_path, body)), [3])[0].cell.name
            for body in ("return models[0]", "return models[1]")
        ]
        assert cells[0] != cells[1]

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            ("return models", r"mine\.best failed in row 0, layer 'encoder.*returned a tensor \(3, 32, 32\); expected"),
            ("return 3", r"returned 'int'; expected a tensor \(32, 32\)"),
            ("return models[0] / 0", r"returned NaN or Inf"),
            ("return nothing", r"mine\.py:best failed in row 0, layer 'encoder.*NameError: name 'nothing'"),
        ],
    )
    def test_its_claims_are_checked(self, subset, store, tmp_path, body, message):
        with pytest.raises(InputError, match=message):
            run(subset, plan(subset, methods(subset, self.write(tmp_path, body)), [3]), store)

    def test_what_is_not_there_is_named(self, subset, tmp_path):
        with pytest.raises(InputError, match=r"no method 'autp'.*did you mean 'auto'\?"):
            find_method("autp", subset)
        with pytest.raises(InputError, match=r"no file .*absent\.py"):
            find_method(f"{tmp_path}/absent.py:best", subset)
        name = self.write(tmp_path, "return models[0]").replace(":best", ":bset")
        with pytest.raises(InputError, match=r"has no function 'bset'; it has best"):
            find_method(name, subset)
        (tmp_path / "broken.py").write_text("def")
        with pytest.raises(InputError, match=r"broken\.py cannot be imported; SyntaxError"):
            find_method(f"{tmp_path}/broken.py:best", subset)


class Distance:
    """A behaviour that looks at one weight: what a judge hands on, without running a model."""

    def observe(self, model_dir: Path) -> torch.Tensor:
        with open_checkpoint(model_dir) as model:
            return model.read("encoder.layer.1.attention.self.value.weight")

    def compare(self, original: torch.Tensor, recovered: torch.Tensor) -> Differences:
        return Differences({"activation": float((original - recovered).abs().max())}, {"lpips": "cannot be had"})


def test_the_recovered_model_is_judged_whole(subset, store, bert_base):
    tasks = plan(subset, methods(subset, "mean", "auto"), [3])
    mean, auto = run(subset, tasks, store, judge=Judge(bert_base, Distance()))
    assert auto.behaviour["activation"] < 1e-7 < 1e-3 < mean.behaviour["activation"]
    assert auto.notes == ("lpips: cannot be had",)


def test_behaviour_is_compared_later_if_it_was_not_at_first(subset, store, bert_base):
    tasks = plan(subset, methods(subset, "mean"), [3])
    assert run(subset, tasks, store)[0].behaviour == {}
    judge = Judge(bert_base, Distance(), "inputs")
    (judged,) = run(subset, tasks, store, judge=judge)
    assert judged.behaviour["activation"] > 1e-3
    assert judged.judged_on == judge.digest
    assert run(subset, tasks, store) == [judged], "what is known is not forgotten"
    other = Judge(bert_base, Distance(), "other inputs")
    assert run(subset, tasks, store, judge=other)[0].judged_on == other.digest != judge.digest


def test_a_run_without_behaviour_says_why(subset, store, bert_base, tmp_path):
    (result,) = run_all(subset, plan(subset, methods(subset, "mean"), [3]), store)
    assert result.behaviour == {}
    assert result.notes == ("behaviour was not compared: no base at hand",)
    (result,) = run_all(subset, plan(subset, methods(subset, "single"), [3]), store, base=bert_base, behave=False)
    assert result.notes == ("behaviour was not compared: models were not run",)
    with pytest.raises(InputError, match=r"inputs .* are given, but no base at hand; .*give --base"):
        run_all(subset, plan(subset, methods(subset, "mean"), [3]), store, inputs=tmp_path)


def test_a_base_that_does_not_fit_is_refused(subset, store, tmp_path):
    from tests.families import plain_family

    judge = Judge(plain_family(tmp_path).base, Distance())
    with pytest.raises(InputError, match=r"row 0, layer 'encoder\.layer\.0.*is not in"):
        run(subset, plan(subset, methods(subset, "mean"), [3]), store, judge=judge)


def test_results_are_json_that_others_can_read(subset, store):
    run(subset, plan(subset, methods(subset, "auto"), [3]), store)
    (file,) = store.folder.glob("*.json")
    content = json.loads(file.read_text())
    assert set(content) == {"cell", "source", "environment", "layers", "behaviour", "notes", "judged_on"}
    assert content["cell"]["fingerprint"] == subset.fingerprint
    assert all(math.isfinite(layer["mse"]) for layer in content["layers"])


def test_a_foreign_file_among_the_results_is_named(store):
    store.folder.mkdir()
    (store.folder / "package.json").write_text("{}")
    with pytest.raises(InputError, match=r"package\.json is no result of `detune bench run`; cell: "):
        store.read_all()


def test_no_results_is_an_error(store):
    with pytest.raises(InputError, match=r"results holds no results; expected \*\.json"):
        store.read_all()


def test_running_leaves_the_global_generator_alone(subset, store):
    with global_seed(0):
        state = torch.get_rng_state()
        run(subset, plan(subset, methods(subset, "spectral"), [3]), store)
        assert torch.equal(torch.get_rng_state(), state)
