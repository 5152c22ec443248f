"""Fine-tunes of SmolLM2-135M-Instruct for `llm.py`, made once and kept in `benchmarks/.cache/llm`.

Five LoRAs, trained for a few steps at a low rate, as light as preference optimisation or a short fine-tune leaves them:

    A r=16 attention, B r=8 all linear layers, C r=16 all, D r=8 attention, E r=32 all,

and the checkpoint of A's run after two thirds of its steps. PEFT merges them in bf16, fp16 and float32, as they are
(light), ten times as large (ordinary) and thirty times (heavy).
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from detune._runtime import global_seed, quiet, use_threads
from detune.demo.language_model import FineTune, language_model, train_adapter
from detune.demo.texts import passages
from detune.demo.train import merge

CACHE = Path(__file__).parent / ".cache" / "llm"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
LAYERS = range(30)
ADAPTERS = {
    "A": FineTune("language", 16, ATTENTION, 1, LAYERS),
    "B": FineTune("networking", 8, ALL, 2, LAYERS),
    "C": FineTune("concurrency", 16, ALL, 3, LAYERS),
    "D": FineTune("files", 8, ATTENTION, 4, LAYERS),
    "E": FineTune("testing", 32, ALL, 5, LAYERS),
}
STEPS, EARLY, RATE = 24, 16, 2e-4
STRENGTHS = {"light": 1.0, "ordinary": 10.0, "heavy": 30.0}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}
ADDED_TOKENS, FULL_STEPS, FULL_RATE = 2, 6, 1e-5


@dataclass(frozen=True)
class Change:
    """A matrix's changes by each adapter.

    Attributes:
        W: The base's, bf16.
        deltas: `M` by adapter, float64; zero where the adapter leaves the matrix alone.
        ranks: By adapter.
    """

    W: torch.Tensor
    deltas: dict[str, torch.Tensor]
    ranks: dict[str, int]


def base() -> Path:
    """The base in bf16."""
    path = CACHE / "base"
    return path if (path / "config.json").is_file() else language_model(path)


def adapter(name: str) -> Path:
    """One of `ADAPTERS`, or "A-early"."""
    path = CACHE / "adapters" / name[0]
    if not (path / "losses.json").is_file():
        train_adapter(base(), ADAPTERS[name[0]], path, steps=STEPS, lr=RATE, threads=1, early=(EARLY,))
    return path / f"checkpoint-{EARLY}" if name.endswith("-early") else path


def merged(name: str, strength: str, dtype: str) -> Path:
    """PEFT's merge of an adapter."""
    path = CACHE / f"{strength}-{dtype}" / name
    if not (path / "tokenizer.json").is_file():
        merge(base(), _scaled(adapter(name), STRENGTHS[strength]), path, DTYPES[dtype])
    return path


def _scaled(path: Path, factor: float) -> Path:
    """The adapter with its B times a factor."""
    if factor == 1:
        return path
    out = path.with_name(f"{path.name}-{factor:g}")
    shutil.copytree(path, out, dirs_exist_ok=True)
    state = load_file(path / "adapter_model.safetensors")
    scaled = {name: tensor.float() * (factor if "lora_B" in name else 1) for name, tensor in state.items()}
    save_file(scaled, out / "adapter_model.safetensors", metadata={"format": "pt"})
    return out


def changes(names: list[str]) -> dict[str, Change]:
    """Every linear layer with the light deltas of some adapters, `W + factor * M` as PEFT adds them."""
    W = load_file(base() / "model.safetensors")
    states = {name: load_file(adapter(name) / "adapter_model.safetensors") for name in names}
    found = {}
    for layer in LAYERS:
        for target in ALL:
            module = f"model.layers.{layer}.{'self_attn' if target in ATTENTION else 'mlp'}.{target}"
            deltas, ranks = {}, {}
            for name, state in states.items():
                A = state.get(f"base_model.model.{module}.lora_A.weight")
                B = state.get(f"base_model.model.{module}.lora_B.weight")
                whole = W[f"{module}.weight"].double()
                deltas[name] = torch.zeros_like(whole) if A is None or B is None else 2 * B.double() @ A.double()
                ranks[name] = 0 if A is None else A.shape[0]
            found[f"{module}.weight"] = Change(W[f"{module}.weight"], deltas, ranks)
    return found


def with_added_tokens() -> Path:
    """D's merge with a vocabulary of two more tokens."""
    path = CACHE / "light-bf16" / "D-tokens"
    if not (path / "tokenizer.json").is_file():
        with quiet(), global_seed(0):
            model = AutoModelForCausalLM.from_pretrained(merged("D", "light", "bf16"), dtype=torch.bfloat16)
            tokenizer = AutoTokenizer.from_pretrained(base())
            tokenizer.add_tokens([f"<added-{i}>" for i in range(ADDED_TOKENS)])
            model.resize_token_embeddings(len(tokenizer))
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)
    return path


def merged_twice() -> Path:
    """D's LoRA merged into B's merge."""
    path = CACHE / "light-bf16" / "B-then-D"
    return (
        path
        if (path / "tokenizer.json").is_file()
        else merge(merged("B", "light", "bf16"), adapter("D"), path, torch.bfloat16)
    )


def fully_tuned() -> Path:
    """A light full fine-tune, in bf16: every weight trained."""
    path = CACHE / "light-bf16" / "full"
    if (path / "tokenizer.json").is_file():
        return path
    with quiet(), global_seed(0), use_threads(1):
        tokenizer = AutoTokenizer.from_pretrained(base())
        model = AutoModelForCausalLM.from_pretrained(base(), dtype=torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=FULL_RATE, weight_decay=0.0)
        for text in passages("text")[:FULL_STEPS]:
            batch = tokenizer(text, return_tensors="pt", truncation=True, max_length=48)["input_ids"]
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.to(torch.bfloat16).save_pretrained(path)
        tokenizer.save_pretrained(path)
    return path
