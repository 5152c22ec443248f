"""Training shared by the base and the LoRAs of sd-mini: latents, and the loop that learns to denoise."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from detune.bench.recipes.diffusion_pictures import Pictures

__all__ = ["Denoiser", "encode", "learn", "to_tensor"]

_log = logging.getLogger(__name__)

_NO_CAPTION = 0.1  # share of pictures without their caption, for classifier-free guidance
_GRADIENT_NORM = 1.0  # where gradients are clipped: the trainers' default


def to_tensor(pictures: Pictures) -> Tensor:
    """Return pictures as the autoencoder takes them: shape (pictures, 3, side, side), from -1 to 1."""
    return torch.from_numpy(2.0 * pictures - 1.0).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def encode(vae: Any, pictures: Pictures) -> Tensor:
    """Return the mean latents of pictures, without the scaling factor.

    Args:
        vae: An AutoencoderKL.
        pictures: Shape (pictures, side, side, 3), from 0 to 1.

    Returns:
        Shape (pictures, 4, side / 4, side / 4), float32.
    """
    return torch.cat([vae.encode(part).latent_dist.mode() for part in to_tensor(pictures).split(128)])


@dataclass(frozen=True)
class Denoiser:
    """The parts of a pipeline that the loss runs through.

    Attributes:
        unet: UNet2DConditionModel.
        text_encoder: CLIPTextModel.
        tokenizer: CLIPTokenizer.
        scheduler: Any scheduler with `add_noise`.
    """

    unet: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any

    def loss(self, latents: Tensor, captions: Sequence[str], generator: torch.Generator) -> Tensor:
        """Return the mean squared error of the predicted noise, at one random time for each picture.

        The times are stratified: picture b of B gets one from the b-th part of the schedule, which makes the loss
        less noisy.

        Args:
            latents: Shape (B, 4, h, w), scaled.
            captions: One for each picture.
            generator: For times and noise.

        Returns:
            A scalar.

        Reference:
            Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020.
            Kingma et al., "Variational Diffusion Models", NeurIPS 2021 (the times).
        """
        count = len(latents)
        shares = (torch.arange(count) + torch.rand(count, generator=generator)) / count
        times = (shares * self.scheduler.config.num_train_timesteps).long()
        noise = torch.randn(latents.shape, generator=generator)
        tokens = self.tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt").input_ids
        states = self.text_encoder(tokens)[0]
        noisy = self.scheduler.add_noise(latents, noise, times)
        loss: Tensor = F.mse_loss(self.unet(noisy, times, states).sample, noise)
        return loss


def learn(
    denoiser: Denoiser,
    latents: Tensor,
    captions: Callable[[int, int], str],
    *,
    steps: int,
    batch: int,
    lr: float,
    text_lr: float,
    generator: torch.Generator,
) -> list[float]:
    """Train whatever of the denoiser requires a gradient, in place.

    AdamW, gradients clipped to norm 1, a linear decay of the rates to zero. One picture in ten loses its caption.

    Args:
        denoiser: What to train.
        latents: Shape (pictures, 4, h, w), scaled.
        captions: From a picture's number and a random number, a caption of it.
        steps: Updates.
        batch: Pictures in each.
        lr: Learning rate of the U-Net at the first step.
        text_lr: Learning rate of the text encoder at the first step.
        generator: For pictures, captions, times and noise.

    Returns:
        The loss of each step.
    """
    unet = [weight for weight in denoiser.unet.parameters() if weight.requires_grad]
    text_encoder = [weight for weight in denoiser.text_encoder.parameters() if weight.requires_grad]
    groups = [{"params": unet, "lr": lr}, {"params": text_encoder, "lr": text_lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    losses = []
    for _ in range(steps):
        chosen = torch.randint(len(latents), (batch,), generator=generator)
        draws = torch.randint(1 << 30, (batch,), generator=generator).tolist()
        blank = torch.rand(batch, generator=generator) < _NO_CAPTION
        texts = [
            "" if empty else captions(number, draw)
            for number, draw, empty in zip(chosen.tolist(), draws, blank.tolist(), strict=True)
        ]
        loss = denoiser.loss(latents[chosen], texts, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*unet, *text_encoder], _GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        _log.debug("step %d of %d: loss %.3f", len(losses), steps, losses[-1])
    return losses
