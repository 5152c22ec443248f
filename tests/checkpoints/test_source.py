import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from detune.checkpoints import open_checkpoint
from detune.checkpoints.layout import pick_weights
from detune.checkpoints.stored_dtypes import DTYPES
from detune.errors import DetuneError, InputError


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and left.reshape(-1).view(torch.uint8).equal(right.contiguous().reshape(-1).view(torch.uint8))
    )


def stored(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


# --- what can be read ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reads_what_transformers_saved(tmp_path: Path, bert: Callable[..., Any], dtype: torch.dtype) -> None:
    model = bert(dtype)
    model.save_pretrained(tmp_path / "m")
    with open_checkpoint(str(tmp_path / "m")) as checkpoint:
        state = model.state_dict()
        assert set(checkpoint.tensors) == set(state)
        for name, info in checkpoint.tensors.items():
            tensor = checkpoint.read(name)
            assert same(tensor, state[name])
            assert (info.name, info.shape, info.dtype) == (name, tuple(tensor.shape), tensor.dtype)
            assert info.nbytes == tensor.nbytes
        assert checkpoint.total_bytes == sum(tensor.nbytes for tensor in state.values())


def test_reads_shards_in_the_order_of_the_files(sharded_dir: Path) -> None:
    checkpoint = open_checkpoint(sharded_dir)
    expected = stored(sharded_dir)
    assert "lm_head.weight" not in checkpoint.tensors  # tied: stored once
    assert set(checkpoint.tensors) == set(expected)
    assert all(same(checkpoint.read(name), expected[name]) for name in expected)
    assert [info.file for info in checkpoint.tensors.values()] == sorted(
        info.file for info in checkpoint.tensors.values()
    )
    assert checkpoint.index_files == ("model.safetensors.index.json",)
    assert [file.metadata for file in checkpoint.weight_files] == [{"format": "pt"}] * len(checkpoint.weight_files)


def test_reads_every_dtype(tmp_path: Path) -> None:
    state = {}
    for name, dtype in DTYPES.items():
        raw = torch.arange(2 * dtype.itemsize, dtype=torch.uint8) % 2
        state[name] = raw.view(dtype)
    state["scalar"] = torch.tensor(2.5)
    state["empty"] = torch.empty(0, 3)
    writable = {name: tensor for name, tensor in state.items() if name not in ("F8_E8M0",)}
    save_file(writable, tmp_path / "all.safetensors")
    checkpoint = open_checkpoint(tmp_path / "all.safetensors")
    assert set(checkpoint.tensors) == set(writable)
    for name, tensor in writable.items():
        assert same(checkpoint.read(name), tensor)


def test_reads_components_of_a_pipeline(pipeline_dir: Path) -> None:
    from diffusers import DiffusionPipeline

    checkpoint = open_checkpoint(pipeline_dir)
    pipeline = DiffusionPipeline.from_pretrained(pipeline_dir)
    expected = {
        f"{part}/{name}": tensor
        for part in ("transformer", "vae")
        for name, tensor in getattr(pipeline, part).state_dict().items()
    }
    assert set(checkpoint.tensors) <= set(expected)
    assert {name.split("/")[0] for name in checkpoint.tensors} == {"transformer", "vae"}
    assert all(same(checkpoint.read(name), expected[name]) for name in checkpoint.tensors)
    side = {path.as_posix() for path in checkpoint.side_files()}
    assert side == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "vae/config.json",
    }


def test_reads_sentence_transformers_modules(tmp_path: Path, bert_dir: Path) -> None:
    root = tmp_path / "st"
    shutil.copytree(bert_dir, root)
    modules = [{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}, {"idx": 2, "path": "2_Dense"}]
    (root / "modules.json").write_text(json.dumps(modules))
    for name in ("1_Pooling", "2_Dense"):
        (root / name).mkdir()
        (root / name / "config.json").write_text("{}")
    save_file({"linear.weight": torch.ones(2, 2)}, root / "2_Dense" / "model.safetensors")
    checkpoint = open_checkpoint(root)
    assert "2_Dense/linear.weight" in checkpoint.tensors
    assert "pooler.dense.weight" in checkpoint.tensors
    assert {"1_Pooling/config.json", "2_Dense/config.json"} <= {p.as_posix() for p in checkpoint.side_files()}


def test_reads_pickled_shards(bin_dir: Path) -> None:
    checkpoint = open_checkpoint(bin_dir)
    expected: dict[str, torch.Tensor] = {}
    for file in sorted(bin_dir.glob("*.bin")):
        expected |= torch.load(file, weights_only=True)
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in expected.items():
        read = checkpoint.read(name)
        assert same(read, tensor)
        assert read.is_contiguous()
        assert bytes(checkpoint.read_bytes(name)) == bytes(read.reshape(-1).view(torch.uint8).tolist())
    assert same(checkpoint.read("embed"), checkpoint.read("lm_head"))


def test_reads_one_file_and_leaves_its_neighbours_alone(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"w": torch.ones(3)}, tmp_path / f"{name}.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    assert (checkpoint.root, checkpoint.paths) == (tmp_path, (tmp_path / "a.safetensors",))
    assert checkpoint.side_files() == []


def test_reads_blocks(sharded_dir: Path) -> None:
    checkpoint = open_checkpoint(sharded_dir)
    name = "model.layers.0.mlp.up_proj.weight"
    whole = bytes(checkpoint.read_bytes(name))
    assert whole == checkpoint.read(name).view(torch.uint8).numpy().tobytes()
    out = memoryview(bytearray(100))
    blocks = b""
    for start in range(0, len(whole), 100):
        blocks += bytes(checkpoint.read_bytes(name, start, 100, out))
    assert blocks == whole


def test_hashes_equal_sha256sum(sharded_dir: Path) -> None:
    expected = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sharded_dir.glob("*.safetensors")}
    assert open_checkpoint(sharded_dir).hashes() == expected


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["pytorch_model.bin", "model.safetensors"], "model.safetensors"),
        (["model.safetensors", "model.safetensors.index.json"], "model.safetensors"),
        (["model.fp16.safetensors", "pytorch_model.bin"], "pytorch_model.bin"),
        (["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"],) * 2,
        (["model.safetensors.index.fp16.json", "model.fp16-00001-of-00002.safetensors"],) * 2,
        (["pytorch_model.bin.index.json", "training_args.bin"], "pytorch_model.bin.index.json"),
        (["consolidated.safetensors", "model.safetensors.index.json"], "model.safetensors.index.json"),
        (["my.weights.safetensors", "adapter_model.safetensors"], "my.weights.safetensors"),
        (["optimizer.bin", "scheduler.bin", "adapter_model.safetensors"], None),
    ],
)
def test_picks_what_a_loader_would_read(names: list[str], chosen: Any) -> None:
    assert pick_weights(names, "m") == (chosen[0] if isinstance(chosen, list) else chosen)


def test_refuses_to_guess_between_variants() -> None:
    with pytest.raises(InputError, match=r"several sets of weights; found model\.ema\.safetensors, model\.fp16"):
        pick_weights(["model.fp16.safetensors", "model.ema.safetensors"], "m")
    with pytest.raises(InputError, match="shards without their index"):
        pick_weights(["model-00001-of-00002.safetensors"], "m")


# --- the Hub, offline ---


def test_hub_id_from_the_cache(tmp_path: Path, bert_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repo, commit = tmp_path / "models--org--bert", "a" * 40
    shutil.copytree(bert_dir, repo / "snapshots" / commit)
    for revision in ("main", "v2"):
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / revision).write_text(commit)
    for spec in ("org/bert", "org/bert@v2"):
        checkpoint = open_checkpoint(spec)
        assert checkpoint.spec == spec
        assert same(
            checkpoint.read("pooler.dense.bias"),
            load_file(bert_dir / "model.safetensors")["pooler.dense.bias"],
        )
    with pytest.raises(InputError, match=r"'org/bert@v3' is not an existing path, and cannot be fetched"):
        open_checkpoint("org/bert@v3")


# --- bad input ---


@pytest.mark.parametrize(
    ("table", "data", "message"),
    [
        (b"{", b"", "not valid JSON"),
        (b"\xff\xfe", b"", "not valid JSON"),
        (b"[" * 100_000, b"", "not valid JSON"),
        (b"[]", b"", "no table"),
        (b'{"a": {}, "a": {}}', b"", "a name appears twice"),
        ({"__metadata__": {"a": 1}}, b"", "malformed __metadata__"),
        ({"a": {"dtype": "F32"}}, b"", "tensor 'a' .* malformed header entry"),
        ({"a": {"dtype": "Q4", "shape": [2], "data_offsets": [0, 1]}}, b"1", "'a' in .* unknown dtype Q4"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 0]}}, b"", "impossible shape"),
        ({"a": {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 6]}}, b"", "impossible shape"),
        (
            {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
            b"1234",
            "offsets that do not fit its shape",
        ),
        (
            {"a": {"dtype": "U8", "shape": [4], "data_offsets": [-4, 0]}},
            b"",
            "offsets that do not fit its shape",
        ),
        (
            {"a": {"dtype": "U8", "shape": [2**62], "data_offsets": [0, 2**62]}},
            b"1",
            "truncated; tensor 'a' ends",
        ),
        ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}, b"12", "'a' .* leaves a gap"),
        ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"12", "bytes no tensor owns"),
        (
            {
                "a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},
                "b": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]},
            },
            b"123",
            "tensor 'b' in .* overlaps",
        ),
    ],
)
def test_hostile_headers(tmp_path: Path, write_raw: Callable[..., Path], table: Any, data: bytes, message: str) -> None:
    path = write_raw(tmp_path / "x.safetensors", table, data)
    with pytest.raises(InputError, match=message) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_headers_that_lie_about_their_length(tmp_path: Path, write_raw: Callable[..., Path]) -> None:
    path = write_raw(tmp_path / "x.safetensors", b"{}", length=2**63)
    with pytest.raises(InputError, match=r"its header claims 9223372036854775808 bytes and the file has 10"):
        open_checkpoint(path)
    with path.open("r+b") as file:  # a sparse file of that size
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(300_000_000)
    with pytest.raises(InputError, match="at most 33554432 are accepted"):
        open_checkpoint(path)
    path.write_bytes(b"123")
    with pytest.raises(InputError, match="truncated; it has 3 bytes"):
        open_checkpoint(path)


def test_truncated_shard(tmp_path: Path, sharded_dir: Path) -> None:
    root = tmp_path / "m"
    shutil.copytree(sharded_dir, root)
    shard = sorted(root.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(InputError, match=rf"{shard.name} is truncated; tensor 'model\."):
        open_checkpoint(root)


def test_file_cut_after_opening(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.ones(100)}, path)
    checkpoint = open_checkpoint(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"shorter than when it was opened; tensor 'w'"):
        checkpoint.read("w")
    path.unlink()
    with pytest.raises(InputError, match=r"cannot read tensor 'w' .*No such file"):
        checkpoint.read("w")
    with pytest.raises(InputError, match="cannot read"):
        checkpoint.hashes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.pop("weight_map"), "not an index of shards"),
        (
            lambda index: index["weight_map"].update(x="gone.safetensors"),
            "names a missing file; expected gone",
        ),
        (
            lambda index: index["weight_map"].update(x="../../etc/passwd"),
            "places tensor 'x' outside its directory",
        ),
        (
            lambda index: index["weight_map"].update(x=next(iter(index["weight_map"].values()))),
            r"model-00001-of-\d+\.safetensors lacks tensor 'x'",
        ),
    ],
)
def test_bad_index(tmp_path: Path, sharded_dir: Path, change: Callable[[Any], Any], message: str) -> None:
    root = tmp_path / "m"
    shutil.copytree(sharded_dir, root)
    path = root / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = dict(sorted(index["weight_map"].items(), key=lambda item: item[1]))
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(InputError, match=message):
        open_checkpoint(root)
    path.write_text("{")
    with pytest.raises(InputError, match=r"index\.json is not valid JSON"):
        open_checkpoint(root)


def test_tensor_stored_twice(tmp_path: Path, sharded_dir: Path) -> None:
    root = tmp_path / "m"
    shutil.copytree(sharded_dir, root)
    first, second, *_ = sorted(root.glob("*.safetensors"))
    save_file(load_file(first) | load_file(second), second)
    with pytest.raises(InputError, match=r"is stored twice; in .*00001.* and .*00002"):
        open_checkpoint(root)


def test_bad_specs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such model: '\./nothing'; neither an existing path nor a Hub id"):
        open_checkpoint("./nothing")
    with pytest.raises(InputError, match="holds no weights"):
        open_checkpoint(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"is a PEFT adapter, not a model.*write BASE\+ADAPTER"):
        open_checkpoint(tmp_path)
    (tmp_path / "x.onnx").touch()
    with pytest.raises(InputError, match=r"x\.onnx is not a weight file"):
        open_checkpoint(tmp_path / "x.onnx")


def test_incomplete_pipeline(tmp_path: Path, pipeline_dir: Path) -> None:
    root = tmp_path / "p"
    shutil.copytree(pipeline_dir, root)
    shutil.rmtree(root / "vae")
    with pytest.raises(InputError, match="incomplete; its component 'vae' is missing"):
        open_checkpoint(root)
    (root / "model_index.json").write_text(json.dumps({"../up": ["diffusers", "X"]}))
    with pytest.raises(InputError, match="names a component outside itself"):
        open_checkpoint(root)
    (root / "model_index.json").write_text("[]")
    with pytest.raises(InputError, match="malformed list of components"):
        open_checkpoint(root)


class Bomb:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_pickles_never_run_code(tmp_path: Path) -> None:
    path, crater = tmp_path / "pytorch_model.bin", tmp_path / "crater"
    torch.save({"w": torch.ones(2), "bomb": Bomb(crater)}, path)
    with pytest.raises(InputError, match=r"pytorch_model\.bin is not a plain table .* never runs code"):
        open_checkpoint(tmp_path)
    assert not crater.exists()
    torch.load(path, weights_only=False)
    assert crater.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "is not a table of tensors; got list"),
        ({"epoch": 3}, "other than plain tensors; entry 'epoch' is int"),
        ({"s": torch.eye(2).to_sparse()}, r"entry 's' would be made by torch\._utils\._rebuild_sparse_tensor"),
    ],
)
def test_pickles_of_other_things(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(InputError, match=message):
        open_checkpoint(tmp_path / "x.pt")


def test_damaged_pickle(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"w": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"x\.pt is damaged, or older than torch 1\.6"):
        open_checkpoint(path)


def test_errors_are_one_line() -> None:
    error = InputError("what\nhappened", "got  this", "try that")
    assert str(error) == "what happened; got this; try that"
    assert isinstance(error, DetuneError)
