"""LoRAs: of PEFT, of diffusers and of kohya."""

import json
import math
import warnings
from pathlib import Path
from random import Random

import torch
from safetensors.torch import save_file

from detune.checkpoints import open_checkpoint, open_lora
from tests.cases import normal, seeded
from tests.fuzzing.mutation import TEXTS, edit_json, mutated_json, to_json
from tests.fuzzing.runner import Target, Wrong
from tests.fuzzing.weights import mutate_safetensors, read_all, same

__all__ = ["ADAPTERS"]


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


ADAPTERS = (
    Target("adapter", make_adapter, mutate_adapter, read_adapter),
    Target("lora", make_lora, mutate_lora, read_lora),
)
