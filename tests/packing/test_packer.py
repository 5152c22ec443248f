"""Packs on disk: every byte comes back, and nothing that is damaged passes for whole."""

import dataclasses
import hashlib
import json
import resource
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zstandard
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import detune
from detune.errors import DetuneError, InputError, OutputError
from detune.packing import unpacker
from detune.packing.prediction import predict
from tests.cases import normal, seeded
from tests.families import Fine, edit, fine_tune, plain_family, stored, tree

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96, "vocab_size": 80}


@pytest.fixture
def fine(tmp_path: Path) -> Fine:
    return plain_family(tmp_path / "models")


@pytest.fixture
def packed(fine: Fine, tmp_path: Path) -> Path:
    detune.pack(fine.models, tmp_path / "pack", base=fine.base)
    return tmp_path / "pack"


def check(fine: Fine, folder: Path, **options: Any) -> detune.PackReport:
    """Pack, unpack, and compare every byte; the models are as they were."""
    before = [tree(model) for model in fine.models]
    report = detune.pack(fine.models, folder / "pack", **options)
    restored = detune.unpack(folder / "pack", folder / "again")
    assert [tree(folder / "again" / model.name) for model in fine.models] == before
    assert [tree(model) for model in fine.models] == before
    assert report.pack_bytes == (folder / "pack").stat().st_size
    assert report.input_bytes == restored.size_bytes == sum(len(data) for files in before for data in files.values())
    assert sum(report.parts_bytes.values()) < report.pack_bytes
    return report


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_merged_models_come_back(tmp_path, dtype):
    torch.manual_seed(0)
    fine = fine_tune(BertModel(BertConfig(**SMALL)).to(dtype), ["query", "value", "dense"], tmp_path / "models")
    report = check(fine, tmp_path, base=fine.base)
    assert report.parts_bytes["factors"] > 0
    # One base of three models, and less than a byte for each entry of what is left.
    assert report.ratio < report.zstd_ratio * {torch.float64: 0.8}.get(dtype, 0.65)


def test_without_a_base_it_is_recovered(fine, tmp_path):
    report = check(fine, tmp_path)
    assert report.ratio < 0.7
    assert {path.name for path in tmp_path.iterdir()} == {"models", "pack", "again"}


def test_one_model_with_its_base(fine, tmp_path):
    check(Fine(fine.base, fine.models[:1]), tmp_path, base=fine.base)


def test_shards_pickles_and_other_files(tmp_path):
    """A pickle is more than its tensors, and a directory more than its weights."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=False))
    fine = fine_tune(model, ["q_proj"], tmp_path / "models", max_shard_size="50KB")
    state = stored(fine.models[1])
    for file in fine.models[1].glob("model*"):
        file.unlink()
    transposed = state["model.layers.0.mlp.up_proj.weight"].T.contiguous().T
    torch.save(state | {"model.layers.0.mlp.up_proj.weight": transposed}, fine.models[1] / "pytorch_model.bin")
    for path, data in {".hidden": b"x", "logs/run.txt": b"y" * 9999, "empty": b"", "a/b/c.pt": b"\x80\x02."}.items():
        (fine.models[0] / path).parent.mkdir(parents=True, exist_ok=True)
        (fine.models[0] / path).write_bytes(data)
    check(fine, tmp_path, base=fine.base)


def test_files_that_models_share_are_stored_once(fine, tmp_path):
    noise = normal(seeded(1), 20_000).numpy().tobytes()
    for model in fine.models:
        (model / "tokenizer.model").write_bytes(noise)
    report = check(fine, tmp_path, base=fine.base)
    assert len(noise) / 2 < report.parts_bytes["files"] < 1.1 * len(noise)


def test_single_files(fine, tmp_path):
    models = []
    for model in fine.models:
        models.append(model.rename(model.with_suffix(".d")) / "model.safetensors")
        models[-1] = models[-1].rename(fine.base.with_name(f"{model.name}.safetensors"))
    detune.pack(models, tmp_path / "pack", base=fine.base)
    detune.unpack(tmp_path / "pack", tmp_path / "again")
    assert tree(tmp_path / "again") == {f"{m.stem}/{m.name}": m.read_bytes() for m in models}


def test_what_no_lora_explains_comes_back_too(fine, tmp_path):
    """A head anew, integers, another dtype, signs of zeros, infinities where the base has none."""
    edit(fine.models[0], lambda state: state["steps"].add_(9))
    edit(fine.models[0], lambda state: state["norm.weight"].mul_(-0.0))
    edit(fine.models[1], lambda state: state.update({"layer.3.weight": normal(seeded(7), 80, 64).float()}))
    edit(fine.models[1], lambda state: state.update({"layer.2.weight": state["layer.2.weight"].half()}))
    edit(fine.models[2], lambda state: state["norm.weight"].fill_(float("inf")))
    report = check(fine, tmp_path, base=fine.base)
    assert report.parts_bytes["plain"] > 80 * 64 * 3


def test_tensors_that_nobody_changed_are_stored_once(fine, tmp_path):
    report = check(fine, tmp_path, base=fine.base)
    manifest = read_manifest(tmp_path / "pack")
    codings = {name: [model["tensors"][name]["coding"] for model in manifest["models"]] for name in stored(fine.base)}
    assert codings["norm.weight"] == codings["steps"] == ["same"] * 3
    assert codings["layer.1.weight"] == ["predicted"] * 3
    assert report.models.keys() == {"model-0", "model-1", "model-2"}


def test_unpacking_needs_only_the_pack(packed, fine, tmp_path):
    expected = {model.name: tree(model) for model in fine.models}
    moved = packed.rename(tmp_path / "elsewhere")
    fine.base.rename(tmp_path / "gone")
    report = detune.unpack(moved, tmp_path / "again")
    assert {name: tree(Path(path)) for name, path in report.models.items()} == expected
    assert report.files == 6


def test_threads_do_not_change_a_prediction(packed, fine, tmp_path):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        detune.unpack(packed, tmp_path / "again")
    finally:
        torch.set_num_threads(threads)
    assert tree(tmp_path / "again" / "model-0") == tree(fine.models[0])


# --- damage ---


def read_manifest(pack: Path) -> dict[str, Any]:
    with zipfile.ZipFile(pack) as archive:
        content: dict[str, Any] = json.loads(zstandard.decompress(archive.read("manifest.json")))
    return content


def rewrite(pack: Path, change: Callable[[dict[str, bytes]], object]) -> None:
    """Alter the members of a pack, compressed as they are, and keep the archive sound."""
    with zipfile.ZipFile(pack) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(pack, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def edit_manifest(pack: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = read_manifest(pack)
    change(manifest)
    compressed = zstandard.ZstdCompressor().compress(json.dumps(manifest).encode())
    rewrite(pack, lambda members: members.update({"manifest.json": compressed}))


def refuse(pack: Path, tmp_path: Path, message: str) -> None:
    with pytest.raises(InputError, match=message):
        detune.unpack(pack, tmp_path / "again")
    assert not [path for path in tmp_path.iterdir() if "again" in path.name]


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_truncated_pack_is_refused(packed, tmp_path, share):
    data = packed.read_bytes()
    packed.write_bytes(data[: int(share * len(data))])
    refuse(packed, tmp_path, "pack is no pack, or is truncated.*copy the pack again")


def test_every_flipped_byte_is_found(packed, fine, tmp_path):
    """Whatever is hit, the pack is refused or the files are right."""
    data = packed.read_bytes()
    expected = {f"{model.name}/{file}": content for model in fine.models for file, content in tree(model).items()}
    refused = 0
    for place in range(11, len(data), len(data) // 40):
        packed.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
        try:
            detune.unpack(packed, tmp_path / f"again-{place}")
            assert tree(tmp_path / f"again-{place}") == expected
        except InputError:
            refused += 1
            assert not (tmp_path / f"again-{place}").exists()
    assert refused >= 35


def test_a_file_that_comes_back_otherwise_is_named(packed, tmp_path):
    """Sound zip, sound zstd, other numbers: the hash of the file tells."""

    def alter(members: dict[str, bytes]) -> None:
        member = next(name for name in members if name.startswith("residual/1/"))
        residual = bytearray(zstandard.decompress(members[member]))
        residual[-1] ^= 2
        members[member] = zstandard.ZstdCompressor().compress(bytes(residual))

    rewrite(packed, alter)
    refuse(packed, tmp_path, r"'model.safetensors' of model-1 does not come back from .*; its SHA-256 is [0-9a-f]{64}")


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("base/", "tensor '.*' of model-0"),
        ("factors/2/", "tensor 'layer.*' of model-2"),
        ("files/0", "file 'config.json' of model-0"),
        ("manifest.json", "the manifest"),
    ],
)
def test_a_missing_or_damaged_member_is_named(packed, tmp_path, kind, what):
    with zipfile.ZipFile(packed) as archive:
        member = next(name for name in archive.namelist() if name.startswith(kind))
    rewrite(packed, lambda members: members.update({member: members[member][:-5]}))
    refuse(packed, tmp_path, f"{what} in .*pack is damaged|of model-. does not come back")
    rewrite(packed, lambda members: members.pop(member))
    refuse(packed, tmp_path, f"{what} in .*pack is damaged.*no item named")


@pytest.mark.parametrize("path", ["../evil", "/tmp/evil", "a/../../evil", "", ".", "a//b", "..\\evil"])
def test_a_pack_writes_nowhere_else(packed, tmp_path, path):
    edit_manifest(packed, lambda manifest: manifest["models"][0]["files"][0].update(path=path))
    refuse(packed, tmp_path, "the manifest in .*pack is damaged; ValueError: a file is to go to")


@pytest.mark.parametrize("name", ["..", "a/b", "model-1"])
def test_a_pack_has_one_directory_for_each_model(packed, tmp_path, name):
    edit_manifest(packed, lambda manifest: manifest["models"][0].update(name=name))
    refuse(packed, tmp_path, "is damaged; ValueError: (a file is to go to|a model is to go|two files have one name)")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=2), "detune pack 2, expected detune pack 1"),
        (lambda m: m.pop("base"), "'base'"),
        (lambda m: m["models"][0]["files"][0].pop("sha256"), "sha256"),
        (lambda m: m["base"][0].update(dtype="F3"), "'F3'"),
        (
            lambda m: m["models"][0]["tensors"]["layer.0.weight"].update(coding="magic"),
            "'magic' is not a valid TensorCoding",
        ),
    ],
)
def test_another_manifest_is_refused(packed, tmp_path, change, message):
    edit_manifest(packed, change)
    refuse(packed, tmp_path, f"the manifest in .*pack is damaged; .*{message}")


@pytest.mark.parametrize("change", [{"index": 99}, {"rank": 50}, {"dtype": "F64"}, {"exponent": 2000}])
def test_a_tensor_told_wrongly_is_refused(packed, tmp_path, change):
    edit_manifest(packed, lambda manifest: manifest["models"][0]["tensors"]["layer.0.weight"].update(change))
    refuse(
        packed,
        tmp_path,
        r"tensor 'layer.0.weight' of model-0 in .* is damaged|of model-0 does not come|the manifest in .* is damaged",
    )


# Zeros that zstd brings from a gigabyte to some kilobytes.
BOMB_BYTES = 2**30


@pytest.fixture(scope="module")
def bomb() -> bytes:
    compressor = zstandard.ZstdCompressor().compressobj()
    block = bytes(2**24)
    return b"".join(compressor.compress(block) for _ in range(BOMB_BYTES // len(block))) + compressor.flush()


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ("files/0", r"file 'config.json' of model-0 in .* is damaged|'config.json' of model-0 does not come back"),
        ("base/0", r"tensor '.*' of model-0 in .* is damaged; ValueError: base/0 has more of \d+ bytes"),
        ("factors/0/", r"tensor '.*' of model-0 in .* is damaged; ValueError: factors/0/\d has more of \d+ bytes"),
        ("manifest.json", r"the manifest in .* is damaged; ValueError: it has more than \d+ bytes"),
    ],
)
def test_no_more_is_unpacked_than_was_declared(packed, tmp_path, bomb, member, message):
    with zipfile.ZipFile(packed) as archive:
        name = next(name for name in archive.namelist() if name.startswith(member))
    rewrite(packed, lambda members: members.update({name: bomb}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refuse(packed, tmp_path, message)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BOMB_BYTES / 4


def test_a_pack_that_grows_beyond_reason_is_refused(packed, tmp_path):
    edit_manifest(packed, lambda manifest: manifest["models"][0]["files"][0].update(size_bytes=2**40))
    refuse(packed, tmp_path, r"pack would grow from \d+ bytes to 10995\d+; expected at most 1000 times as much")


def test_a_pack_that_the_disk_cannot_hold_is_refused(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5000))
    with pytest.raises(OutputError, match=r"no space left for .*again; it needs \d+ bytes and .* has 5000 available"):
        detune.unpack(packed, tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(models={}),
        lambda m: m["models"].append(3),
        lambda m: m["models"][0].update(tensors=[]),
        lambda m: m["models"][0].update(name=3),
        lambda m: m["models"][0].update(spec="\ud800"),
        lambda m: m["models"][0].update(files="all"),
        lambda m: m["models"][0]["files"][0].update(size_bytes="55"),
        lambda m: m["models"][0]["files"][0].update(size_bytes=-1),
        lambda m: m["models"][0]["files"][0].update(size_bytes=2**70),
        lambda m: m["models"][0]["files"][0].update(spans=None),
        lambda m: m["models"][0]["files"][1]["spans"][0].update(offset=1.5),
        lambda m: m["models"][0]["files"][1]["spans"][0].update(offset=10**6),
        lambda m: m["models"][0]["files"][1]["spans"][0].update(tensor="none"),
        lambda m: m["models"][0]["files"][1]["spans"][1].update(offset=1),
        lambda m: m["base"][0].update(shape=[2**70]),
        lambda m: m["base"][0].update(shape=[2**40, 2**40]),
        lambda m: m["base"][0].update(shape="ab"),
        lambda m: m["base"][0].update(dtype=[]),
        lambda m: m["models"][0]["tensors"]["layer.0.weight"].update(index=-1),
        lambda m: m["models"][0]["tensors"]["layer.0.weight"].update(rank=10**9),
        lambda m: m["models"][0]["tensors"]["layer.0.weight"].update(exponent=10**400),
    ],
)
def test_a_manifest_of_other_kinds_is_refused(packed, tmp_path, change):
    edit_manifest(packed, change)
    refuse(packed, tmp_path, r"^((the manifest|tensor '.*' of model-0) in .*pack is damaged; |tensor '.*' has)[^\n]*$")


def test_other_files_are_no_packs(fine, tmp_path):
    refuse(fine.base / "config.json", tmp_path, "config.json is no pack")
    refuse(tmp_path / "absent", tmp_path, "cannot read .*absent")
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("hello", "world")
    refuse(tmp_path / "zip", tmp_path, "the manifest in .*zip is damaged.*no item named 'manifest.json'")


# --- refusals of `pack` ---


def test_a_pack_that_would_not_come_back_is_not_kept(fine, tmp_path, monkeypatch):
    """As if this machine predicted otherwise when unpacking."""

    def other(*arguments: Any) -> Any:
        prediction = predict(*arguments)
        return dataclasses.replace(prediction, values=prediction.values + 1)

    monkeypatch.setattr(unpacker, "predict", other)
    with pytest.raises(InputError, match=r"'model.safetensors' of model-0 does not come back"):
        detune.pack(fine.models, tmp_path / "pack", base=fine.base)
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def test_another_base_is_refused(fine, tmp_path):
    edit(fine.base, lambda state: [state[name].normal_(generator=seeded(5)) for name in state if "layer" in name])
    with pytest.raises(InputError, match=r"base is not the base of .*model-0; they differ at full rank in 4 of 4"):
        detune.pack(fine.models, tmp_path / "pack", base=fine.base)
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def test_two_models_need_a_base(fine, tmp_path):
    with pytest.raises(InputError, match="2 models given, auto needs at least three"):
        detune.pack(fine.models[:2], tmp_path / "pack")
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def test_nothing_is_overwritten(packed, fine, tmp_path):
    before = packed.read_bytes()
    with pytest.raises(OutputError, match="pack exists; expected a new file"):
        detune.pack(fine.models, packed, base=fine.base)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(OutputError, match="full exists; expected a new or empty directory"):
        detune.unpack(packed, tmp_path / "full")
    assert packed.read_bytes() == before


def test_links_to_directories_are_refused(fine, tmp_path):
    (fine.models[1] / "data").symlink_to(tmp_path)
    with pytest.raises(InputError, match="model-1/data is a link to a directory"):
        detune.pack(fine.models, tmp_path / "pack", base=fine.base)


def test_links_to_files_come_back_as_files(fine, tmp_path):
    (fine.models[1] / "blobs").mkdir()
    (fine.models[1] / "config.json").rename(fine.models[1] / "blobs" / "0")
    (fine.models[1] / "config.json").symlink_to("blobs/0")
    check(fine, tmp_path, base=fine.base)


def test_links_out_of_a_model_are_refused_but_for_weights(fine, tmp_path):
    (fine.models[1] / "model.safetensors").rename(tmp_path / "weights")
    (fine.models[1] / "model.safetensors").symlink_to(tmp_path / "weights")
    (tmp_path / "one").mkdir()
    check(fine, tmp_path / "one", base=fine.base)
    (fine.models[0] / "notes.txt").symlink_to("/etc/passwd")
    with pytest.raises(InputError, match=r"notes.txt is a link out of the model; it leads to /etc/passwd"):
        detune.pack(fine.models, tmp_path / "pack", base=fine.base)
    assert not (tmp_path / "pack").exists()


def test_models_merged_on_the_fly_are_refused(fine, tmp_path):
    detune.extract(fine.models, tmp_path / "adapters", base=fine.base)
    spec = f"{fine.base}+{tmp_path / 'adapters' / 'model-0'}"
    with pytest.raises(InputError, match="is no merged checkpoint; it is merged on the fly"):
        detune.pack([spec, fine.models[1]], tmp_path / "pack", base=fine.base)


def test_what_is_not_installed_is_named(fine, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(DetuneError, match=r"zstandard is not installed; pip install 'detune\[pack\]'"):
        detune.pack(fine.models, tmp_path / "pack", base=fine.base)


# --- the command ---


def test_from_the_command_line(fine, tmp_path, command):
    ran = command("pack", *fine.models, "--base", fine.base, "--out", tmp_path / "pack")
    assert ran.code == 0, ran.err
    assert "3 models in 6 files" in ran.out
    assert "every file has its hash" in ran.out
    ran = command("unpack", tmp_path / "pack", "--out", tmp_path / "again", "--json")
    assert json.loads(ran.out)["files"] == 6
    assert tree(tmp_path / "again" / "model-2") == tree(fine.models[2])
    ran = command("unpack", tmp_path / "pack", "--out", tmp_path / "again")
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "again exists" in ran.err


def test_json_has_the_ratios(fine, tmp_path, command):
    report = json.loads(command("pack", *fine.models, "--out", tmp_path / "pack", "--json").out)
    assert report["ratio"] == report["pack_bytes"] / report["input_bytes"]
    assert report["ratio"] < report["zstd_ratio"] < 1


def test_hashes_are_those_of_sha256sum(packed, fine):
    files = {file["path"]: file["sha256"] for file in read_manifest(packed)["models"][1]["files"]}
    assert files == {name: hashlib.sha256(data).hexdigest() for name, data in tree(fine.models[1]).items()}


def test_a_repeated_name_of_a_tensor_is_told_once(fine, tmp_path):
    """Tied weights in a pickle lie in one place under two names."""
    models = []
    for model in (fine.base, *fine.models):
        state = stored(model)
        models.append(tmp_path / "tied" / model.name)
        models[-1].mkdir(parents=True)
        torch.save(state | {"head.weight": state["layer.0.weight"]}, models[-1] / "pytorch_model.bin")
    check(Fine(models[0], tuple(models[1:])), tmp_path, base=models[0])


@pytest.mark.parametrize("place", ["models/model-0/pack", "models/model-1/a/b/pack", "models/base/pack"])
def test_a_model_is_not_packed_into_itself(fine, tmp_path, place):
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=r"pack is the input .*, or lies inside it; expected a place elsewhere"):
        detune.pack(fine.models, tmp_path / place, base=fine.base)
    assert tree(tmp_path) == before
