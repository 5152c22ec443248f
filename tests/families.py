"""Fine-tunes of one base on disk: what the tests of the pipeline and of the command start from."""

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.cases import normal, seeded

State = dict[str, Tensor]


@dataclass(frozen=True)
class Fine:
    """A base and its fine-tunes, each in a directory of its own."""

    base: Path
    models: tuple[Path, ...]

    @property
    def specs(self) -> list[str]:
        return [str(model) for model in self.models]


def delta(generator: torch.Generator, weight: Tensor, rank: int, share: float = 0.3) -> Tensor:
    """A random change of the given rank, `share` times as large as the weight; kernels as `(out, in h w)`."""
    rows, columns = weight.shape[0], weight[0].numel()
    change = normal(generator, rows, rank) @ normal(generator, rank, columns)
    return (change * share * weight.double().std() / rank**0.5).reshape(weight.shape)


def add(weight: Tensor, change: Tensor) -> Tensor:
    """The merge: one rounding to the stored dtype."""
    return (weight.double() + change).to(weight.dtype)


def plain_state() -> State:
    """A base that no library needs to know: an embedding, four layers, a norm and a counter."""
    generator = seeded(11)
    state = {f"layer.{i}.weight": normal(generator, 80, 64).float() for i in range(4)}
    state |= {"embed_tokens.weight": normal(generator, 50, 16).float(), "norm.weight": normal(generator, 64).float()}
    return state | {"steps": torch.tensor(3)}


def plain_family(folder: Path, n: int = 3, rank: int = 2) -> Fine:
    """`n` directories with `model.safetensors`; the layers are fine-tuned, the rest is shared."""
    base = plain_state()
    generator = seeded(12)
    models = []
    for i in range(n):
        changed = {name: add(base[name], delta(generator, base[name], rank)) for name in base if "layer" in name}
        models.append(save_plain(folder / f"model-{i}", base | changed))
    return Fine(save_plain(folder / "base", base), tuple(models))


def save_plain(path: Path, state: State) -> Path:
    path.mkdir(parents=True)
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text("{}")
    return path


def edit(path: Path, change: Callable[[State], Any]) -> None:
    """Load a plain model's tensors, let `change` alter them in place, and save them again."""
    state = load_file(path / "model.safetensors")
    change(state)
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})


def shard(path: Path) -> Path:
    """Turn a plain model into two shards with an index; returns the second shard."""
    state = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(state)
    places = {}
    for k, part in enumerate((names[:3], names[3:]), start=1):
        file = f"model-0000{k}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, path / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return path / file


def fine_tune(model: Any, targets: Sequence[str], folder: Path, n: int = 3, rank: int = 2, **options: Any) -> Fine:
    """Save a transformers or diffusers model, and `n` copies of it with random LoRAs merged into the targets.

    Args:
        model: Anything with `save_pretrained`.
        targets: Parts of the names of the parameters to change.
        folder: Where the directories go.
        n: Number of fine-tunes.
        rank: Of each change.
        options: For `save_pretrained`.
    """
    generator = seeded(13)
    model.save_pretrained(folder / "base", **options)
    models = []
    for i in range(n):
        tuned = deepcopy(model)
        perturb(tuned, targets, generator, rank)
        tuned.save_pretrained(folder / f"model-{i}", **options)
        models.append(folder / f"model-{i}")
    return Fine(folder / "base", tuple(models))


@torch.no_grad()
def perturb(model: Any, targets: Sequence[str], generator: torch.Generator, rank: int) -> None:
    """Add a random LoRA to every parameter that is a target, in place."""
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and any(target in name for target in targets):
            parameter.copy_(add(parameter, delta(generator, parameter, rank)))


def stored(path: Path) -> State:
    """Every tensor of a directory, by its name in its file and the file's folder."""
    found: State = {}
    for file in sorted(path.rglob("*.safetensors")):
        prefix = "" if file.parent == path else f"{file.parent.relative_to(path).as_posix()}/"
        found |= {prefix + name: tensor for name, tensor in load_file(file).items()}
    return found


def tree(root: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def same_bits(one: Tensor, other: Tensor) -> bool:
    bits = [tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in (one, other)]
    return one.dtype is other.dtype and one.shape == other.shape and bits[0].equal(bits[1])
