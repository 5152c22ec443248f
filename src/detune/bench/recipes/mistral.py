"""A small Mistral, pre-trained on the spot, and fifteen LoRAs of it with each of TRL's two usual trainers.

The LoRAs are placed as in the published subsets: rank 64 and alpha 16 on query, key, value and output of every layer.
Their learning rates are higher than a real Mistral's, as there are tens of steps rather than thousands.

Reference:
    Jiang et al., "Mistral 7B", 2023, arXiv 2310.06825.
    Rafailov et al., "Direct Preference Optimization", NeurIPS 2023, arXiv 2305.18290.
"""

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self

from detune.bench.recipes.base import write_losses
from detune.bench.recipes.instructions import PREFERENCES, SUBJECTS, Example, Pair, examples, pairs, prompts
from detune.bench.recipes.mistral_base import (
    BASE_SEED,
    Pretraining,
    fit,
    save_model,
    settings_of,
    workplace,
)

__all__ = ["MistralMiniDpo", "MistralMiniSft"]

_TARGETS = ("k_proj", "o_proj", "q_proj", "v_proj")
# TRL's defaults differ from transformers' in these: both are for large models on GPUs.
_TRL = MappingProxyType({"bf16": False, "gradient_checkpointing": False})

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
    layers: ClassVar[int] = 8

    rank: int = 64
    alpha: int = 16
    pretraining: Pretraining = field(default_factory=Pretraining)
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
        from detune._runtime import needs_extra

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
    """The small Mistral after supervised fine-tuning in full, and LoRAs by direct preference optimisation.

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
    layers: ClassVar[int] = 8

    rank: int = 64
    alpha: int = 16
    pretraining: Pretraining = field(default_factory=Pretraining)
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
        from detune._runtime import needs_extra

        with needs_extra("bench"):
            from trl import SFTConfig, SFTTrainer

        rows = [row for task in SUBJECTS for row in examples(task, self.examples)]
        with workplace(BASE_SEED) as scratch:
            self.pretraining.make(scratch / "pretrained")
            settings = settings_of(scratch, self.tuning_steps, self.batch, self.tuning_lr, BASE_SEED)
            trainer = SFTTrainer(
                **_load(scratch / "pretrained"),
                args=SFTConfig(**settings, **_TRL, max_length=self.pretraining.context),
                train_dataset=_dataset(rows),
            )
            save_model(trainer.model, trainer.processing_class, out, fit(trainer))

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
        from detune._runtime import needs_extra

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
        target_modules=list(_TARGETS),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    with workplace(seed) as scratch:
        settings |= settings_of(scratch, recipe.steps, recipe.batch, recipe.lr, seed) | _TRL
        trainer = trainer_type(
            **_load(base),
            args=settings_type(**settings, max_length=recipe.pretraining.context),
            train_dataset=_dataset(rows),
            peft_config=config,
        )
        losses = fit(trainer)
        # PEFT would write where the base lies on this machine, and the modules in no fixed order.
        config.base_model_name_or_path = recipe.name
        config.target_modules = list(_TARGETS)
        # By default PEFT would look the name up on the Hub, to see whether the vocabulary has grown.
        trainer.model.save_pretrained(str(out), save_embedding_layers=False)
        (out / "README.md").unlink()  # a card without content, with the base's place on this machine
    write_losses(out, losses)


def _load(folder: Path) -> dict[str, Any]:
    """Read model and tokenizer, named as TRL's trainers want them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from detune.checkpoints import load_pretrained

    return {
        "model": load_pretrained(AutoModelForCausalLM, folder, dtype="float32"),
        "processing_class": load_pretrained(AutoTokenizer, folder),
    }


def _dataset(rows: Sequence[Example | Pair]) -> Any:
    from datasets import Dataset

    return Dataset.from_list([asdict(row) for row in rows])


def _write_prompts(folder: Path) -> None:
    with (folder / "prompts.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt"])
        writer.writerows([prompt] for prompt in prompts())
