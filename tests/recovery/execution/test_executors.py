"""Recoveries by workers: the same bytes as in one process, whatever happens to the workers."""

import errno
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import detune
from detune.certificate.verdict import Verdict
from detune.errors import DetuneError, InputError, OutputError
from detune.recovery.execution import Processes, dask_workers, units
from detune.recovery.execution.executors.processes import cores
from tests.cases import seeded
from tests.families import Fine, add, delta, plain_family, plain_state, save_plain, shard, tree

distributed = pytest.importorskip("distributed")


@pytest.fixture(scope="module")
def processes() -> Iterator[Executor]:
    with Processes(2) as executor:
        yield executor


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as made:
        yield made


@pytest.fixture(scope="module")
def dask(cluster: Any) -> Iterator[Executor]:
    with dask_workers(cluster.scheduler_address) as executor:
        yield executor


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece for each tensor."""
    monkeypatch.setattr(units, "SMALLEST_BYTES", 1)


@pytest.fixture(scope="module")
def fine(tmp_path_factory: pytest.TempPathFactory) -> Fine:
    """A bf16 base that four float32 merges give away to the bit, in two shards."""
    folder, generator = tmp_path_factory.mktemp("models"), seeded(12)
    base = {name: weight.bfloat16().float() if weight.is_floating_point() else weight
            for name, weight in plain_state().items()}  # fmt: skip
    models = []
    for i in range(4):
        changed = {name: add(base[name], delta(generator, base[name], 2)) for name in base if "layer" in name}
        models.append(save_plain(folder / f"model-{i}", base | changed))
        shard(models[-1])
    return Fine(save_plain(folder / "base", base), tuple(models))


@pytest.fixture(scope="module")
def alone(fine: Fine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of them, with everything that can be asked for."""
    folder = tmp_path_factory.mktemp("alone")
    recover(fine, folder, adapters=folder / "loras")
    return folder


def recover(fine: Fine, folder: Path, **options: Any) -> detune.Report:
    options = {"mask": folder / "mask", "dtype": torch.bfloat16, "check": True} | options
    return detune.recover(fine.models, folder / "out", **options)


def results(folder: Path) -> dict[str, bytes]:
    """Every file but those of LoRAs and those that name directories and times."""
    return {name: data for name, data in tree(folder).items() if "lora" not in name and not name.endswith(".json")}


@pytest.mark.parametrize("kind", ["processes", "dask", "threads"])
def test_every_executor_gives_the_same_bytes(fine, alone, tmp_path, kind, request):
    executor = ThreadPoolExecutor(2) if kind == "threads" else request.getfixturevalue(kind)
    report = recover(fine, tmp_path, adapters=tmp_path / "loras", executor=executor)
    # Two weight files and the card of the base, and the mask.
    assert len(results(alone)) == 3 + 1
    assert results(tmp_path) == results(alone)
    loras = [f"{model.name}/adapter_model.safetensors" for model in fine.models]
    assert all((tmp_path / "loras" / name).read_bytes() == (alone / "loras" / name).read_bytes() for name in loras)
    expected = json.loads((alone / "out" / "detune.json").read_text())
    written = json.loads((tmp_path / "out" / "detune.json").read_text())
    for row in expected["tensors"] + written["tensors"]:
        del row["seconds"]
    assert written["tensors"] == expected["tensors"]
    assert written["inputs"] == expected["inputs"]
    assert written["adapters"] == expected["adapters"]
    assert {path.name for path in tmp_path.iterdir()} == {"out", "loras", "mask"}
    assert report.counts[Verdict.SHARED] == 3
    assert report.counts[Verdict.EXACT] >= 1


def test_progress_is_told_of_every_tensor(fine, processes, tmp_path):
    seen = []
    report = recover(fine, tmp_path, executor=processes, on_tensor=lambda *told: seen.append(told))
    assert len(seen) == 2 * len(report.tensors)
    assert {name for name, row in seen if row is None} == {row.name for row in report.tensors}
    assert {row for _, row in seen if row is not None} == set(report.tensors)


def test_processes_share_the_cores(processes):
    assert processes.submit(torch.get_num_threads).result() == max(1, cores() // 2)


def test_no_workers():
    with pytest.raises(InputError, match="0 workers: expected at least one"):
        Processes(0)


# --- workers that die ---


def kill_when_landing(folder: Path, pids: list[int]) -> threading.Thread:
    """SIGKILL to processes, as soon as the first line stands in a journal."""

    def wait() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if any(path.stat().st_size for path in folder.glob(".out.recovering-*/journal/*")):
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
                return
            time.sleep(0.001)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_a_killed_process_is_replaced(fine, alone, tmp_path):
    with Processes(1) as executor:
        victim = executor.submit(os.getpid).result()
        killer = kill_when_landing(tmp_path, [victim])
        recover(fine, tmp_path, executor=executor)
        killer.join()
        assert executor.submit(os.getpid).result() != victim
    assert results(tmp_path) == results(alone)


def test_a_killed_worker_of_a_cluster_is_replaced(fine, alone, cluster, dask, tmp_path, caplog):
    with caplog.at_level(logging.CRITICAL, "distributed"), distributed.Client(cluster, set_as_default=False) as client:
        victims = list(client.run(os.getpid).values())
        killer = kill_when_landing(tmp_path, victims[:1])
        recover(fine, tmp_path, executor=dask)
        killer.join()
    assert results(tmp_path) == results(alone)


def end(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Dying(Executor):
    """Workers that die over whatever they are given, as those do that run out of memory."""

    def submit(self, *_: Any, **__: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_exception(BrokenExecutor("a worker died"))
        return future


def test_workers_that_always_die_are_given_up(fine, tmp_path):
    with pytest.raises(DetuneError, match=r"workers died 3 times .*memory is short.*; what is complete stays"):
        recover(fine, tmp_path, executor=Dying())
    assert list(tmp_path.iterdir()) == []


def test_a_pool_that_cannot_replace_its_workers(fine, tmp_path):
    with ProcessPoolExecutor(1) as pool:
        with pytest.raises(Exception, match="terminated abruptly"):
            pool.submit(end).result()
        with pytest.raises(DetuneError, match=r"the executor has lost its workers; .*; what is complete stays"):
            detune.recover(fine.models, tmp_path / "out", executor=pool)


# --- runs that are cut off ---


@pytest.fixture(scope="module")
def killed(fine: Fine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves that was killed when its second matrix was solved."""
    folder = tmp_path_factory.mktemp("killed")
    code = f"""
import os, signal, torch, detune
from detune.recovery.execution import completed
torch.set_num_threads(1)
completed.RECORD_SECONDS = 0
solved = []
def on_tensor(name, row):
    solved.extend([name] if row and row.method != "copy" else [])
    if len(solved) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
detune.recover({fine.specs!r}, {str(folder / "out")!r}, mask={str(folder / "mask")!r}, check=True, dtype=torch.bfloat16,
    on_tensor=on_tensor)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    return folder


def journal(folder: Path) -> Path:
    (path,) = folder.glob(".out.recovering-*/journal/*")
    return path


def test_a_killed_run_is_finished_by_the_same_call(fine, alone, killed, tmp_path, solved):
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    assert [path.name[:16] for path in tmp_path.iterdir()] == [".out.recovering-"]
    lines = [json.loads(line.partition(" ")[2]) for line in journal(tmp_path).read_text().splitlines()]
    completed = [line["row"]["method"] for line in lines]
    before = sum(method != "copy" for method in completed)
    assert before in (1, 2)
    report = recover(fine, tmp_path)
    assert results(tmp_path) == results(alone)
    assert len(solved) == 4 - before
    assert len(report.tensors) == 7
    assert {path.name for path in tmp_path.iterdir()} == {"out", "mask"}


def test_what_a_killed_run_leaves_is_no_model(killed):
    files = list(killed.rglob("*.safetensors"))
    assert len(files) == 2
    for file in files:
        with pytest.raises(Exception, match=r"(?i)header|deserializ"):
            load_file(file)
    assert not list(killed.rglob("*.json"))


def test_a_line_that_was_cut_off_is_not_believed(fine, alone, killed, tmp_path, caplog):
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    journal(tmp_path).write_bytes(journal(tmp_path).read_bytes()[:-10])
    recover(fine, tmp_path)
    assert "1 lines of the journal in" in caplog.text
    assert results(tmp_path) == results(alone)


def test_a_file_that_was_lost_is_computed_again(fine, alone, killed, tmp_path, caplog):
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    next(tmp_path.glob(".out.recovering-*/checkpoint/*.safetensors")).unlink()
    recover(fine, tmp_path)
    assert re.search(
        r"\d of \d tensors in .* have changed since they were written, the first is '.*': they are", caplog.text
    )
    assert results(tmp_path) == results(alone)


@pytest.fixture(scope="module")
def interrupted_once(fine: Fine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves that was interrupted when all of its tensors were complete."""
    folder = tmp_path_factory.mktemp("interrupted")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("detune.recovery.api.require_unchanged", interrupt)
        with pytest.raises(KeyboardInterrupt):
            recover(fine, folder, adapters=folder / "loras")
    return folder


@pytest.fixture
def interrupted(interrupted_once: Path, tmp_path: Path) -> Iterator[Path]:
    """An interrupted run for one test, in its own place: adapters name their base, and elsewhere it is another run."""
    shutil.copytree(interrupted_once, tmp_path / "before")
    yield interrupted_once
    shutil.rmtree(interrupted_once)
    shutil.copytree(tmp_path / "before", interrupted_once)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["checkpoint", "parts", "journal"])
def test_what_has_changed_since_it_landed_is_computed_again(fine, alone, interrupted, solved, caplog, kind, seed):
    """Bits that flip, blocks of zeros, ends that are gone, and files that are anything else."""
    draw = random.Random(seed)
    damage(draw.choice(sorted(interrupted.glob(f".out.recovering-*/{kind}/*"))), draw)
    recover(fine, interrupted, adapters=interrupted / "loras")
    assert "computed again" in caplog.text
    assert len(solved) <= 4
    assert results(interrupted) == results(alone)
    for model in fine.models:
        name = f"loras/{model.name}/adapter_model.safetensors"
        assert (interrupted / name).read_bytes() == (alone / name).read_bytes()
    assert {path.name for path in interrupted.iterdir()} == {"out", "loras", "mask"}


def damage(file: Path, draw: random.Random) -> None:
    """Change a file's content; what is no tensor of a weight file does not count there."""
    data = bytearray(file.read_bytes())
    # The first bytes are left for the header.
    start = draw.randrange(len(data) // 2, len(data))
    kind = draw.choice(["bit", "zeros", "end", "other"])
    if kind == "bit":
        data[start] ^= 1 << draw.randrange(8)
    elif kind == "zeros":
        data[start:] = bytes(len(data) - start)
    elif kind == "end":
        del data[start:]
    else:
        data = bytearray(draw.randbytes(len(data)))
    file.write_bytes(data)


def test_what_landed_with_other_options_is_not_used(fine, killed, tmp_path, solved):
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    recover(fine, tmp_path, check=False)
    assert len(solved) == 4
    assert {path.name for path in tmp_path.iterdir()} == {"out", "mask"}


def interrupt(at: int) -> Callable[..., None]:
    """An `on_tensor` that presses Ctrl-C when a number of tensors are done."""
    rows: list[Any] = []

    def on_tensor(name: str, row: Any) -> None:
        rows.extend([row] if row else [])
        if len(rows) == at:
            raise KeyboardInterrupt

    return on_tensor


def test_what_landed_of_another_model_of_the_same_size_and_time_is_not_used(tmp_path, solved):
    fine = plain_family(tmp_path / "models")
    with pytest.raises(KeyboardInterrupt):
        detune.recover(fine.models, tmp_path / "out", "intersect", on_tensor=interrupt(3))
    file = fine.models[0] / "model.safetensors"
    before = file.stat()
    file.write_bytes((plain_family(tmp_path / "others", rank=3).models[0] / "model.safetensors").read_bytes())
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    solved.clear()
    detune.recover(fine.models, tmp_path / "out", "intersect")
    assert len(solved) == 4


def test_ctrl_c_loses_nothing_that_is_done(fine, alone, tmp_path, solved):
    options = {"adapters": tmp_path / "loras"}
    with pytest.raises(KeyboardInterrupt) as raised:
        recover(fine, tmp_path, on_tensor=interrupt(5), **options)
    assert "what is complete stays in" in raised.value.__notes__[0]
    assert [path.name[:16] for path in tmp_path.iterdir()] == [".out.recovering-"]
    before = len(solved)
    recover(fine, tmp_path, **options)
    assert len(solved) == 4
    assert before > 1
    assert results(tmp_path) == results(alone)
    for model in fine.models:
        file = f"loras/{model.name}/adapter_model.safetensors"
        assert (tmp_path / file).read_bytes() == (alone / file).read_bytes()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_full_disk_loses_nothing_that_is_done(fine, alone, tmp_path, monkeypatch, processes, workers):
    """A disk as large as the first shard's tensors: those of the second do not fit."""
    write = os.pwrite
    first = load_file(min((alone / "out").glob("*.safetensors")))
    left = [sum(tensor.nbytes for tensor in first.values())]

    def refuse(descriptor: int, data: Any, offset: int) -> int:
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", refuse)
    executor = ThreadPoolExecutor(1) if workers else None
    with pytest.raises(OutputError, match=r"no space left for .*the checkpoint needs .*; free some space"):
        recover(fine, tmp_path, executor=executor)
    monkeypatch.undo()
    assert 1 < journal(tmp_path).read_text().count("\n") <= len(first)
    recover(fine, tmp_path)
    assert results(tmp_path) == results(alone)


def test_two_runs_into_one_directory(fine, tmp_path):
    """The second is refused, with the same options or others, and the first ends as if it were alone."""

    def again(name: str, row: Any) -> None:
        if row is None and name == "layer.2.weight":
            for options in ({}, {"check": False}):
                with pytest.raises(OutputError, match=r"another run is writing to .*out; process \d+ on .* holds"):
                    recover(fine, tmp_path, **options)

    recover(fine, tmp_path, on_tensor=again)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "mask"}


def test_a_model_that_changes_meanwhile(tmp_path):
    fine = plain_family(tmp_path / "models")

    def touch(name: str, row: Any) -> None:
        if row is None and name == "layer.2.weight":
            os.utime(fine.models[1] / "model.safetensors", ns=(0, 0))

    with pytest.raises(InputError, match="a model has changed since the run began"):
        detune.recover(fine.models, tmp_path / "out", "intersect", on_tensor=touch)
    assert {path.name for path in tmp_path.iterdir()} == {"models"}


def test_a_scheduler_that_goes_away(fine, alone, tmp_path):
    """The run says so and ends; another, here or on another cluster, goes on."""
    scheduler = """
import distributed, time
if __name__ == "__main__":
    cluster = distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, protocol="tcp", dashboard_address=":0"
    )
    print(cluster.scheduler_address, flush=True)
    time.sleep(600)
"""
    (tmp_path / "run").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", scheduler], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        address = process.stdout.readline().strip()
        killer = kill_when_landing(tmp_path / "run", [process.pid])
        lost = pytest.raises(DetuneError, match=r"the executor dropped the work; .*; what is complete stays")
        with lost, dask_workers(address) as executor:
            recover(fine, tmp_path / "run", executor=executor)
        killer.join()
    assert [path.name[:16] for path in (tmp_path / "run").iterdir()] == [".out.recovering-"]
    recover(fine, tmp_path / "run")
    assert results(tmp_path / "run") == results(alone)
