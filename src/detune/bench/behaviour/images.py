"""Stable Diffusion, by the images it draws."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detune._runtime import global_seed, needs_extra, quiet
from detune.bench.behaviour.base import Differences, Metric
from detune.bench.behaviour.loading import load, loading
from detune.checkpoints import load_pretrained
from detune.errors import DetuneError, InputError

__all__ = ["DrawnImages"]

Images = NDArray[np.uint8]


@dataclass(frozen=True)
class DrawnImages:
    """Pictures that a Stable Diffusion pipeline draws for each prompt, in float32, from the same latents.

    As in the paper's script, the latents of all prompts are drawn at once from one seeded generator: each prompt has
    its own, the same for every model.

    Attributes:
        prompts: What to draw.
        steps: Steps of denoising; the paper's are 50.
        seed: Seed of the latents, and of the noise of schedulers that add some.
    """

    prompts: tuple[str, ...]
    steps: int = 50
    seed: int = 0

    def observe(self, model_dir: Path) -> Images:
        """Return one image for each prompt; see `Behaviour.observe`.

        Args:
            model_dir: The pipeline to run. Its safety checker is left out, which would black images out.

        Returns:
            Shape (prompts, height, width, 3), uint8.

        Raises:
            InputError: The pipeline cannot be read.
            DetuneError: The extra `bench` is not installed.
        """
        with needs_extra("bench"), quiet("diffusers"):
            from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
            from transformers import CLIPTextModel

            classes = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
            with global_seed(self.seed):  # whatever a library draws, torch's generator is put back
                parts = {name: load(part, model_dir / name, torch.float32) for name, part in classes.items()}
                with loading(f"the pipeline in {model_dir}"):
                    without = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
                    pipeline: Any = load_pretrained(StableDiffusionPipeline, model_dir, **parts, **without)
                pipeline.set_progress_bar_config(disable=True)
                return self._draw(pipeline)

    def compare(self, original: Images, recovered: Images) -> Differences:
        """Return `levels`, the largest difference in 8-bit levels, and `lpips` where it can be had.

        Args:
            original: Images of the original model.
            recovered: Images of the recovered one.

        Returns:
            Without the extra `lpips` or the weights it needs, `notes["lpips"]` says what is missing.
        """
        from detune.metrics.images import largest_level_difference, lpips_distance

        values: dict[Metric, float] = {"levels": largest_level_difference(original, recovered)}
        try:
            values["lpips"] = lpips_distance(original, recovered)
        except InputError:
            raise
        except DetuneError as error:
            return Differences(values, {"lpips": str(error)})
        return Differences(values)

    def _draw(self, pipeline: Any) -> Images:
        generator = torch.Generator().manual_seed(self.seed)
        shape = (len(self.prompts), pipeline.unet.config.in_channels, *_sides(pipeline.unet.config.sample_size))
        latents = torch.randn(shape, generator=generator)
        # One at a time, however many there are: a batch of all would need their memory at once.
        return np.stack(
            [self._draw_one(pipeline, prompt, latents[i : i + 1], generator) for i, prompt in enumerate(self.prompts)]
        )

    def _draw_one(self, pipeline: Any, prompt: str, latents: Tensor, generator: torch.Generator) -> Images:
        drawn = pipeline(prompt, num_inference_steps=self.steps, latents=latents, generator=generator, output_type="np")
        levels: Images = (drawn.images[0] * 255).round().astype(np.uint8)
        return levels


def _sides(sample_size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of latents: a U-Net's configuration has one number for both, or two."""
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    return height, width
