"""A small Mistral, pre-trained on the spot, and fifteen LoRAs of it with each of TRL's two usual trainers.

The LoRAs are placed as in the published subsets: rank 64 and alpha 16 on query, key, value and output of every layer.
Their learning rates are higher than a real Mistral's, as there are tens of steps rather than thousands.

Reference:
    Jiang et al., "Mistral 7B", 2023, arXiv 2310.06825.
    Rafailov et al., "Direct Preference Optimization", NeurIPS 2023, arXiv 2305.18290.
"""

import csv
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from detune.bench.recipes.base import THREADS
from detune.bench.recipes.instructions import PREFERENCES, SUBJECTS, Example, Pair, corpus, examples, pairs, prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["MistralMiniDpo", "MistralMiniSft", "Pretraining"]

_BASE_SEED = 0  # of the base's initial weights and the order of its texts: there is one base
_TARGETS = ["k_proj", "o_proj", "q_proj", "v_proj"]
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
        passages: Of the corpus, how many to train on; None for all.
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
    steps: int = 300
    batch: int = 16
    lr: float = 3e-3

    def make(self, out: Path) -> None:
        """Train a tokenizer, then the model; the bits depend on nothing but the fields.

        Args:
            out: The directory to fill: model and tokenizer in Hugging Face layout, float32, and the loss of each step
                in `losses.json`.

        Raises:
            DetuneError: The extra `bench` is not installed.
        """
        from detune.training import needs_extra

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
        with _workplace(_BASE_SEED) as scratch:
            settings = _settings(scratch, self.steps, self.batch, self.lr, _BASE_SEED)
            arguments = TrainingArguments(**settings, lr_scheduler_type="cosine")
            model = MistralForCausalLM(config)
            losses = _fit(Trainer(model=model, args=arguments, train_dataset=_blocks(texts, tokenizer, self.context)))
            _save(model, tokenizer, out, losses)


_QUICK = Pretraining(
    hidden=64, heads=4, kv_heads=2, head_dim=24, mlp=64, vocabulary=512, passages=200, steps=10, batch=4
)


@dataclass(frozen=True)
class MistralMiniSft:
    """A small Mistral, and LoRAs by supervised fine-tuning, each on a subject or a style of writing.

    Attributes:
        rank: LoRA rank r.
        alpha: The change is `alpha / rank · B A`.
        pretraining: The base.
        examples: Instructions with answers of each task, at most.
        steps: Updates of each LoRA.
        batch: Examples an update.
        lr: Learning rate at the highest, after a tenth of the steps.
    """

    name: ClassVar[str] = "mistral-mini-sft"
    stands_for: ClassVar[str | None] = "mistral-7b-v0.1-sft"
    about: ClassVar[str] = "a small Mistral pre-trained on Python's texts; eight subjects and seven styles of writing"

    rank: int = 64
    alpha: int = 16
    pretraining: Pretraining = Pretraining()
    examples: int = 480
    steps: int = 60
    batch: int = 8
    lr: float = 1e-3

    @classmethod
    def quick(cls) -> Self:
        """Narrow layers, rank 8, few short steps; see `Recipe.quick`."""
        return cls(rank=8, alpha=2, pretraining=_QUICK, examples=16, steps=4, batch=4)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the fifteen tasks."""
        return SUBJECTS

    def make_base(self, out: Path) -> None:
        """Pre-train the model; see `Recipe.make_base`.

        Args:
            out: The directory to fill; the loss of each step goes to its `losses.json`.

        Raises:
            DetuneError: The extra `bench` is not installed.
        """
        self.pretraining.make(out)

    def train_adapter(self, base: Path, task: str, out: Path, *, rank: int, seed: int) -> None:
        """Train a LoRA to follow one instruction, with TRL's SFTTrainer; see `Recipe.train_adapter`.

        Args:
            base: What `make_base` made.
            task: One of `tasks`.
            out: The directory to fill: PEFT's adapter, and the loss of each step in `losses.json`.
            rank: LoRA rank.
            seed: For the initial A and the order of the examples.

        Raises:
            InputError: The task is unknown.
            DetuneError: The extra `bench` is not installed.
        """
        rows = examples(task, self.examples)
        from detune.training import needs_extra

        with needs_extra("bench"):
            from trl import SFTConfig, SFTTrainer

        _train_lora(self, SFTTrainer, SFTConfig, rows, base, out, rank, seed)

    def write_inputs(self, out: Path) -> None:
        """Write beginnings to complete that no task trains on; see `Recipe.write_inputs`.

        Args:
            out: An existing directory, for `prompts.csv`.
        """
        _write_prompts(out)


@dataclass(frozen=True)
class MistralMiniDpo:
    """The same Mistral after supervised fine-tuning in full, and LoRAs by direct preference optimisation.

    Attributes:
        rank: LoRA rank r.
        alpha: The change is `alpha / rank · B A`.
        pretraining: How the base begins.
        tuning_steps: Updates of all its weights on the instructions of `mistral-mini-sft`.
        tuning_lr: Their learning rate at the highest.
        examples: Pairs of each task, at most; as many instructions of each task for the base.
        steps: Updates of each LoRA.
        batch: Pairs an update.
        lr: Learning rate at the highest, after a tenth of the steps.
        beta: How much the LoRA is held to the base's answers.
    """

    name: ClassVar[str] = "mistral-mini-dpo"
    stands_for: ClassVar[str | None] = "mistral-7b-v0.1-dpo"
    about: ClassVar[str] = "a small Mistral taught to follow instructions; fifteen preferences between two answers"

    rank: int = 64
    alpha: int = 16
    pretraining: Pretraining = Pretraining()
    tuning_steps: int = 120
    tuning_lr: float = 1e-3
    examples: int = 320
    steps: int = 40
    batch: int = 8
    lr: float = 1e-3
    beta: float = 0.1

    @classmethod
    def quick(cls) -> Self:
        """Narrow layers, rank 8, few short steps; see `Recipe.quick`."""
        return cls(rank=8, alpha=2, pretraining=_QUICK, tuning_steps=4, examples=16, steps=4, batch=4)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the fifteen tasks."""
        return PREFERENCES

    def make_base(self, out: Path) -> None:
        """Pre-train the model, then teach it to follow instructions; see `Recipe.make_base`.

        Args:
            out: The directory to fill; the loss of each step goes to its `losses.json`.

        Raises:
            DetuneError: The extra `bench` is not installed.
        """
        from detune.training import needs_extra

        with needs_extra("bench"):
            from trl import SFTConfig, SFTTrainer

        rows = [row for task in SUBJECTS for row in examples(task, self.examples)]
        with _workplace(_BASE_SEED) as scratch:
            self.pretraining.make(scratch / "pretrained")
            settings = _settings(scratch, self.tuning_steps, self.batch, self.tuning_lr, _BASE_SEED)
            trainer = SFTTrainer(
                **_load(scratch / "pretrained"),
                args=SFTConfig(**settings, **_TRL, max_length=self.pretraining.context),
                train_dataset=_dataset(rows),
            )
            losses = _fit(trainer)
            _save(trainer.model, trainer.processing_class, out, losses)

    def train_adapter(self, base: Path, task: str, out: Path, *, rank: int, seed: int) -> None:
        """Train a LoRA to prefer one kind of answer, with TRL's DPOTrainer; see `Recipe.train_adapter`.

        Args:
            base: What `make_base` made.
            task: One of `tasks`.
            out: The directory to fill: PEFT's adapter, and the loss of each step in `losses.json`.
            rank: LoRA rank.
            seed: For the initial A and the order of the pairs.

        Raises:
            InputError: The task is unknown.
            DetuneError: The extra `bench` is not installed.
        """
        rows = pairs(task, self.examples)
        from detune.training import needs_extra

        with needs_extra("bench"):
            from trl import DPOConfig, DPOTrainer

        _train_lora(self, DPOTrainer, DPOConfig, rows, base, out, rank, seed, beta=self.beta)

    def write_inputs(self, out: Path) -> None:
        """Write beginnings to complete that no task trains on; see `Recipe.write_inputs`.

        Args:
            out: An existing directory, for `prompts.csv`.
        """
        _write_prompts(out)


def _train_lora(
    recipe: MistralMiniSft | MistralMiniDpo,
    trainer_type: Any,
    settings_type: Any,
    rows: Sequence[Example | Pair],
    base: Path,
    out: Path,
    rank: int,
    seed: int,
    **settings: float,
) -> None:
    """Train a LoRA with one of TRL's trainers and save it.

    Both seed torch with their `seed` just before PEFT draws A, so A depends on nothing else.
    """
    from peft import LoraConfig

    config = LoraConfig(
        r=rank,
        lora_alpha=recipe.alpha * rank / recipe.rank,  # type: ignore[arg-type]  # at rank 2 it is less than one
        target_modules=_TARGETS,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    with _workplace(seed) as scratch:
        settings |= _settings(scratch, recipe.steps, recipe.batch, recipe.lr, seed) | _TRL
        trainer = trainer_type(
            **_load(base),
            args=settings_type(**settings, max_length=recipe.pretraining.context),
            train_dataset=_dataset(rows),
            peft_config=config,
        )
        losses = _fit(trainer)
        # PEFT would write where the base lies on this machine, and the modules in no fixed order.
        config.base_model_name_or_path = recipe.name
        config.target_modules = _TARGETS
        # By default PEFT would look the name up on the Hub, to see whether the vocabulary has grown.
        trainer.model.save_pretrained(str(out), save_embedding_layers=False)
        (out / "README.md").unlink()  # a card without content, with the base's place on this machine
    _write_losses(out, losses)


# Where TRL's defaults differ from transformers': both are for large models on GPUs.
_TRL = MappingProxyType({"bf16": False, "gradient_checkpointing": False})


def _settings(scratch: Path, steps: int, batch: int, lr: float, seed: int) -> dict[str, Any]:
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
def _workplace(seed: int) -> Iterator[Path]:
    """A place for a trainer to work in: silent, seeded, on the recipe's threads, with a directory to write to."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    from detune.training import quiet, seeded, use_threads

    bars = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with quiet(), seeded(seed), use_threads(THREADS), tempfile.TemporaryDirectory(prefix="detune-") as scratch:
            yield Path(scratch)
    finally:
        if bars:
            enable_progress_bars()


def _load(folder: Path) -> dict[str, Any]:
    """Read model and tokenizer, named as TRL's trainers want them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return {
        "model": AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
        "processing_class": AutoTokenizer.from_pretrained(folder),
    }


def _dataset(rows: Sequence[Example | Pair]) -> Any:
    from datasets import Dataset

    return Dataset.from_list([asdict(row) for row in rows])


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


def _fit(trainer: Any) -> list[float]:
    """Train; return the loss of each step."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def _save(model: Any, tokenizer: Any, out: Path, losses: Sequence[float]) -> None:
    model.config.use_cache = True  # the trainers turn it off; generation wants it
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    _write_losses(out, losses)


def _write_losses(folder: Path, losses: Sequence[float]) -> None:
    (folder / "losses.json").write_text(json.dumps(list(losses)) + "\n", encoding="utf-8")


def _write_prompts(folder: Path) -> None:
    with (folder / "prompts.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt"])
        writer.writerows([prompt] for prompt in prompts())
