"""The LoRAs of sd-mini: PEFT's layers in U-Net and text encoder, trained together, saved as diffusers saves them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detune._runtime import global_seed, needs_extra, quiet, use_threads
from detune.bench.recipes.base import write_losses
from detune.bench.recipes.diffusion_pictures import LOOKS, Digits, captions_of, digits, look_caption
from detune.bench.recipes.diffusion_settings import DiffusionSettings
from detune.bench.recipes.diffusion_training import Denoiser, encode, learn
from detune.checkpoints import load_pretrained

__all__ = ["TEXT_ENCODER_MODULES", "UNET_MODULES", "train_lora"]

UNET_MODULES = ("proj_in", "proj_out", "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
"""Ends of the names of the U-Net's LoRA modules: attn1 and attn2 have four each, so twelve a transformer."""

TEXT_ENCODER_MODULES = ("q_proj", "k_proj", "v_proj", "out_proj", "mlp.fc1", "mlp.fc2")
"""Ends of the names of the text encoder's LoRA modules, six a layer."""


def train_lora(recipe: DiffusionSettings, base: Path, look: str, out: Path, *, rank: int, seed: int) -> None:
    """Train one LoRA on digits in a look, captioned with its name, and save it.

    With the same seed, versions and machine, the adapter is the same to the bit. The initial A depends on the seed
    and the rank alone, not on the look.

    Args:
        recipe: Steps, batch and rate; `alpha / rank` of the adapter is the recipe's.
        base: The pipeline's directory.
        look: One of `LOOKS`.
        out: Gets `pytorch_lora_weights.safetensors`, and the loss of each step in `losses.json`.
        rank: LoRA rank r.
        seed: For the initial A, pictures, captions, times and noise.

    Raises:
        DetuneError: The extra `bench` is not installed.

    Reference:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.
    """
    with needs_extra("bench"), quiet("diffusers"), use_threads(recipe.threads):
        pipeline = _Frozen.load(base)
        data = digits(recipe.adapter_examples)
        latents = encode(pipeline.vae, LOOKS[look](data.pictures)) * pipeline.vae.config.scaling_factor
        denoiser = pipeline.denoiser
        with global_seed(seed):
            _add_lora(denoiser, rank, alpha=rank * recipe.alpha / recipe.rank)
        captions = _captions(data, look)
        losses = learn(
            denoiser,
            latents,
            lambda number, draw: captions[number][draw % len(captions[number])],
            steps=recipe.adapter_steps,
            batch=recipe.adapter_batch,
            lr=recipe.adapter_lr,
            text_lr=recipe.adapter_text_lr,
            generator=torch.Generator().manual_seed(seed),
        )
        _save(denoiser, out)
    write_losses(out, losses)


@dataclass(frozen=True)
class _Frozen:
    """The pipeline's parts, none of which require a gradient."""

    vae: Any
    denoiser: Denoiser

    @classmethod
    def load(cls, base: Path) -> "_Frozen":
        from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        vae = load_pretrained(AutoencoderKL, base, subfolder="vae")
        unet = load_pretrained(UNet2DConditionModel, base, subfolder="unet")
        text_encoder = load_pretrained(CLIPTextModel, base, subfolder="text_encoder", dtype=torch.float32)
        for module in (vae, unet, text_encoder):
            module.requires_grad_(False)
        return cls(
            vae.eval(),
            Denoiser(
                unet=unet.train(),
                text_encoder=text_encoder.train(),
                tokenizer=load_pretrained(CLIPTokenizer, base, subfolder="tokenizer"),
                scheduler=load_pretrained(DDIMScheduler, base, subfolder="scheduler"),
            ),
        )


def _captions(data: Digits, look: str) -> list[list[str]]:
    return [[look_caption(caption, look) for caption in captions_of(int(label))] for label in data.labels]


def _add_lora(denoiser: Denoiser, rank: int, alpha: Any) -> None:
    """Add trainable LoRA layers in place; their A is drawn from torch's global generator.

    `inject_adapter_in_model` is what `add_adapter` of diffusers and transformers calls, without their checks, of
    which transformers' asks for the newest PEFT.

    Args:
        denoiser: Its U-Net and text encoder get the layers.
        rank: LoRA rank r.
        alpha: A number; PEFT declares it whole, but takes any.
    """
    from peft import LoraConfig, inject_adapter_in_model

    for module, targets in ((denoiser.unet, UNET_MODULES), (denoiser.text_encoder, TEXT_ENCODER_MODULES)):
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets)), module)


def _save(denoiser: Denoiser, out: Path) -> None:
    """Save the LoRA layers and their configuration the way diffusers' training scripts do, under PEFT's names.

    Those scripts for Stable Diffusion rename what attention has to `lora.down` and `lora.up` and leave the other
    layers' `lora_A` and `lora_B`. diffusers, which looks at the first name alone, then drops the attention layers
    without a word. PEFT's names throughout, as newer scripts have them, are read in full.
    """
    from diffusers import StableDiffusionPipeline
    from peft import get_peft_model_state_dict

    layers: dict[str, Tensor] = get_peft_model_state_dict(denoiser.text_encoder)
    # transformers 5 dropped the leading `text_model.` of the published names; every version of diffusers reads them.
    named = {f"text_model.{name.removeprefix('text_model.')}": weight for name, weight in layers.items()}
    StableDiffusionPipeline.save_lora_weights(
        out,
        unet_lora_layers=get_peft_model_state_dict(denoiser.unet),
        text_encoder_lora_layers=named,
        unet_lora_adapter_metadata=_configuration(denoiser.unet),
        text_encoder_lora_adapter_metadata=_configuration(denoiser.text_encoder),
    )


def _configuration(module: Any) -> dict[str, Any]:
    """Return PEFT's configuration of a module's adapter, sets as sorted lists: their order changes with every run."""
    configuration: dict[str, Any] = module.peft_config["default"].to_dict()
    return {name: sorted(value) if isinstance(value, set) else value for name, value in configuration.items()}
