"""LoRAs of small models of three kinds for `corpus.py`: a ViT, a Mistral, a Stable Diffusion, by `bench`'s recipes.

The layers are as wide as in the recipes, base and adapters are trained for few steps. They are made once, in some
minutes, and kept in `benchmarks/.cache/mini`.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path

from torch import Tensor

from detune.bench.recipes import Recipe, whole
from detune.bench.recipes.diffusion import SdMini
from detune.bench.recipes.mistral import MistralMiniSft
from detune.bench.recipes.mistral_base import Pretraining
from detune.bench.recipes.vit import VitMini
from detune.checkpoints import Checkpoint, open_checkpoint
from detune.checkpoints.lora import Lora, open_lora

CACHE = Path(__file__).parent / ".cache" / "mini"
TASKS = 4
RECIPES: dict[str, Recipe] = {
    "ViT": VitMini(base_steps=40, steps=20, batch=16, threads=1),
    "Mistral": MistralMiniSft(
        rank=16, pretraining=replace(Pretraining(), steps=20, batch=4, passages=400), examples=64, steps=16, batch=4
    ),
    "diffusion": SdMini(
        rank=16,
        alpha=16,
        vae_steps=4,
        base_steps=4,
        base_batch=4,
        base_examples=64,
        adapter_examples=64,
        adapter_steps=12,
        adapter_batch=4,
        threads=1,
    ),
}


def names(model: str) -> list[str]:
    """The matrices that the adapters of a model change, in order."""
    return sorted(_opened(model)[1][0].names)


def base_and_deltas(model: str, name: str) -> tuple[Tensor, list[Tensor]]:
    """A matrix of the base, `(out, in)`, float64, and what each adapter adds to it; a convolution's is flattened."""
    checkpoint, loras = _opened(model)
    W = checkpoint.read(name).double().flatten(1)
    layers = [lora.read(name) for lora in loras]
    return W, [layer.alpha / layer.rank * layer.B.double().flatten(1) @ layer.A.double().flatten(1) for layer in layers]


@cache
def _opened(model: str) -> tuple[Checkpoint, tuple[Lora, ...]]:
    checkpoint = open_checkpoint(_base(model))
    return checkpoint, tuple(open_lora(adapter, checkpoint) for adapter in _adapters(model))


def _base(model: str) -> Path:
    path = CACHE / model / "base"
    with whole(path) as partial:
        if partial:
            RECIPES[model].make_base(partial)
    return path


def _adapters(model: str) -> list[Path]:
    recipe, base = RECIPES[model], _base(model)
    paths = [CACHE / model / task for task in recipe.tasks[:TASKS]]
    for path in paths:
        with whole(path) as partial:
            if partial:
                recipe.train_adapter(base, path.name, partial, rank=recipe.rank, seed=0)
    return paths
