"""Sizes and training schedules of sd-mini."""

from dataclasses import dataclass

from detune.bench.recipes.base import THREADS

__all__ = ["DiffusionSettings"]


@dataclass(frozen=True)
class DiffusionSettings:
    """The hyperparameters of a small Stable Diffusion and of its LoRAs.

    Attributes:
        rank: LoRA rank r.
        alpha: LoRA alpha.
        width: Channels of every block of the U-Net, and width of the text encoder. Recovery from three models needs
            `2 r < width` and `3 r <= width`.
        vae_channels: Channels of the autoencoder's blocks; all but the first halve height and width.
        base_examples: Digits that the base is trained on.
        base_seed: Seed of the base's initial weights and of its training.
        vae_steps: Updates of the autoencoder.
        vae_lr: Its learning rate at the first step.
        base_steps: Updates of U-Net and text encoder together.
        base_batch: Pictures in each of these.
        base_lr: Learning rate of the U-Net at the first step.
        base_text_lr: Learning rate of the text encoder at the first step. At the U-Net's rate all captions soon mean
            the same to it, and the layers that read them get hardly any gradient.
        adapter_examples: Digits that each LoRA is trained on.
        adapter_steps: Updates of a LoRA.
        adapter_batch: Pictures in each of these.
        adapter_lr: Learning rate of the U-Net's LoRA at the first step.
        adapter_text_lr: Learning rate of the text encoder's LoRA at the first step.
        threads: CPU threads to train on.
    """

    rank: int = 32
    alpha: int = 32
    width: int = 128
    vae_channels: tuple[int, ...] = (32, 32, 64)
    base_examples: int = 1797
    base_seed: int = 0
    vae_steps: int = 300
    vae_lr: float = 2e-3
    base_steps: int = 240
    base_batch: int = 16
    base_lr: float = 1e-3
    base_text_lr: float = 1e-4
    adapter_examples: int = 512
    adapter_steps: int = 50
    adapter_batch: int = 8
    adapter_lr: float = 1e-3
    adapter_text_lr: float = 5e-4
    threads: int = THREADS
