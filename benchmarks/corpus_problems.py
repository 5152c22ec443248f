"""Recovery problems whose truth is known: random matrices, and layers of real models with trained adapters.

A problem follows from its seed alone. Seeds fall into three splits, and so do the layers of real models: nothing that
one split has seen is in another.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import llm_models
import mini_models
import minilm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from detune.compatibility.quantisation_levels import level_noise, to_nf4
from detune.demo.language_model import FINE_TUNES, shipped_adapter
from detune.demo.texts import DOMAINS, passages
from detune.demo.train import base_model, train_lora
from detune.numerics.float_grid import name_of, spacing

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (*HALVES, torch.float32, torch.float64)
# Each split's seeds begin at a multiple of SPLIT_SEEDS. A sealed part that was looked at is followed by another, three
# further on, which has the same layers of real models.
SPLITS = {"fit": 0, "check": 1, "sealed": 11}
SPLIT_SEEDS = 10_000_000
LARGEST = 1 << 17  # entries of a random matrix; one in 25 is up to eight times as large
# log10 of the deltas' rms in units in the last place of the base's dtype.
ULPS = {torch.bfloat16: (-1.3, 3.0), torch.float16: (-1.3, 3.5), torch.float32: (0.3, 5.5), torch.float64: (0.5, 9.0)}
MERGED_FINER = (-1.0, 3.0)
FEW_MODELS = (-1.5, 1.0)


@dataclass(frozen=True)
class Problem:
    """A base's matrix and what fine-tunes made of it.

    Attributes:
        kind: A key of `KINDS` or `LATER_KINDS`.
        W: The base, `(out, in)`, float64.
        models: `W + M_i`, rounded to their dtypes.
        grid: The dtype that the base was stored in; None where it lies on no grid.
        ulps: Root mean square of the deltas in units in the last place of the base's dtype, or of the models'.
        noise: Each model's noise where it was quantised, as a run of `recover` measures it; empty elsewhere.
        about: The rest, in words.
    """

    kind: str
    W: Tensor
    models: tuple[Tensor, ...]
    grid: torch.dtype | None
    ulps: float
    about: str
    noise: tuple[float | None, ...] = ()

    @property
    def stored(self) -> torch.dtype:
        """The dtype that the answer is stored in: the finest that a model has."""
        return min((W_i.dtype for W_i in self.models), key=lambda dtype: torch.finfo(dtype).eps)


def draw(split: str, number: int) -> Problem:
    """A problem of a split."""
    seed = SPLITS[split] * SPLIT_SEEDS + number
    draw = _Draw(random.Random(seed), torch.Generator().manual_seed(seed), SPLITS[split] % len(SPLITS))
    kind = _one_of(KINDS, draw.pick)
    # By draws of its own, so that a later kind takes the place of some problems and leaves the others as they are.
    later = random.Random(f"later {seed}")
    if later.random() < LATER_SHARE:
        kind = _one_of(LATER_KINDS, later)
    return replace({**KINDS, **LATER_KINDS}[kind][1](draw), kind=kind)


def _one_of(kinds: "Kinds", pick: random.Random) -> str:
    names, weights = zip(*((kind, weight) for kind, (weight, _) in kinds.items()), strict=True)
    found: str = pick.choices(names, weights)[0]
    return found


@dataclass(frozen=True)
class _Draw:
    """Random choices of one problem."""

    pick: random.Random
    generator: torch.Generator
    split: int

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def power(self, ends: tuple[float, float]) -> float:
        return float(10 ** self.pick.uniform(*ends))

    def count(self) -> int:
        """How many models: three to fifteen, mostly few."""
        return self.pick.choice((3, 3, 3, 4, 4, 5, 5, 6, 7, 8, 10, 15))

    def shape(self) -> tuple[int, int]:
        side = int(64 * 16 ** (self.pick.random() ** 6))
        other = int(side * self.pick.choice((1, 1, 1.5, 2, 3)))
        most = LARGEST * (8 if self.pick.random() < 1 / 25 else 1)
        other = max(64, min(other, most // side))
        return self.pick.choice(((side, other), (other, side)))

    def base(self, shape: tuple[int, int]) -> Tensor:
        """A base off every grid: half of them with columns of different size, as trained weights have them."""
        W = self.normal(*shape) * self.pick.choice((1.0, 0.02))
        return W * torch.exp(0.5 * self.normal(shape[1])) if self.pick.random() < 0.5 else W

    def deltas(self, shape: tuple[int, int], n: int) -> tuple[list[Tensor], str]:
        """Deltas of unit mean square but for a spread in size, and what they are like."""
        most = max(1, min(32, min(shape) // 3, max(shape) // 4))
        rank = [int(most ** self.pick.random()) for _ in range(n)]
        rank = [rank[0]] * n if self.pick.random() < 0.5 else rank
        decay, overlap = self.pick.choice((0, 0, 2, 4, 7)), self.pick.choice((0, 0, 0.5, 0.9, 0.97, 0.99))
        common, spread = self.normal(shape[1], max(rank)), self.pick.choice((0.0, 0.3))
        found = []
        for r in rank:
            own = self.normal(shape[1], r)
            V = torch.linalg.qr(overlap**0.5 * common[:, :r] + (1 - overlap) ** 0.5 * own)[0]
            U = torch.linalg.qr(self.normal(shape[0], r))[0]
            S = torch.exp(torch.linspace(0, -decay, r, dtype=torch.float64))
            M = (U * S) @ V.mT
            found.append(M * (10 ** self.pick.uniform(-spread, spread) / rms(M)))
        return found, f"ranks {rank} decay {decay} overlap {overlap}"


def rms(values: Tensor) -> float:
    """Root mean square."""
    return float(values.square().mean().sqrt())


def _merged(
    W: Tensor, deltas: Sequence[Tensor], dtypes: Sequence[torch.dtype], grid: torch.dtype | None, about: str
) -> Problem:
    """Merge, rounding once."""
    models = tuple((W + M_i).to(dtype) for M_i, dtype in zip(deltas, dtypes, strict=True))
    size = math.sqrt(sum(rms(M_i) ** 2 for M_i in deltas) / len(deltas))
    ulps = size / rms(spacing(W, grid or dtypes[0]))
    return Problem("", W, models, grid, ulps, about)


def _random(draw: _Draw, finer: bool = False, n: int | None = None, ends: tuple[float, float] | None = None) -> Problem:
    """Random matrices in one dtype; `finer` merges a half-precision base in float32."""
    shape = draw.shape()
    n = n or draw.count()
    dtype = draw.pick.choice(HALVES if finer else DTYPES)
    on_grid = finer or draw.pick.random() < 0.7
    W = draw.base(shape)
    W = W.to(dtype).double() if on_grid else W
    deltas, about = draw.deltas(shape, n)
    size = draw.power(ends or ULPS[dtype]) * rms(spacing(W, dtype))
    size = min(size, 3 * rms(W))
    dtypes = [torch.float32 if finer else dtype] * n
    return _merged(W, [size * M_i for M_i in deltas], dtypes, dtype if on_grid else None, about)


def _mixed(draw: _Draw) -> Problem:
    """Models in several dtypes."""
    shape, n, dtype = draw.shape(), draw.count() + 1, draw.pick.choice(HALVES)
    W = draw.base(shape).to(dtype).double()
    deltas, about = draw.deltas(shape, n)
    size = draw.power((-0.5, 2.5)) * rms(spacing(W, dtype))
    dtypes = [draw.pick.choice((dtype, *HALVES, torch.float32)) for _ in range(n)]
    return _merged(W, [size * M_i for M_i in deltas], dtypes, dtype, f"{about} in {', '.join(map(name_of, dtypes))}")


def _quantised(draw: _Draw) -> Problem:
    """Merges rounded to 8 or 4 bits."""
    eight = draw.pick.random() < 0.6
    shape, n, dtype = draw.shape(), draw.count(), draw.pick.choice((torch.bfloat16, torch.float16, torch.float32))
    W = draw.base(shape).to(dtype).double()
    deltas, about = draw.deltas(shape, n)
    size = rms(W) * (draw.power((-2.5, 0)) if eight else draw.power((-1.5, 0.3)))

    def levels(merge: Tensor) -> Tensor:
        if not eight:
            return to_nf4(merge)
        scale = merge.abs().amax(dim=1, keepdim=True) / 127
        return (merge / scale).round() * scale

    exact = [W + size * M_i for M_i in deltas]
    models = tuple(levels(merge).to(dtype) for merge in exact)
    noise = tuple(level_noise(W_i) for W_i in models)
    ulps = size / rms(spacing(W, dtype))
    return Problem("", W, models, dtype, ulps, f"{about} {8 if eight else 4} bits", noise)


def _surplus(draw: _Draw) -> Problem:
    """Three independent adapters, and a model that is not independent of them."""
    shape, dtype = draw.shape(), draw.pick.choice((torch.bfloat16, torch.float16, torch.float32))
    W = draw.base(shape).to(dtype).double()
    deltas, about = draw.deltas(shape, 4)
    name = draw.pick.choice(list(EXTRAS))
    deltas[3] = EXTRAS[name](*deltas)
    size = draw.power((-0.5, 3)) * rms(spacing(W, dtype))
    merged = draw.pick.choice((dtype, torch.float32))
    return _merged(W, [size * M_i for M_i in deltas], [merged] * 4, dtype, f"{about}, {name}")


EXTRAS: Mapping[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "the first at 0.7": lambda a, b, c, d: 0.7 * a,
    "half of two": lambda a, b, c, d: (a + b) / 2,
    "another on half of the first": lambda a, b, c, d: a / 2 + d,
}


def _shared(draw: _Draw) -> Problem:
    """Adapters that share rows, or a part that not all have."""
    shape, n = draw.shape(), draw.count()
    dtype = draw.pick.choice(DTYPES)
    W = draw.base(shape).to(dtype).double()
    deltas, about = draw.deltas(shape, n)
    how = draw.pick.choice(("rows of two", "rows of all", "a part of two", "columns of two"))
    if n < 5:
        # What most models have in common is taken for the base's.
        how = "rows of two" if how == "a part of two" else how
    row, column = draw.normal(shape[1], 1), draw.normal(shape[0], 1)
    for i in range(n if how == "rows of all" else 2):
        if how == "a part of two":
            part = column @ row.mT
        elif how == "columns of two":
            part = column @ draw.normal(1, shape[1])
        else:
            part = draw.normal(shape[0], 1) @ row.mT
        deltas[i] = deltas[i] + part / rms(part)
    size = min(draw.power(ULPS[dtype]) * rms(spacing(W, dtype)), 3 * rms(W))
    return _merged(W, [size * M_i for M_i in deltas], [dtype] * n, dtype, f"{about}, shared: {how}")


def _few(draw: _Draw) -> Problem:
    """One or two float32 merges of a half-precision base."""
    return _random(draw, finer=True, n=draw.pick.choice((1, 2, 2)), ends=FEW_MODELS)


def _smollm(draw: _Draw) -> Problem:
    """A layer of SmolLM2-135M with some of the adapters that change it, merged as PEFT does."""
    pick = draw.pick
    # Keys and values are small; the others have three to eight times as many entries.
    module = pick.choice(("k_proj", "v_proj") * 5 + llm_models.ALL)
    layer = pick.choice([i for i in llm_models.LAYERS if i % len(SPLITS) == draw.split])
    name = f"model.layers.{layer}.{'self_attn' if module in llm_models.ATTENTION else 'mlp'}.{module}"
    known = {tag: M for tag in (*llm_models.ADAPTERS, *FINE_TUNES) if (M := _smollm_delta(tag, name)) is not None}
    tags = pick.sample(sorted(known), min(len(known), pick.choice((3, 3, 3, 4, 5, 8))))
    # The trained ones are light, those that come with the package thirty times as heavy.
    factor = draw.power((-0.2, 1.6))
    deltas = [(factor / 30 if tag in FINE_TUNES else factor) * known[tag] for tag in tags]
    if len(deltas) > 3 and pick.random() < 0.15:
        extra = pick.choice(list(EXTRAS))
        deltas[-1] = EXTRAS[extra](deltas[0], deltas[1], deltas[2], deltas[-1])
        tags[-1] = extra
    dtype = pick.choice((torch.bfloat16, torch.bfloat16, torch.float16, torch.float32))
    with safe_open(llm_models.base() / "model.safetensors", "pt") as file:
        W = file.get_tensor(f"{name}.weight")
    # A base that is loaded in fp16 is rounded to it first.
    grid = torch.bfloat16 if dtype is torch.float32 else dtype
    return _merged_by_peft(W.to(dtype), deltas, grid, f"{name} of {', '.join(tags)}")


def _minilm(draw: _Draw) -> Problem:
    """A layer of all-MiniLM-L6-v2 with adapters trained from one seed."""
    pick = draw.pick
    layer = pick.choice([i for i in range(6) if i % len(SPLITS) == draw.split])
    name = f"encoder.layer.{layer}.attention.self.{pick.choice(('query', 'value'))}"
    domains = pick.sample(MINILM_DOMAINS, pick.choice((3, 3, 4)))
    factor = draw.power((-2.5, 0.5))
    deltas = [factor * _lora(_minilm_adapter(domain), name) for domain in domains]
    dtype = pick.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16))
    W = load_file(base_model() / "model.safetensors")[f"{name}.weight"]
    return _merged_by_peft(W.to(dtype), deltas, dtype, f"{name} of {', '.join(domains)}")


MINILM_DOMAINS = list(DOMAINS)[:4]


def _left_alone(draw: _Draw) -> Problem:
    """One model or two have the base's own bits, as those whose adapters are elsewhere."""
    shape, n, dtype = draw.shape(), draw.count(), draw.pick.choice(HALVES)
    W = draw.base(shape).to(dtype).double()
    deltas, about = draw.deltas(shape, n)
    alone = draw.pick.choice((1, 1, 2))
    deltas[n - alone :] = [torch.zeros_like(W)] * alone
    size = draw.power((-1.0, 2.5)) * rms(spacing(W, dtype))
    merged = draw.pick.choice((dtype, dtype, torch.float32))
    return _merged(W, [size * M_i for M_i in deltas], [merged] * n, dtype, f"{about}, {alone} left alone")


def _mini(draw: _Draw, model: str) -> Problem:
    """A layer of a small model with adapters trained from one seed, light to heavy."""
    pick = draw.pick
    name = pick.choice([name for i, name in enumerate(mini_models.names(model)) if i % len(SPLITS) == draw.split])
    W, deltas = mini_models.base_and_deltas(model, name)
    deltas = pick.sample(deltas, pick.choice((3, 3, 4)))
    dtype = pick.choice((torch.float32, torch.bfloat16, torch.float16))
    grid = torch.bfloat16 if dtype is torch.float32 and pick.random() < 0.5 else dtype
    W = W.to(grid).to(dtype)
    factor = draw.power(ULPS[dtype]) * rms(spacing(W.double(), dtype)) / rms(torch.stack(deltas))
    factor = min(factor, rms(W.double()) / rms(torch.stack(deltas)))
    return _merged_by_peft(W, [factor * M_i for M_i in deltas], grid, f"{name} of {len(deltas)} tasks")


def _merged_by_peft(W: Tensor, deltas: Sequence[Tensor], grid: torch.dtype, about: str) -> Problem:
    """PEFT rounds a delta to the model's dtype before it adds it."""
    models = tuple(W + M_i.to(W.dtype) for M_i in deltas)
    size = math.sqrt(sum(rms(M_i) ** 2 for M_i in deltas) / len(deltas))
    return Problem("", W.double(), models, grid, size / rms(spacing(W, grid)), about)


def _smollm_delta(tag: str, module: str) -> Tensor | None:
    return _lora(shipped_adapter(tag) if tag in FINE_TUNES else llm_models.adapter(tag), module)


@cache
def _adapter(path: Path) -> dict[str, Tensor]:
    return load_file(path / "adapter_model.safetensors")


def _lora(path: Path, module: str) -> Tensor | None:
    """`2 B A`, float64; None where the adapter leaves the module alone."""
    state = _adapter(path)
    prefix = f"base_model.model.{module}.lora_"
    if f"{prefix}A.weight" not in state:
        return None
    return 2 * state[f"{prefix}B.weight"].double() @ state[f"{prefix}A.weight"].double()


def _minilm_adapter(domain: str) -> Path:
    path = minilm.CACHE / f"adapter-{domain}"
    if not (path / "losses.json").is_file():
        train_lora(base_model(), passages(domain), path, rank=minilm.RANK, seed=0)
    return path


Kinds = Mapping[str, tuple[float, Callable[[_Draw], Problem]]]
KINDS: Kinds = {
    "random": (8, _random),
    "finer merges": (4, lambda draw: _random(draw, finer=True)),
    "few models": (1.5, _few),
    "mixed dtypes": (1, _mixed),
    "quantised": (1, _quantised),
    "surplus": (1, _surplus),
    "shared parts": (1, _shared),
    "SmolLM2": (6, _smollm),
    "MiniLM": (1, _minilm),
}
LATER_SHARE = 0.14
LATER_KINDS: Kinds = {
    "left alone": (1, _left_alone),
    "mini ViT": (1, lambda draw: _mini(draw, "ViT")),
    "mini Mistral": (1, lambda draw: _mini(draw, "Mistral")),
    "mini diffusion": (1, lambda draw: _mini(draw, "diffusion")),
}
