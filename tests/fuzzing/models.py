"""Whole models: their configurations, packs of them, names of tensors, and what the commands make of them."""

import contextlib
import io
import json
import shutil
import sys
import warnings
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file

import detune
import detune.cli
from detune.checkpoints import find_places, open_checkpoint
from detune.errors import InputError
from detune.symmetries import read_layers
from tests.families import plain_family, shard
from tests.fuzzing.mutation import TEXTS, edit_json, mutated_bytes, mutated_json, to_json
from tests.fuzzing.runner import Target, Wrong
from tests.fuzzing.weights import mutate_safetensors, read_all

__all__ = ["MODELS"]


# --- configurations ---


def make_config(folder: Path) -> None:
    """A small BERT."""
    from tests.bench.tiny_models import save_bert

    save_bert(folder / "model", ["whales", "breathe", "air"])


def mutate_config(draw: Random, folder: Path) -> None:
    """Change one of the configurations."""
    edit_json(draw, folder / "model" / draw.choice(("config.json",) * 5 + ("tokenizer_config.json", "tokenizer.json")))


def read_config(folder: Path, _: Path) -> None:
    """Tensors are placed, layers found and outputs compared, or not; nothing else may happen."""
    from detune.audit import model_process

    model = folder / "model"
    with open_checkpoint(model) as checkpoint:
        checkpoint.side_files()
        if not set(find_places(checkpoint)) <= set(checkpoint.tensors):
            raise Wrong("places of tensors that there are not")
        with contextlib.suppress(InputError):
            read_layers(checkpoint.root, {name: info.shape for name, info in checkpoint.tensors.items()})
    prompts = folder / "prompts.csv"
    prompts.write_text("prompt\nwhales breathe air\n")
    request = model_process.Request(str(model), str(model), None, str(prompts), str(folder / "answer.json"), 0)
    with exchanged(model_process, "_limit_memory", lambda more_bytes: None), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with (
            exchanged(sys, "stdin", io.StringIO(json.dumps(request.__dict__))),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            model_process.main()
    answer = json.loads((folder / "answer.json").read_text())
    if answer["metric"] is None and not answer["note"].startswith("not "):
        raise Wrong(f"neither an answer nor a reason: {answer}")


@contextlib.contextmanager
def exchanged(owner: Any, name: str, value: Any) -> Any:
    """Put something else in a place for as long as the block takes."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


# --- packs ---


def make_pack(folder: Path) -> None:
    """Two models as a pack, and beside it."""
    fine = plain_family(folder / "models", n=2)
    detune.pack(fine.models, folder / "pack", base=fine.base)


def mutate_pack(draw: Random, folder: Path) -> None:
    """Change any byte, the manifest, or a member."""
    import zstandard

    path = folder / "pack"
    if draw.random() < 0.3:
        path.write_bytes(mutated_bytes(draw, path.read_bytes(), draw.choice((1, 1, 3))))
        return
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = draw.choice(["manifest.json"] * len(members) + list(members))
    content = zstandard.ZstdDecompressor().decompressobj().decompress(members[name])
    if name == "manifest.json":
        content = to_json(mutated_json(draw, json.loads(content), draw.choice((1, 1, 2))))
    else:
        content = mutated_bytes(draw, content)
    members[name] = zstandard.compress(content) if draw.random() < 0.9 else mutated_bytes(draw, members[name])
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)


def read_pack(folder: Path, sound: Path) -> None:
    """Each file is one of those that were packed, and lies where it may."""
    before = {path for path in folder.rglob("*") if path.is_file()}
    detune.unpack(folder / "pack", folder / "out")
    known = {path.read_bytes() for path in (sound / "models").rglob("*") if path.is_file()}
    for path in {path for path in folder.rglob("*") if path.is_file()} - before:
        if not path.resolve().is_relative_to(folder / "out"):
            raise Wrong(f"it wrote {path}")
        if path.read_bytes() not in known:
            raise Wrong(f"{path.name} is none of the files")


# --- names ---


def mutate_names(draw: Random, folder: Path) -> None:
    """Give some tensors other names, the same in all models."""
    renamed = {}
    for name in draw.sample(sorted(load_file(folder / "models" / "base" / "model.safetensors")), draw.choice((1, 2))):
        cut = draw.randrange(len(name))
        text = draw.choice(TEXTS)
        renamed[name] = draw.choice((text, text + name, name[:cut] + text + name[cut:], f"{text}/{name}", name[:cut]))
    (folder / "renamed.json").write_bytes(to_json(renamed))
    for path in (folder / "models").glob("*/model.safetensors"):
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        table = {renamed.get(name, name): fields for name, fields in json.loads(data[8:end]).items()}
        raw = to_json(table)
        path.write_bytes(len(raw).to_bytes(8, "little") + raw + data[end:])


def read_names(folder: Path, sound: Path) -> None:
    """The command recovers the base under these names, writes nothing elsewhere, and says so in printable lines."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    models = sorted(map(str, (folder / "models").glob("model-*")))
    outs = [str(folder / "out"), str(folder / "adapters")]
    code, out, err = run_command("recover", *models, "--out", outs[0], "--adapters", outs[1])
    if code == 2 and err.startswith("detune: error: ") and err.count("\n") == 1 and err.rstrip("\n").isprintable():
        raise InputError("refused", "by the command", err)
    if code != 0:
        raise Wrong(f"exit code {code}: {err[-300:]}")
    strange = [line for line in (out + err).splitlines() if not line.isprintable()]
    if strange:
        raise Wrong(f"it printed {strange[0]!a}")
    for path in (path for path in folder.rglob("*") if path.is_file() and path not in before):
        if not any(path.resolve().is_relative_to(out) for out in outs):
            raise Wrong(f"it wrote {path}")
    if any(path.read_bytes() != content for path, content in before.items()):
        raise Wrong("it changed a file that was there")
    renamed = json.loads((folder / "renamed.json").read_bytes())
    truth = load_file(sound / "models" / "base" / "model.safetensors")
    found = read_all(folder / "out")
    for name, tensor in truth.items():
        given = found[renamed.get(name, name)]
        if not torch.allclose(given.double(), tensor.double(), atol=1e-4, rtol=1e-4):
            raise Wrong(f"{renamed.get(name, name)!r} is not the base's")


# --- commands ---

COMMANDS = (
    ("recover", "{models}", "--out", "{out}", "--adapters", "{out}-adapters"),
    ("recover", "{models}", "--out", "{out}", "--mask", "{out}-mask.npz"),
    ("inspect", "{models}"),
    ("family", "{models}"),
    ("extract", "{models}", "--base", "{base}", "--out", "{out}"),
    ("audit", "{models}", "--base", "{base}", "--out", "{out}"),
    ("audit", "{models}", "--out", "{out}"),
    ("pack", "{models}", "--base", "{base}", "--out", "{out}"),
    ("compare", "{base}", "{model}"),
    ("defend", "fp16", "{model}", "{out}"),
    ("defend", "noise", "{model}", "{out}"),
)


def make_commands(folder: Path) -> None:
    """Four models: three are enough where one is left out."""
    fine = plain_family(folder / "models", n=4)
    for model in fine.models[2:]:
        shard(model)
    # Loops are compiled after each change of the code, which no mutation is to blame for.
    run_command("recover", *fine.specs, "--out", str(folder / "first"))
    shutil.rmtree(folder / "first")


def mutate_commands(draw: Random, folder: Path) -> None:
    """Change any of the last two models, or the base; and choose a command."""
    model = folder / "models" / draw.choice(("model-2", "model-3", "base"))
    path = draw.choice([path for path in model.iterdir() if path.is_file()])
    if path.suffix == ".json":
        edit_json(draw, path)
    else:
        (model / "changed").mkdir()
        moved = path.rename(model / "changed" / path.name)
        mutate_safetensors(draw, moved.parent)
        moved.rename(path)
        moved.parent.rmdir()
    (folder / "command").write_text(str(draw.randrange(len(COMMANDS))))


def read_commands(folder: Path, sound: Path) -> None:
    """The command ends well or in one line; a base that is recovered is the base."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    models = sorted((folder / "models").glob("model-*"))
    places = {"out": folder / "out", "base": folder / "models" / "base", "model": models[2]}
    words: list[str] = []
    for word in COMMANDS[int((folder / "command").read_text())]:
        words += map(str, models) if word == "{models}" else [word.format(**places)]
    code, out, err = run_command(*words)
    if code == 2 and err.startswith("detune: error: ") and err.count("\n") == 1 and err.rstrip("\n").isprintable():
        raise InputError("refused", "by the command", err)
    if code not in (0, int(words[0] == "audit")):
        raise Wrong(f"exit code {code}: {err[-300:]}")
    strange = [line for line in (out + err).splitlines() if not line.isprintable()]
    if strange:
        raise Wrong(f"it printed {strange[0]!a}")
    if any(path.read_bytes() != content for path, content in before.items()):
        raise Wrong("it changed a file that was there")
    if words[0] == "recover":
        truth, found = load_file(sound / "models" / "base" / "model.safetensors"), read_all(folder / "out")
        for name, tensor in found.items():
            if not torch.allclose(tensor.double(), truth[name].double(), atol=1e-4, rtol=1e-4):
                raise Wrong(f"{name!r} is not the base's")


def run_command(*words: str) -> tuple[int, str, str]:
    """Exit code and output of the command, in this process."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with exchanged(sys, "argv", ["detune", *words]), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            detune.cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
    return code, out.getvalue(), err.getvalue()


MODELS = (
    Target("config", make_config, mutate_config, read_config),
    Target("pack", make_pack, mutate_pack, read_pack),
    Target("commands", make_commands, mutate_commands, read_commands),
    Target("names", lambda to: plain_family(to / "models"), mutate_names, read_names),
)
