"""The formats that are read, each with a sound sample, what is changed in it, and the right answer."""

import contextlib
import io
import json
import math
import sys
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import detune
import detune.cli
from detune.checkpoints import CheckpointWriter, find_places, open_checkpoint, open_lora
from detune.errors import InputError
from detune.symmetries import read_layers
from tests.cases import normal, seeded
from tests.families import plain_family, save_plain, shard
from tests.fuzzing.mutation import TEXTS, edit_json, mutated_bytes, mutated_json, to_json
from tests.fuzzing.pages import PAGES
from tests.fuzzing.runner import Target, Wrong

__all__ = ["TARGETS"]


# --- what all share ---


def state() -> dict[str, Tensor]:
    """Some tensors of several dtypes and shapes."""
    generator = seeded(5)
    return {
        "layers.0.weight": normal(generator, 6, 4).float(),
        "layers.1.weight": normal(generator, 4, 6).bfloat16(),
        "layers.1.bias": normal(generator, 4).half(),
        "steps": torch.tensor(7),
        "mask": torch.tensor([True, False, True]),
        "empty": torch.empty(0, 3),
    }


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, whole: bool = True) -> None:
    """Compare bit for bit; without `whole`, some of the expected may be missing."""
    if (set(found) != set(expected)) if whole else not set(found) <= set(expected):
        raise Wrong(f"tensors {sorted(found)}, expected {sorted(expected)}")
    for name, tensor in found.items():
        right = expected[name].detach().contiguous()
        if (tensor.dtype, tensor.shape) != (right.dtype, right.shape):
            raise Wrong(f"{name!r} is {tensor.dtype} {tuple(tensor.shape)}, not {right.dtype} {tuple(right.shape)}")
        if not torch.equal(tensor.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8)):
            raise Wrong(f"{name!r} has other values")


def read_all(path: Path | str) -> dict[str, Tensor]:
    """Every tensor of a model, whole and by its bytes."""
    with open_checkpoint(path) as checkpoint:
        found = {name: checkpoint.read(name) for name in checkpoint.tensors}
        for name, tensor in found.items():
            if bytes(checkpoint.read_bytes(name)) != tensor.reshape(-1).view(torch.uint8).numpy().tobytes():
                raise Wrong(f"{name!r} by its bytes is another")
    return found


# --- safetensors ---


def mutate_safetensors(draw: Random, folder: Path) -> None:
    """Change the table, its length, or any byte."""
    (path,) = folder.glob("*.safetensors")
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    match draw.randrange(4):
        case 0:
            path.write_bytes(mutated_bytes(draw, data, draw.choice((1, 1, 3))))
        case 1:
            path.write_bytes(mutated_bytes(draw, data[:end]) + data[end:])
        case _:
            table = to_json(mutated_json(draw, json.loads(data[8:end]), draw.choice((1, 1, 2, 4))))
            path.write_bytes(len(table).to_bytes(8, "little") + table + data[end:])


def read_safetensors(folder: Path, _: Path) -> None:
    """The library that the format is from must see the same."""
    (path,) = folder.glob("*.safetensors")
    found = read_all(path)
    try:
        expected = load_file(path)
    except (SafetensorError, ValueError, KeyError) as error:
        raise Wrong(f"the library refuses it: {error}") from error
    same(found, expected)


# --- archives of torch ---


def mutate_torch(draw: Random, folder: Path) -> None:
    """Change any byte, or write the zip anew in another order, with parts or the pickle changed."""
    (path,) = folder.iterdir()
    if not zipfile.is_zipfile(path) or draw.random() < 0.3:
        path.write_bytes(mutated_bytes(draw, path.read_bytes(), draw.choice((1, 1, 3))))
        return
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for _ in range(draw.choice((0, 1, 1, 2))):
        name = draw.choice([*members, *[name for name in members if name.endswith("data.pkl")] * 6])
        members[name] = mutated_bytes(draw, members[name])
    names = list(members)
    draw.shuffle(names)
    with zipfile.ZipFile(path, "w", draw.choice((zipfile.ZIP_STORED,) * 4 + (zipfile.ZIP_DEFLATED,))) as archive:
        for name in names:
            info = zipfile.ZipInfo(name)
            info.extra = b"" if draw.random() < 0.5 else b"FB" + (60).to_bytes(2, "little") + bytes(60)
            archive.writestr(info, members[name])


def read_torch(folder: Path, _: Path) -> None:
    """Tensors that torch reads too must be the same; it also checks records that nothing here depends on."""
    (path,) = folder.iterdir()
    found = read_all(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = torch.load(path, weights_only=True)
    except Exception:
        return
    if isinstance(expected, dict) and isinstance(expected.get("state_dict"), dict):
        expected = expected["state_dict"]
    if isinstance(expected, dict) and all(isinstance(value, Tensor) for value in expected.values()):
        same(found, expected)


def training() -> dict[str, Any]:
    """A training run's checkpoint."""
    moments = {number: {"step": 3, "exp_avg": tensor.float()} for number, tensor in enumerate(state().values())}
    optimizer = {"state": moments, "param_groups": [{"lr": 1e-3, "params": list(moments)}]}
    return {"epoch": 3, "state_dict": state(), "optimizer_states": [optimizer], "loops": {"fit": {"done": True}}}


# --- GGUF, and fp8 with scales ---


def make_gguf(folder: Path) -> None:
    """A matrix in each of three formats."""
    import gguf

    writer = gguf.GGUFWriter(folder / "m.gguf", "other")
    for kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0):
        values = normal(seeded(9), 4, 32).float().numpy()
        writer.add_tensor(f"blk.0.{kind.name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def mutate_gguf(draw: Random, folder: Path) -> None:
    """Change some bytes, of the tables more often than of the weights."""
    path = folder / "m.gguf"
    data = path.read_bytes()
    end = draw.choice((len(data), 400))
    path.write_bytes(mutated_bytes(draw, data[:end], draw.choice((1, 1, 3))) + data[end:])


def read_gguf(folder: Path, _: Path) -> None:
    """The package that the format is from sees the same."""
    import gguf
    import numpy as np

    found = read_all(folder / "m.gguf")
    for tensor in gguf.GGUFReader(folder / "m.gguf").tensors:
        with np.errstate(all="ignore"):
            right = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if not torch.equal(found[tensor.name].reshape(-1).float().nan_to_num(), right.reshape(-1).float().nan_to_num()):
            raise Wrong(f"{tensor.name!r} has other values")


def make_scaled(folder: Path) -> None:
    """A weight in fp8 with its scale, one in int8 with a scale for each row, and a plain one."""
    weight = normal(seeded(10), 8, 16).float()
    rows = weight.abs().amax(dim=1, keepdim=True) / 127
    tensors = {
        "a.weight": (weight / 0.01).to(torch.float8_e4m3fn),
        "a.weight_scale": torch.tensor(0.01),
        "b.weight": (weight / rows).round().to(torch.int8),
        "b.weight_scale": rows,
        "c.weight": weight.half(),
    }
    save_file(tensors, folder / "m.safetensors")


def read_scaled(folder: Path, _: Path) -> None:
    """Each weight that has its scale is their product; everything else is as the library reads it."""
    found = read_all(folder / "m.safetensors")
    stored = load_file(folder / "m.safetensors")
    for name, tensor in found.items():
        scale = stored.get(f"{name}_scale")
        if scale is not None and scale.ndim == 1:  # one of each row
            scale = scale[:, None]
        if scale is not None and name in stored and scale.numel() not in (1, len(stored[name])):
            continue  # one of several rows each
        if name in stored and stored[name].dtype in (torch.float8_e4m3fn, torch.int8) and scale is not None:
            if not torch.allclose(tensor.float(), stored[name].float() * scale.float(), rtol=1e-6, equal_nan=True):
                raise Wrong(f"{name!r} is not its codes times its scale")
        elif name in stored:
            same({name: tensor}, {name: stored[name]})


# --- an index of shards ---


def mutate_index(draw: Random, folder: Path) -> None:
    """Change the index."""
    edit_json(draw, folder / "model" / "model.safetensors.index.json")


def read_index(folder: Path, sound: Path) -> None:
    """Each tensor is the one of this name, and a copy has the same."""
    found = read_all(folder / "model")
    same(found, read_all(sound / "model"), whole=False)
    with open_checkpoint(folder / "model") as checkpoint, CheckpointWriter(checkpoint, folder / "copy") as writer:
        for name in checkpoint.tensors:
            writer.copy(name)
    same(read_all(folder / "copy"), found)


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
    from detune.audit import running

    model = folder / "model"
    with open_checkpoint(model) as checkpoint:
        checkpoint.side_files()
        if not set(find_places(checkpoint)) <= set(checkpoint.tensors):
            raise Wrong("places of tensors that there are not")
        with contextlib.suppress(InputError):
            read_layers(checkpoint.root, {name: info.shape for name, info in checkpoint.tensors.items()})
    prompts = folder / "prompts.csv"
    prompts.write_text("prompt\nwhales breathe air\n")
    request = running.Request(str(model), str(model), None, str(prompts), str(folder / "answer.json"), 0)
    with exchanged(running, "_limit_memory", lambda more_bytes: None), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with (
            exchanged(sys, "stdin", io.StringIO(json.dumps(request.__dict__))),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            running.main()
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


# --- adapters of PEFT ---


class Layers(torch.nn.Module):
    """Two linear layers and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        generator = seeded(6)
        self.first, self.second = torch.nn.Linear(6, 10), torch.nn.Linear(8, 8)
        self.embed = torch.nn.Embedding(11, 6)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(normal(generator, *parameter.shape))


def make_adapter(folder: Path) -> None:
    """A base in one file, and a LoRA of it with a pattern for one layer."""
    from peft import LoraConfig, get_peft_model

    save_file(Layers().state_dict(), folder / "base.safetensors")
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["first", "second", "embed"], rank_pattern={"second": 2})
    config.alpha_pattern = {".*first": 7}
    model = get_peft_model(Layers(), config)
    generator = seeded(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(normal(generator, *parameter.shape))
    model.save_pretrained(folder / "adapter")


def mutate_adapter(draw: Random, folder: Path) -> None:
    """Change the configuration, or the file of the factors."""
    if draw.random() < 0.7:
        edit_json(draw, folder / "adapter" / "adapter_config.json")
    else:
        mutate_safetensors(draw, folder / "adapter")


# Which layers get an adapter says the file of the factors; PEFT goes by these, and warns of factors left over.
WHICH_LAYERS = ("target_modules", "layers_to_transform", "layers_pattern", "exclude_modules", "modules_to_save")


def read_adapter(folder: Path, sound: Path) -> None:
    """PEFT's merge has the same bits."""
    from peft import PeftModel

    found = read_all(f"{folder / 'base.safetensors'}+{folder / 'adapter'}")
    configs = [json.loads((place / "adapter" / "adapter_config.json").read_bytes()) for place in (folder, sound)]
    if any(configs[0].get(key) != configs[1].get(key) for key in WHICH_LAYERS):
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # keys that are missing or left over
            warnings.filterwarnings("ignore", "Unexpected keyword arguments|.*fan_in_fan_out")
            merged = PeftModel.from_pretrained(Layers(), folder / "adapter").merge_and_unload()
    except Exception:
        return
    same(found, merged.state_dict())


# --- LoRAs of diffusers and kohya ---

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"


def make_lora(folder: Path) -> None:
    """A pipeline of one component, and a LoRA of it in either format."""
    generator = seeded(8)
    parts = ("to_q", "to_k", "to_v", "to_out.0")
    (folder / "base" / "unet").mkdir(parents=True)
    weights = {f"{ATTENTION}.{part}.weight": normal(generator, 8, 8).float() for part in parts}
    save_file(weights, folder / "base" / "unet" / "diffusion_pytorch_model.safetensors")
    (folder / "base" / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet2DConditionModel"]}))
    factors = {part: (normal(generator, 2, 8).float(), normal(generator, 8, 2).float()) for part in parts}
    kohya, peft = {}, {}
    for part, (down, up) in factors.items():
        name = "lora_unet_" + f"{ATTENTION}.{part}".replace(".", "_")
        kohya |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(3.0)}
        peft |= {f"unet.{ATTENTION}.{part}.lora_A.weight": down, f"unet.{ATTENTION}.{part}.lora_B.weight": up}
    (folder / "lora").mkdir()
    save_file(kohya, folder / "lora" / "kohya.safetensors")
    settings = {
        "unet.r": 2,
        "unet.lora_alpha": 4,
        "unet.alpha_pattern": {"to_q": 8},
        "unet.target_modules": list(parts),
    }
    save_file(peft, folder / "lora" / "diffusers.safetensors", metadata={"lora_adapter_metadata": json.dumps(settings)})


def mutate_lora(draw: Random, folder: Path) -> None:
    """Keep one of the files, and change its names, its metadata or any byte."""
    kept = draw.choice(("kohya", "diffusers"))
    (folder / "lora" / ("diffusers" if kept == "kohya" else "kohya")).with_suffix(".safetensors").unlink()
    path = folder / "lora" / f"{kept}.safetensors"
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    table = json.loads(data[8:end])
    match draw.randrange(4):
        case 0:
            mutate_safetensors(draw, folder / "lora")
            return
        case 1 if "__metadata__" in table:
            settings = json.loads(table["__metadata__"]["lora_adapter_metadata"])
            table["__metadata__"]["lora_adapter_metadata"] = to_json(mutated_json(draw, settings)).decode()
        case _:
            for _ in range(draw.choice((1, 2))):
                name = draw.choice([name for name in table if name != "__metadata__"])
                cut = draw.randrange(len(name))
                changed = draw.choice(
                    (name[:cut], name[cut:], name[:cut] + draw.choice(TEXTS) + name[cut:], name.upper())
                )
                table = {changed if key == name else key: value for key, value in table.items()}
    raw = to_json(table)
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data[end:])


def read_lora(folder: Path, _: Path) -> None:
    """Factors fit their weights, and the scaling is a number."""
    with open_checkpoint(folder / "base") as base:
        lora = open_lora(folder / "lora", base)
        for name in lora.names:
            layer = lora.read(name)
            shape = (layer.B.shape[0], layer.A.shape[1])
            if shape != base.tensors[name].shape or layer.rank != 2 or not math.isfinite(layer.alpha):
                raise Wrong(f"{name!r} is changed by {shape} at rank {layer.rank}, alpha {layer.alpha}")


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
    for model in plain_family(folder / "models", n=4).models[2:]:
        shard(model)


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


TARGETS = {
    target.name: target
    for target in (
        Target(
            "safetensors",
            lambda to: save_file(state(), to / "m.safetensors", {"a": "b"}),
            mutate_safetensors,
            read_safetensors,
        ),
        Target("torch", lambda to: torch.save(state(), to / "m.bin"), mutate_torch, read_torch),
        Target(
            "torch-legacy",
            lambda to: torch.save(state(), to / "m.pth", _use_new_zipfile_serialization=False),
            mutate_torch,
            read_torch,
        ),
        Target("index", lambda to: shard(save_plain(to / "model", state())), mutate_index, read_index),
        Target("training", lambda to: torch.save(training(), to / "m.ckpt"), mutate_torch, read_torch),
        Target("gguf", make_gguf, mutate_gguf, read_gguf),
        Target("scaled", make_scaled, mutate_safetensors, read_scaled),
        Target("config", make_config, mutate_config, read_config),
        Target("adapter", make_adapter, mutate_adapter, read_adapter),
        Target("lora", make_lora, mutate_lora, read_lora),
        Target("pack", make_pack, mutate_pack, read_pack),
        Target("commands", make_commands, mutate_commands, read_commands),
        Target("names", lambda to: plain_family(to / "models"), mutate_names, read_names),
        *PAGES,
    )
}
