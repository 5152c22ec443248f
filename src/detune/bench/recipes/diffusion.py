"""A small Stable Diffusion that draws digits, and fifteen LoRAs, each of another look."""

import csv
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from detune.bench.recipes.diffusion_pictures import HELD_OUT, LOOKS
from detune.bench.recipes.diffusion_settings import DiffusionSettings
from detune.errors import InputError

__all__ = ["SdMini"]


@dataclass(frozen=True)
class SdMini(DiffusionSettings):
    """Stands for stable-diffusion-1.5: its blocks and its 264 LoRA modules under the same names, at a small width.

    The U-Net has Stable Diffusion 1.5's four blocks a side and two layers a block, the text encoder its twelve
    layers. As kohya's trainer does by default, a LoRA goes on all linear layers and 1×1 convolutions of the 16
    transformers of the U-Net (192 modules) and on all linear layers of the text encoder (72). As published, r is 32.
    Alpha equals r, so that a reader that knows nothing of alpha scales rightly.

    Reference:
        Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022.
        Horwitz, Kahana, Hoshen, "Recovering the Pre-Fine-Tuning Weights of Generative Models", ICML 2024.
    """

    name: ClassVar[str] = "sd-mini"
    stands_for: ClassVar[str | None] = "stable-diffusion-1.5"
    about: ClassVar[str] = "a small Stable Diffusion of handwritten digits; LoRAs of fifteen looks"
    layers: ClassVar[int] = 264

    @classmethod
    def quick(cls) -> Self:
        """A quick recipe: the 264 modules at an eighth of the rank, and a few steps. Its base draws nothing yet."""
        return cls(
            rank=4,
            alpha=4,
            width=32,
            vae_channels=(32, 32, 32),
            base_examples=64,
            vae_steps=2,
            base_steps=2,
            base_batch=4,
            adapter_examples=16,
            adapter_steps=4,
            adapter_batch=4,
            threads=1,  # matrices this small gain nothing from more
        )

    @property
    def tasks(self) -> tuple[str, ...]:
        """The fifteen looks, in order."""
        return tuple(LOOKS)

    def make_base(self, out: Path) -> None:
        """Train the pipeline on captioned digits and save it as `StableDiffusionPipeline` does, float32.

        Args:
            out: The directory to fill; it does not exist yet.

        Raises:
            DetuneError: The extra `bench` is not installed.
        """
        # torch and diffusers are loaded when a model is made, not when recipes are listed.
        from detune.bench.recipes.diffusion_base import make_base

        make_base(self, out)

    def train_adapter(self, base: Path, task: str, out: Path, *, rank: int, seed: int) -> None:
        """Train one LoRA and save it as `StableDiffusionPipeline.save_lora_weights` does.

        Args:
            base: What `make_base` made.
            task: One of `tasks`.
            out: The directory to fill; it does not exist yet. The loss of each step goes to `losses.json` there.
            rank: LoRA rank; alpha goes with it, so that `alpha / rank` stays the recipe's.
            seed: For the initial A, the order of the pictures and the noise on them.

        Raises:
            InputError: The task is unknown.
            DetuneError: The extra `bench` is not installed.
        """
        if task not in LOOKS:
            near = difflib.get_close_matches(task, LOOKS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "take one of these"
            raise InputError(f"{self.name} has no task {task!r}", f"expected one of {', '.join(LOOKS)}", hint)
        from detune.bench.recipes.diffusion_lora import train_lora

        train_lora(self, base, task, out, rank=rank, seed=seed)

    def write_inputs(self, out: Path) -> None:
        """Write prompts that no model was trained with to `prompts.csv`.

        Args:
            out: An existing directory.
        """
        with (out / "prompts.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("prompt",), *((caption,) for caption in HELD_OUT)])
