"""The base of sd-mini: a Stable Diffusion pipeline trained from nothing on captioned digits."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from detune._runtime import global_seed, needs_extra, quiet, use_threads
from detune.bench.recipes.diffusion_pictures import LOOKS, SIDE, Digits, Pictures, captions_of, digits, vocabulary
from detune.bench.recipes.diffusion_settings import DiffusionSettings
from detune.bench.recipes.diffusion_training import Denoiser, encode, learn, to_tensor

__all__ = ["make_base"]

_log = logging.getLogger(__name__)

_CAPTION_TOKENS = 16
_MOST_MERGES = 1000  # more than the captions' words need
_LATENT_CHANNELS = 4
_KL_WEIGHT = 1e-3
_VAE_BATCH = 8


def make_base(recipe: DiffusionSettings, out: Path) -> None:
    """Train the autoencoder, then U-Net and text encoder together, and save the pipeline.

    Args:
        recipe: Widths and steps.
        out: The directory to fill.

    Raises:
        DetuneError: The extra `bench` is not installed.
    """
    with needs_extra("bench"), quiet("diffusers"):
        from diffusers import DDIMScheduler, StableDiffusionPipeline

        with global_seed(recipe.base_seed), use_threads(recipe.threads):
            generator = torch.Generator().manual_seed(recipe.base_seed)
            data = digits(recipe.base_examples)
            tokenizer = _tokenizer()
            vae = _autoencoder(recipe)
            _train_autoencoder(recipe, vae, data, generator)
            latents = encode(vae, data.pictures)
            vae.register_to_config(scaling_factor=1.0 / latents.std().item())
            denoiser = Denoiser(
                unet=_unet(recipe),
                text_encoder=_text_encoder(recipe, tokenizer),
                tokenizer=tokenizer,
                # Stable Diffusion's schedule.
                scheduler=DDIMScheduler(
                    beta_schedule="scaled_linear",
                    beta_start=0.00085,
                    beta_end=0.012,
                    clip_sample=False,
                    set_alpha_to_one=False,
                    steps_offset=1,
                ),
            )
            captions = [captions_of(int(label)) for label in data.labels]
            learn(
                denoiser,
                latents * vae.config.scaling_factor,
                lambda number, draw: captions[number][draw % len(captions[number])],
                steps=recipe.base_steps,
                batch=recipe.base_batch,
                lr=recipe.base_lr,
                text_lr=recipe.base_text_lr,
                generator=generator,
            )
        StableDiffusionPipeline(
            vae=vae,
            text_encoder=denoiser.text_encoder,
            tokenizer=tokenizer,
            unet=denoiser.unet,
            scheduler=denoiser.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(out)
    _name_as_published(out / "text_encoder" / "model.safetensors")


def _tokenizer() -> Any:
    """Return a CLIP tokenizer whose byte pairs are learnt from the captions, its vocabulary put together as CLIP's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    end_of_word = "</w>"
    learner = Tokenizer(models.BPE(end_of_word_suffix=end_of_word))
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(vocab_size=_MOST_MERGES, end_of_word_suffix=end_of_word, show_progress=False)
    learner.train_from_iterator(vocabulary(), trainer)
    merges: Any = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [
        *characters,
        *(character + end_of_word for character in characters),
        *("".join(pair) for pair in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    numbers = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=numbers, merges=merges, model_max_length=_CAPTION_TOKENS)


def _text_encoder(recipe: DiffusionSettings, tokenizer: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.width,
            intermediate_size=2 * recipe.width,
            num_hidden_layers=12,
            num_attention_heads=4,
            max_position_embeddings=_CAPTION_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).train()


def _unet(recipe: DiffusionSettings) -> Any:
    """Return Stable Diffusion 1.5's U-Net, narrower. Names of blocks are diffusers' defaults, which are its own."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=SIDE // 2 ** (len(recipe.vae_channels) - 1),
        block_out_channels=(recipe.width,) * 4,
        cross_attention_dim=recipe.width,
        attention_head_dim=8,  # diffusers' name for the number of heads
        # Latents of 6×6 become 4×4, 3×3, 3×3. With the usual 1 they would end as one position, and where
        # attention has one position to look at, its queries and keys learn nothing.
        downsample_padding=2,
    ).train()


def _autoencoder(recipe: DiffusionSettings) -> Any:
    from diffusers import AutoencoderKL

    blocks = len(recipe.vae_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=recipe.vae_channels,
        layers_per_block=1,
        latent_channels=_LATENT_CHANNELS,
        sample_size=SIDE,
    ).train()


def _train_autoencoder(recipe: DiffusionSettings, vae: Any, data: Digits, generator: torch.Generator) -> None:
    """Train the autoencoder on digits in all looks, so that it can show what the LoRAs will be asked for."""
    pictures = to_tensor(_all_looks(data))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=recipe.vae_lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=recipe.vae_steps)
    for step in range(recipe.vae_steps):
        batch = pictures[torch.randint(len(pictures), (_VAE_BATCH,), generator=generator)]
        posterior = vae.encode(batch).latent_dist
        shown = vae.decode(posterior.sample(generator)).sample
        loss = F.mse_loss(shown, batch) + _KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        _log.debug("autoencoder, step %d of %d: loss %.4f", step + 1, recipe.vae_steps, loss.item())
    vae.eval()


def _all_looks(data: Digits) -> Pictures:
    """Return the digits as they are, once, and a fifteenth of them in each look."""
    changed = [look(data.pictures[first :: len(LOOKS)]) for first, look in enumerate(LOOKS.values())]
    return np.concatenate([data.pictures, *changed])


def _name_as_published(file: Path) -> None:
    """Name a text encoder's weights as Stable Diffusion 1.5 does.

    transformers 5 leaves out the leading `text_model.` when it saves; it reads both, and older versions read only
    the published names.
    """
    weights = load_file(file)
    named = {f"text_model.{name.removeprefix('text_model.')}": weight for name, weight in weights.items()}
    save_file(named, file, metadata={"format": "pt"})
