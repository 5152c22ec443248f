"""Files of weights: safetensors, archives of torch, GGUF, fp8 with scales, and an index of shards."""

import json
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

from detune.checkpoints import CheckpointWriter, Unmerged, open_checkpoint
from tests.cases import normal, seeded
from tests.families import save_plain, shard
from tests.fuzzing.mutation import edit_json, mutated_bytes, mutated_json, to_json
from tests.fuzzing.runner import Target, Wrong

__all__ = ["WEIGHTS", "mutate_safetensors", "read_all", "same", "state"]


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


def make_llama(folder: Path) -> None:
    """The smallest model of an architecture whose names and rows are turned back."""
    import gguf

    writer = gguf.GGUFWriter(folder / "m.gguf", "llama")
    writer.add_context_length(16)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(6)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(4)
    writer.add_token_list(["a", "b", "c"])
    writer.add_token_scores([0.0, 1.0, 2.0])
    rows = {"attn_q": 8, "attn_k": 4, "attn_v": 4, "attn_output": 8, "ffn_gate": 6, "ffn_up": 6, "ffn_down": 8}
    shapes = {f"blk.0.{name}": (count, 6 if name == "ffn_down" else 8) for name, count in rows.items()}
    shapes |= {"token_embd": (3, 8), "output_norm": (8,), "blk.0.attn_norm": (8,), "blk.0.ffn_norm": (8,)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", normal(seeded(9), *shape).float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def mutate_llama(draw: Random, folder: Path) -> None:
    """Change some bytes of the settings and of the tables."""
    path = folder / "m.gguf"
    data = path.read_bytes()
    path.write_bytes(mutated_bytes(draw, data[:1400], draw.choice((1, 1, 3))) + data[1400:])


def read_llama(folder: Path, _: Path) -> None:
    """As the package that the format is from sees it, under whatever names, and rows in whatever order."""
    import gguf

    found = read_all(folder / "m.gguf")
    stored = {
        tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in gguf.GGUFReader(folder / "m.gguf").tensors
    }
    if len(found) != len(stored):
        raise Wrong(f"{len(found)} tensors, expected {len(stored)}")
    values = sorted(sorted(map(str, tensor.double().flatten().tolist())) for tensor in stored.values())
    if sorted(sorted(map(str, tensor.double().flatten().tolist())) for tensor in found.values()) != values:
        raise Wrong("other values")


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
        if scale is not None and name in stored and scale.numel() > 1 and scale.shape != (len(stored[name]), 1):
            continue  # one of several rows or columns each
        if name in stored and stored[name].dtype in (torch.float8_e4m3fn, torch.int8) and scale is not None:
            if not torch.allclose(tensor.float(), stored[name].float() * scale.float(), rtol=1e-6, equal_nan=True):
                raise Wrong(f"{name!r} is not its codes times its scale")
        elif name in stored:
            same({name: tensor}, {name: stored[name]})


# --- a base beside its adapter ---


def make_unmerged(folder: Path) -> None:
    """A layer that PEFT has put a LoRA into, and a norm."""
    generator = seeded(11)
    tensors = {f"base_model.model.a.{name}.weight": normal(generator, *shape).float() for name, shape in
               {"base_layer": (6, 4), "lora_A.default": (2, 4), "lora_B.default": (6, 2)}.items()}  # fmt: skip
    save_file(tensors | {"base_model.model.norm.weight": torch.ones(4)}, folder / "m.safetensors")
    (folder / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 4, "alpha_pattern": {}}')


def mutate_unmerged(draw: Random, folder: Path) -> None:
    """Change the weights or what says how they are scaled."""
    if draw.random() < 0.3:
        edit_json(draw, folder / "adapter_config.json")
    else:
        mutate_safetensors(draw, folder)


def read_unmerged(folder: Path, _: Path) -> None:
    """The base is as the library reads it, and the adapter's product has its shape and is finite."""
    found = read_all(folder / "m.safetensors")
    stored = load_file(folder / "m.safetensors")
    with open_checkpoint(folder / "m.safetensors") as model:
        for name, tensor in found.items() if isinstance(model, Unmerged) else ():
            own = next(
                each for each in stored if each.removeprefix("base_model.model.").replace(".base_layer", "") == name
            )
            same({name: tensor}, {name: stored[own]})
            if model.factors(name):
                A, B, scaling = model.read_factors(name)
                product = B.double() @ A.double() * (1.0 if scaling is None else scaling)
                if tensor.shape not in (product.shape, product.mT.shape) or not bool(product.isfinite().all()):
                    raise Wrong(f"a product of shape {tuple(product.shape)} for {name!r}")


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


WEIGHTS = (
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
    Target("llama", make_llama, mutate_llama, read_llama),
    Target("unmerged", make_unmerged, mutate_unmerged, read_unmerged),
    Target("scaled", make_scaled, mutate_safetensors, read_scaled),
)
