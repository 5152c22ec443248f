import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from detune.checkpoints import Checkpoint, CheckpointWriter, new_directory, open_checkpoint
from detune.errors import OutputError


def copy_all(like: Checkpoint, out: Path, **options: Any) -> None:
    with CheckpointWriter(like, out, **options) as writer:
        for name in like.tensors:
            writer.copy(name)


def tree(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def like(sharded_dir: Path) -> Checkpoint:
    return open_checkpoint(sharded_dir)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work" / "out"


# --- round trips ---


@pytest.mark.parametrize("model", ["bert_dir", "sharded_dir", "pipeline_dir"])
def test_copy_is_byte_identical(request: pytest.FixtureRequest, model: str, out: Path) -> None:
    source: Path = request.getfixturevalue(model)
    copy_all(open_checkpoint(source), out)
    assert tree(out) == tree(source)
    assert os.listdir(out.parent) == ["out"]


def test_tied_model_loads_with_transformers(llama: Callable[..., Any], like: Checkpoint, out: Path) -> None:
    from transformers import AutoModelForCausalLM

    copy_all(like, out)
    model, expected = AutoModelForCausalLM.from_pretrained(out), llama(torch.bfloat16).state_dict()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(state[name].dtype == torch.bfloat16 and state[name].equal(expected[name]) for name in expected)


def test_pipeline_loads_with_diffusers(pipeline_dir: Path, out: Path) -> None:
    from diffusers import DiffusionPipeline

    like = open_checkpoint(pipeline_dir)
    changed = "vae/encoder.conv_in.weight"
    value = torch.full(like.tensors[changed].shape[::-1], 0.25).permute(3, 2, 1, 0)
    with CheckpointWriter(like, out) as writer:
        for name in like.tensors:
            if name == changed:
                writer.write(name, value)
            else:
                writer.copy(name)
    pipeline = DiffusionPipeline.from_pretrained(out)
    assert pipeline.vae.encoder.conv_in.weight.equal(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_written_values_are_rounded_to_the_stored_dtype(
    tmp_path: Path, bert: Callable[..., Any], out: Path, dtype: torch.dtype
) -> None:
    from transformers import AutoModel

    bert(dtype).save_pretrained(tmp_path / "m", max_shard_size="20KB")
    like = open_checkpoint(tmp_path / "m")
    generator = torch.Generator().manual_seed(5)
    values = {name: torch.randn(info.shape, generator=generator) for name, info in like.tensors.items()}
    with CheckpointWriter(like, out) as writer, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: writer.write(name, values[name]), reversed(like.tensors)))
    state = AutoModel.from_pretrained(out).state_dict()
    assert all(state[name].dtype == dtype and state[name].equal(values[name].to(dtype)) for name in values)
    # Only the data differ: headers, index and configuration are those of the input.
    before, after = tree(tmp_path / "m"), tree(out)
    assert before.keys() == after.keys()
    assert all(before[name] == after[name] for name in before if name.endswith(".json"))


@pytest.mark.parametrize(("dtype", "step"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_float64_is_rounded_once(tmp_path: Path, out: Path, dtype: torch.dtype, step: float) -> None:
    """Just beside a tie, by less than float32 can tell: rounding twice would go the wrong way."""
    save_file({"w": torch.zeros(6, dtype=dtype)}, tmp_path / "x.safetensors")
    like, tiny = open_checkpoint(tmp_path / "x.safetensors"), 2**-40
    above, below = 1 + step / 2 + tiny, 1 + 1.5 * step - tiny
    values = torch.tensor([above, -above, below, -below, 1 + step / 2, float("nan")], dtype=torch.float64)
    with CheckpointWriter(like, out) as writer:
        writer.write("w", values)
    written = load_file(out / "x.safetensors")["w"].tolist()
    assert written[:5] == [1 + step, -1 - step, 1 + step, -1 - step, 1.0]
    assert written[5] != written[5]


def test_pickled_shards_become_safetensors(bin_dir: Path, out: Path) -> None:
    like = open_checkpoint(bin_dir)
    copy_all(like, out)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted(tree(out)) == ["config.json", *names, "model.safetensors.index.json"]
    again = open_checkpoint(out)
    assert all(again.read(name).equal(like.read(name)) for name in like.tensors)
    assert all(load_file(out / name) for name in names)  # the safetensors library accepts them
    assert all(file.metadata == {"format": "pt"} for file in again.weight_files)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": like.total_bytes}
    assert set(index["weight_map"].values()) == set(names)


def test_pickled_model_loads_with_transformers(
    tmp_path: Path, bert: Callable[..., Any], out: Path, bert_dir: Path
) -> None:
    from transformers import AutoModel

    root = tmp_path / "m"
    root.mkdir()
    state = bert().state_dict()
    torch.save(state, root / "pytorch_model.bin")
    shutil.copy(bert_dir / "config.json", root)
    copy_all(open_checkpoint(root), out)
    assert sorted(tree(out)) == ["config.json", "model.safetensors"]
    loaded = AutoModel.from_pretrained(out).state_dict()
    assert all(loaded[name].equal(state[name]) for name in state)


def test_single_file(tmp_path: Path, out: Path) -> None:
    path = tmp_path / "lora.v2.safetensors"
    save_file({"w": torch.arange(5.0), "n": torch.tensor([1, 2])}, path, {"note": "kept"})
    copy_all(open_checkpoint(path), out)
    assert tree(out) == {path.name: path.read_bytes()}


def test_odd_headers_survive(tmp_path: Path, write_raw: Callable[..., Path], out: Path) -> None:
    table = (
        b'{ "b":{"shape":[1],"data_offsets":[2,3],"dtype":"U8"},\n"a":{"dtype":"F16","shape":[],"data_offsets":[0,2]}}'
    )
    path = write_raw(tmp_path / "x.safetensors", table, b"abc")
    copy_all(open_checkpoint(path), out)
    assert (out / path.name).read_bytes() == path.read_bytes()


def test_large_tensors_are_copied_in_blocks(tmp_path: Path, out: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.arange(5_000_001, dtype=torch.int32)}, path)  # 20 MB: two blocks
    copy_all(open_checkpoint(path), out)
    assert (out / path.name).read_bytes() == path.read_bytes()


# --- failures leave nothing ---


def fail_with(error: BaseException) -> Callable[[CheckpointWriter, Checkpoint], None]:
    def act(writer: CheckpointWriter, like: Checkpoint) -> None:
        writer.copy(next(iter(like.tensors)))
        raise error

    return act


def write_twice(writer: CheckpointWriter, like: Checkpoint) -> None:
    name = next(iter(like.tensors))
    writer.copy(name)
    writer.write(name, torch.zeros(like.tensors[name].shape))


def forget_one(writer: CheckpointWriter, like: Checkpoint) -> None:
    for name in list(like.tensors)[1:]:
        writer.copy(name)


def write_wrong_shape(writer: CheckpointWriter, like: Checkpoint) -> None:
    writer.write(next(iter(like.tensors)), torch.zeros(1, 1, 1))


def write_wrong_dtype(writer: CheckpointWriter, like: Checkpoint) -> None:
    name = next(iter(like.tensors))
    writer.write(name, torch.zeros(like.tensors[name].shape, dtype=torch.int64))


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (fail_with(RuntimeError("boom")), RuntimeError, "boom"),
        (fail_with(KeyboardInterrupt()), KeyboardInterrupt, "^$"),
        (write_twice, OutputError, "was written twice"),
        (forget_one, OutputError, r"1 of \d+ tensors were never written; the first is"),
        (write_wrong_shape, ValueError, r"has shape \(1, 1, 1\), expected"),
        (write_wrong_dtype, ValueError, r"is torch.int64, expected torch.bfloat16"),
    ],
)
def test_failure_leaves_nothing(
    like: Checkpoint, out: Path, act: Callable[..., None], error: type[BaseException], message: str
) -> None:
    with pytest.raises(error, match=message), CheckpointWriter(like, out) as writer:
        act(writer, like)
    assert os.listdir(out.parent) == []


def test_killed_process_leaves_no_checkpoint(sharded_dir: Path, out: Path) -> None:
    program = f"""
import os, signal
from detune.checkpoints import CheckpointWriter, open_checkpoint
like = open_checkpoint({str(sharded_dir)!r})
with CheckpointWriter(like, {str(out)!r}) as writer:
    for name in like.tensors:
        writer.copy(name)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", program], env=environment).returncode == -signal.SIGKILL
    assert not out.exists()
    (left,) = out.parent.iterdir()
    assert left.name.startswith(".out.partial-")
    assert not list(left.rglob("*.json"))
    for file in left.rglob("*.safetensors"):
        with pytest.raises(Exception, match=r"(?i)header|deserializ"):
            load_file(file)


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_disk_full_while_writing(like: Checkpoint, out: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(
        OutputError, match=r"no space left for .*(needs \d+ bytes and \d+ are available|No space left on device); free"
    ):
        copy_all(like, out)
    monkeypatch.undo()
    assert os.listdir(out.parent) == []


def test_disk_too_small_is_noticed_first(like: Checkpoint, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100))
    with pytest.raises(OutputError, match=r"no space left for .*out; it needs \d+ bytes and .* has 100 available"):
        copy_all(like, out)
    assert os.listdir(out.parent) == []


def test_unwritable_place(like: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        copy_all(like, tmp_path / "file" / "out")


def test_failing_rename_brings_the_old_directory_back(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out.mkdir()
    (out / "mark").touch()
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if ".partial-" in str(source):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OutputError, match="Input/output error"), new_directory(out, lambda _: None) as partial:
        (partial / "new").touch()
    assert (out / "mark").exists()
    assert os.listdir(out.parent) == ["out"]


# --- the output directory ---


def test_existing_directories(like: Checkpoint, out: Path) -> None:
    out.mkdir()
    copy_all(like, out)  # empty: fine
    with pytest.raises(OutputError, match=r"out exists and is not empty"):
        copy_all(like, out)
    assert tree(out) == tree(like.root)
    assert os.listdir(out.parent) == ["out"]


def test_output_appearing_meanwhile_is_kept(like: Checkpoint, out: Path) -> None:
    def somebody_else_writes(writer: CheckpointWriter) -> None:
        for name in like.tensors:
            writer.copy(name)
        out.mkdir()
        (out / "theirs").touch()

    with pytest.raises(OutputError, match="exists and is not empty"), CheckpointWriter(like, out) as writer:
        somebody_else_writes(writer)
    assert list(tree(out)) == ["theirs"]
    assert os.listdir(out.parent) == ["out"]


def test_a_link_stays_a_link(like: Checkpoint, out: Path, tmp_path: Path) -> None:
    link = tmp_path / "latest"
    out.mkdir()
    link.symlink_to(out)
    copy_all(like, link)
    assert link.is_symlink()
    assert tree(out) == tree(like.root)
