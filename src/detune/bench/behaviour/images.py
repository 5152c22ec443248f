"""Stable Diffusion, by the images it draws."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from detune.bench.behaviour.base import Differences
from detune.bench.behaviour.loading import load
from detune.errors import DetuneError, InputError
from detune.training import needs_extra, quiet, seeded

__all__ = ["DrawnImages"]

Images = NDArray[np.uint8]


@dataclass(frozen=True)
class DrawnImages:
    """What a Stable Diffusion pipeline draws for each prompt, in float32, from the same latents.

    Attributes:
        prompts: What to draw.
        steps: Steps of denoising; the paper's are 50.
        seed: Of the latents, and of the noise of schedulers that add some. Each prompt starts from it.
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
            with seeded(self.seed):  # whatever a library draws, torch's generator is put back
                parts = {name: load(part, model_dir / name, torch.float32) for name, part in classes.items()}
                try:
                    pipeline: Any = StableDiffusionPipeline.from_pretrained(
                        model_dir, **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
                    )
                except (OSError, ValueError) as error:
                    raise InputError(
                        f"the pipeline in {model_dir} cannot be loaded", f"got: {error}", "check its files"
                    ) from error
                pipeline.set_progress_bar_config(disable=True)
                return np.stack([self._draw(pipeline, prompt) for prompt in self.prompts])

    def compare(self, original: Images, recovered: Images) -> Differences:
        """Return `levels`, the largest difference in 8-bit levels, and `lpips` where it can be had.

        Args:
            original: Images of the original model.
            recovered: Images of the recovered one.

        Returns:
            Without the extra `lpips` or the weights it needs, `notes["lpips"]` says what is missing.
        """
        from detune.metrics.images import largest_level_difference, lpips_distance

        values: dict[str, float] = {"levels": largest_level_difference(original, recovered)}
        try:
            values["lpips"] = lpips_distance(original, recovered)
        except InputError:
            raise
        except DetuneError as error:
            return Differences(values, {"lpips": str(error)})
        return Differences(values)

    def _draw(self, pipeline: Any, prompt: str) -> Images:
        generator = torch.Generator().manual_seed(self.seed)
        drawn = pipeline(prompt, num_inference_steps=self.steps, generator=generator, output_type="np")
        levels: Images = (drawn.images[0] * 255).round().astype(np.uint8)
        return levels
