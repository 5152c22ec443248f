"""A small Mistral that learns English on the spot, and what any training of it has in common."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detune.bench.recipes.base import THREADS, write_losses
from detune.bench.recipes.instructions import corpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["BASE_SEED", "Pretraining", "fit", "save_model", "settings_of", "workplace"]

BASE_SEED = 0
"""Seed of the base's initial weights and of the order of its texts: there is one base."""

_BOS, _EOS, _PAD = _SPECIAL = ("<s>", "</s>", "<pad>")


@dataclass(frozen=True)
class Pretraining:
    """A small Mistral and how it learns English, from the texts that Python carries.

    Each LoRA changes, in every layer, matrices of (heads · head_dim, hidden), twice (kv_heads · head_dim, hidden), and
    (hidden, heads · head_dim). They must be large enough for the rank: three LoRAs of rank r are told apart where
    2 r < min(out, in) and 3 r <= max(out, in).

    Attributes:
        hidden: Width of the transformer.
        layers: Number of its layers.
        heads: Attention heads of the queries.
        kv_heads: Attention heads of the keys and values (grouped-query attention).
        head_dim: Width of a head.
        mlp: Width of the hidden layer of each MLP.
        vocabulary: Tokens, three special ones and all bytes among them.
        context: Tokens the model reads at most.
        passages: How many passages of the corpus to train on; None for all.
        steps: Updates.
        batch: Blocks of `context` tokens an update.
        lr: Highest learning rate, after a tenth of the steps.
    """

    hidden: int = 256
    layers: int = 2
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 48
    mlp: int = 512
    vocabulary: int = 2048
    context: int = 128
    passages: int | None = None
    steps: int = 500
    batch: int = 8
    lr: float = 3e-3

    def make(self, out: Path) -> None:
        """Train a tokenizer, then the model; the bits depend on nothing but the fields.

        Args:
            out: The directory to fill: model and tokenizer in Hugging Face layout, float32, and the loss of each step
                in `losses.json`.

        Raises:
            DetuneError: The extra `bench` is not installed.
        """
        from detune._runtime import needs_extra

        with needs_extra("bench"):
            from transformers import MistralConfig, MistralForCausalLM, Trainer, TrainingArguments

        texts = corpus()[: self.passages]
        tokenizer = _tokenizer(texts, self.vocabulary, self.context)
        config = MistralConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.hidden,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.context,
            sliding_window=None,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        with workplace(BASE_SEED) as scratch:
            settings = settings_of(scratch, self.steps, self.batch, self.lr, BASE_SEED)
            # The usual beta2 of pre-training: with 0.999, Adam would average over more steps than there are.
            arguments = TrainingArguments(**settings, lr_scheduler_type="cosine", adam_beta2=0.95)
            model = MistralForCausalLM(config)
            losses = fit(Trainer(model=model, args=arguments, train_dataset=_blocks(texts, tokenizer, self.context)))
            save_model(model, tokenizer, out, losses)


def settings_of(scratch: Path, steps: int, batch: int, lr: float, seed: int) -> dict[str, Any]:
    """Arguments of any trainer: on the CPU, without output, checkpoints or reports to anybody."""
    return {
        "output_dir": str(scratch),
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "learning_rate": lr,
        "warmup_steps": steps // 10,
        "seed": seed,
        "data_seed": seed,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }


@contextmanager
def workplace(seed: int) -> Iterator[Path]:
    """A place for a trainer to work in: silent, seeded, on the recipe's threads, with a directory to write to."""
    from detune._runtime import global_seed, needs_extra, quiet, use_threads
    from detune.checkpoints import temporary_directory

    with needs_extra("bench"):
        from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    bars = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with quiet(), global_seed(seed), use_threads(THREADS), temporary_directory("training") as scratch:
            yield scratch
    finally:
        if bars:
            enable_progress_bars()


def fit(trainer: Any) -> list[float]:
    """Train; return the loss of each step."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def save_model(model: Any, tokenizer: Any, out: Path, losses: Sequence[float]) -> None:
    """Save what `from_pretrained` loads, and the loss of each step."""
    model.config.use_cache = True  # the trainers turn it off; generation wants it
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    write_losses(out, losses)


def _tokenizer(texts: Sequence[str], vocabulary: int, context: int) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE tokenizer that starts every text with `<s>`, as Mistral's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A", special_tokens=[(_BOS, bpe.token_to_id(_BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=_BOS, eos_token=_EOS, pad_token=_PAD, model_max_length=context
    )


def _blocks(texts: Sequence[str], tokenizer: "PreTrainedTokenizerFast", context: int) -> list[dict[str, list[int]]]:
    """Join the texts, each between `<s>` and `</s>`, and cut them in blocks of equal length."""
    stream = [token for text in texts for token in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
    starts = range(0, len(stream) - context + 1, context)
    blocks = [stream[start : start + context] for start in starts]
    return [{"input_ids": block, "labels": block} for block in blocks]
