import json
import os
import shutil
from pathlib import Path

import pytest

import detune
from detune.checkpoints import CheckpointWriter, open_checkpoint
from detune.checkpoints.side_files import MAX_SIDE_FILE_BYTES, is_side_file
from detune.defences import Noise, defend
from detune.errors import InputError
from tests.families import plain_family, plain_state, save_plain, tree

TRAVELS = [
    "additional_chat_templates/rag.jinja",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "modeling_x.py",
    "sentence_bert_config.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "x.tiktoken",
]
STAYS = [
    ".cache/config.json",
    ".env",
    ".git/config",
    ".netrc",
    "adapter_config.json",
    "aws_config.json",
    "checkpoint-5/config.json",
    "checkpoint-5/model.safetensors",
    "credentials.json",
    "detune.json",
    "docs/config.json",
    "flax_model.msgpack",
    "model.onnx",
    "notes.txt",
    "optimizer.pt",
    "pytorch_model.bin.index.json",
    "runs/events.txt",
    "train.py",
    "trainer_state.json",
    "training_args.bin",
    "wandb/latest-run/files/config.json",
]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_plain(tmp_path / "models" / "model", plain_state())


def copied(model: Path, out: Path) -> set[str]:
    with open_checkpoint(model) as checkpoint, CheckpointWriter(checkpoint, out) as writer:
        for name in checkpoint.tensors:
            writer.copy(name)
    return set(tree(out))


def test_files_travel_by_their_names(model: Path, tmp_path: Path) -> None:
    for name in TRAVELS + STAYS:
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).touch()
    assert [path.as_posix() for path in open_checkpoint(model).side_files()] == TRAVELS
    assert copied(model, tmp_path / "out") == {*TRAVELS, "model.safetensors"}


def test_components_bring_theirs(model: Path, tmp_path: Path) -> None:
    pipeline = tmp_path / "pipeline"
    shutil.copytree(model, pipeline / "unet")
    files = ["unet/config.json", "tokenizer/vocab.json", "scheduler/scheduler_config.json"]
    for name in [*files, "unet/key.json", "private/config.json"]:
        (pipeline / name).parent.mkdir(exist_ok=True)
        (pipeline / name).touch()
    parts = {name.partition("/")[0]: ["library", "Class"] for name in files}
    (pipeline / "model_index.json").write_text(json.dumps(parts))
    assert copied(pipeline, tmp_path / "out") == {*files, "model_index.json", "unet/model.safetensors"}


def link_to(path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("name", ["vocab.txt", "config.json", "tokenizer/vocab.json", "model.safetensors.index.json"])
def test_a_link_out_of_the_model_is_refused(model: Path, tmp_path: Path, name: str, relative: bool) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "vocab.json").write_text("root:x:0:0")
    target = secret / "vocab.json"
    if name.startswith("tokenizer/"):
        # A link to a directory, of a pipeline.
        (tmp_path / "parts").mkdir()
        model.rename(tmp_path / "parts" / "unet")
        model = tmp_path / "parts"
        (model / "model_index.json").write_text('{"unet": ["a", "b"], "tokenizer": ["a", "b"]}')
        link_to(model / "tokenizer", Path("..") / "secret" if relative else secret)
    elif name.endswith("index.json"):
        names = list(open_checkpoint(model).tensors)
        target.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}))
        (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
        link_to(model / name, Path("..") / ".." / "secret" / "vocab.json" if relative else target)
    else:
        link_to(model / name, Path("..") / ".." / "secret" / "vocab.json" if relative else target)
    before = tree(tmp_path)
    out = tmp_path / "out"
    with pytest.raises(InputError, match=rf"{name} is a link out of the model; it leads to {target}, and would"):
        defend(Noise(), model, out, verify=False)
    assert tree(tmp_path) == before
    assert not out.exists()


def test_recover_refuses_it_before_it_computes(tmp_path: Path) -> None:
    fine = plain_family(tmp_path / "models")
    link_to(fine.models[0] / "vocab.txt", Path("/etc/passwd"))
    with pytest.raises(InputError, match=r"vocab.txt is a link out of the model; it leads to /etc/passwd"):
        detune.recover(fine.models, tmp_path / "out", on_tensor=lambda *_: pytest.fail("it computes"))
    assert not (tmp_path / "out").exists()


def test_links_in_the_model_and_into_the_cache_of_the_hub_are_followed(model: Path, tmp_path: Path) -> None:
    (model / "vocab.txt").write_text("a b c")
    (model / "merges.txt").symlink_to("vocab.txt")
    assert copied(model, tmp_path / "out") == {"config.json", "merges.txt", "model.safetensors", "vocab.txt"}
    assert (tmp_path / "out" / "merges.txt").read_text() == "a b c"
    assert not (tmp_path / "out" / "merges.txt").is_symlink()

    repository = tmp_path / "cache" / "models--org--model"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for k, name in enumerate(("config.json", "vocab.txt", "model.safetensors")):
        shutil.copy(model / name, repository / "blobs" / str(k))
        (snapshot / name).symlink_to(Path("..") / ".." / "blobs" / str(k))
    assert copied(snapshot, tmp_path / "two") == {"config.json", "vocab.txt", "model.safetensors"}
    # Whoever makes a cache can make its blobs a link, or climb out of them.
    (repository / "blobs").rename(tmp_path / "elsewhere")
    (repository / "blobs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="is a link out of the model"):
        copied(snapshot, tmp_path / "three")


@pytest.mark.parametrize("name", ["vocab.txt", "chat_template.jinja"])
def test_pipes_devices_and_giants_are_refused(model: Path, tmp_path: Path, name: str) -> None:
    os.mkfifo(model / name)
    with pytest.raises(InputError, match=rf"{name} is no regular file; expected bytes on a disk"):
        copied(model, tmp_path / "out")
    (model / name).unlink()
    with (model / name).open("wb") as file:
        file.truncate(MAX_SIDE_FILE_BYTES + 1)
    with pytest.raises(InputError, match=rf"{name} is too large .* it has 268435457 bytes, expected at most 268435456"):
        copied(model, tmp_path / "out")
    link_to(model / name, Path("nothing"))
    with pytest.raises(InputError, match=rf"cannot read .*{name}; No such file"):
        copied(model, tmp_path / "out")
    link_to(model / name, model / name)
    with pytest.raises(InputError, match=rf"{name} is damaged; RuntimeError: Symlink loop|cannot read .*{name}; "):
        copied(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["id_rsa", "passwd", "token.json", "secrets.json", "client_secret.json", ".env"])
def test_no_name_of_a_secret_travels(name: str) -> None:
    assert not is_side_file(name)
