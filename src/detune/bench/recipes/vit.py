"""A small vision transformer, trained on digits, and fifteen classifiers made of it as people make them.

The settings of the LoRAs are those of PEFT's own example of image classification: query and value of every layer, rank
16, alpha 16, dropout 0.1, rate 5e-3, and a new classification head that is trained whole.

The head goes to a file of its own, `head.safetensors`, rather than into the adapter (`modules_to_save`): each task has
its own classes, so no head is a change of the base's, and what is merged is the LoRA alone.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from detune.bench.recipes import digits
from detune.bench.recipes.base import THREADS, write_losses
from detune.errors import InputError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["VitMini"]

_PATCH_PIXELS = 8
_INPUTS = 64
_BASE_SEED = 0  # of the base's initial weights and the order of its examples: there is one base
# Query and value under the names of transformers 4, which are those of the checkpoint, and of transformers 5.
_TARGETS = ("query", "value", "q_proj", "v_proj")


@dataclass(frozen=True)
class VitMini:
    """A ViT of 12 layers, and a LoRA on the query and value of each for every task.

    Attributes:
        rank: LoRA rank r.
        alpha: The change is `alpha / rank · B A`.
        hidden: Width of the transformer: each LoRA changes 24 matrices of (hidden, hidden).
        heads: Attention heads a layer.
        mlp: Width of the hidden layer of each MLP.
        image_pixels: Width and height of an image, a multiple of 8.
        base_steps: Updates of the base.
        base_lr: Its highest learning rate, after a tenth of the steps.
        steps: Updates of each LoRA.
        lr: Its learning rate at the first step.
        batch: Images an update.
        threads: CPU threads to train on.
    """

    name: ClassVar[str] = "vit-mini"
    stands_for: ClassVar[str | None] = "vit"
    about: ClassVar[str] = "a small vision transformer trained on handwritten digits; fifteen questions about digits"
    layers: ClassVar[int] = 24

    rank: int = 16
    alpha: int = 16
    hidden: int = 128
    heads: int = 2
    mlp: int = 256
    image_pixels: int = 32
    base_steps: int = 300
    base_lr: float = 5e-4
    steps: int = 60
    lr: float = 5e-3
    batch: int = 32
    threads: int = THREADS

    @classmethod
    def quick(cls) -> Self:
        """Four patches instead of sixteen, narrow layers, few steps, one thread; see `Recipe.quick`."""
        return cls(rank=4, alpha=4, hidden=48, mlp=96, image_pixels=16, base_steps=20, steps=8, batch=16, threads=1)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the fifteen tasks."""
        return tuple(digits.TASKS)

    def make_base(self, out: Path) -> None:
        """Train the vision transformer to tell the ten digits apart; see `Recipe.make_base`.

        Args:
            out: The directory to fill; the loss of each step goes to its `losses.json`.

        Raises:
            DetuneError: The extra `bench` is not installed.
        """
        from detune._runtime import global_seed, needs_extra, quiet, use_threads

        with needs_extra("bench"):
            from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

        config = ViTConfig(
            hidden_size=self.hidden,
            num_hidden_layers=12,
            num_attention_heads=self.heads,
            intermediate_size=self.mlp,
            image_size=self.image_pixels,
            patch_size=_PATCH_PIXELS,
            initializer_range=self.hidden**-0.5,  # a narrow model learns slowly from the usual 0.02
            id2label={digit: str(digit) for digit in range(10)},
            label2id={str(digit): digit for digit in range(10)},
        )
        processor = ViTImageProcessorPil(size={"height": self.image_pixels, "width": self.image_pixels})
        with quiet(), global_seed(_BASE_SEED), use_threads(self.threads):
            model = ViTForImageClassification(config)
            losses = _train(
                model,
                _Seen(digits.load().train, processor),
                steps=self.base_steps,
                batch=self.batch,
                lr=self.base_lr,
                warmup_steps=self.base_steps // 10,
                seed=_BASE_SEED,
            )
            model.save_pretrained(out)
            processor.save_pretrained(out)
        write_losses(out, losses)

    def train_adapter(
        self, base: Path, task: str, out: Path, *, rank: int, seed: int, images: int | None = None
    ) -> None:
        """Train a LoRA and a new head on one task; see `Recipe.train_adapter`.

        Args:
            base: What `make_base` made.
            task: One of `tasks`.
            out: The directory to fill: PEFT's adapter, `head.safetensors` with the task's classifier, and the loss
                of each step in `losses.json`.
            rank: LoRA rank.
            seed: For the initial A, the head, the order of the images and dropout.
            images: How many of the training images are used, drawn with the seed; None takes all.

        Raises:
            InputError: The task is unknown.
            DetuneError: The extra `bench` is not installed.
        """
        if task not in self.tasks:
            raise InputError(f"{self.name} has no task {task!r}", f"expected one of {', '.join(self.tasks)}")
        from detune._runtime import global_seed, needs_extra, quiet, use_threads

        with needs_extra("bench"):
            from peft import LoraConfig, get_peft_model
            from safetensors.torch import save_file
            from torch import nn
            from transformers import ViTForImageClassification, ViTImageProcessorPil

            from detune.checkpoints import load_pretrained

        question = digits.TASKS[task]
        with quiet(), use_threads(self.threads):
            vit = load_pretrained(ViTForImageClassification, base)
            processor = load_pretrained(ViTImageProcessorPil, base)
            present = {name.rpartition(".")[2] for name, _ in vit.named_modules()}
            targets = [name for name in _TARGETS if name in present]
            config = LoraConfig(
                r=rank,
                lora_alpha=self.alpha * rank // self.rank,
                target_modules=targets,
                lora_dropout=0.1,
            )
            with global_seed(seed):
                # The LoRA first: how much the head draws depends on the task, and A must not.
                model = get_peft_model(vit, config)
                vit.classifier = nn.Linear(self.hidden, question.classes)
                vit.config.num_labels = vit.num_labels = question.classes
                losses = _train(
                    model,
                    _Seen(digits.some(question(digits.load().train), images, seed), processor),
                    steps=self.steps,
                    batch=self.batch,
                    lr=self.lr,
                    warmup_steps=0,
                    seed=seed,
                )
            # PEFT would write where the base lies on this machine, and the modules in no fixed order.
            config.base_model_name_or_path = self.name
            config.target_modules = targets
            model.save_pretrained(str(out))
            (out / "README.md").unlink()  # a card without content, with the base's place on this machine
            save_file(vit.classifier.state_dict(), out / "head.safetensors")
        write_losses(out, losses)

    def write_inputs(self, out: Path) -> None:
        """Write held-out digits as images; see `Recipe.write_inputs`.

        Args:
            out: An existing directory, for `0000.png` to `0063.png`.

        Raises:
            DetuneError: The extra `bench` is not installed.
        """
        for i, image in enumerate(digits.draw(digits.load().held_out.pixels[:_INPUTS], self.image_pixels)):
            image.save(out / f"{i:04}.png")


@dataclass(frozen=True)
class _Seen:
    """The training set, an example at a time: most images are never drawn in a short training."""

    examples: digits.Examples
    processor: Any

    def __len__(self) -> int:
        return len(self.examples.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        (image,) = digits.draw(self.examples.pixels[index : index + 1], self.processor.size["height"])
        pixels = self.processor(image, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": int(self.examples.labels[index])}


def _train(
    model: "nn.Module",
    examples: _Seen,
    *,
    steps: int,
    batch: int,
    lr: float,
    warmup_steps: int,
    seed: int,
) -> list[float]:
    """Train what requires a gradient with transformers' Trainer; return the loss of each step."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    from detune.checkpoints import temporary_directory

    with temporary_directory("training") as scratch:
        arguments = TrainingArguments(
            output_dir=str(scratch),
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=lr,
            warmup_steps=warmup_steps,
            seed=seed,
            data_seed=seed,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            label_names=["labels"],
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=examples)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]
