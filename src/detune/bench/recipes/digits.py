"""scikit-learn's handwritten digits, and fifteen questions one can ask about them.

The package carries 1797 grey images of 8 by 8 pixels: data for a vision model without a network. A task changes what
is asked, what is seen, or both.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["TASKS", "DigitTask", "Examples", "Split", "draw", "load", "some"]

_EVERY = 7  # one image in seven is held out; the digits come in runs of ten, which seven does not divide
_SEED = 0  # of noise and of drawn answers: they belong to the data, whatever the seed of the training

_Image = NDArray[np.float64]


@dataclass(frozen=True)
class Examples:
    """Images and the answer to each.

    Attributes:
        pixels: Shape (count, 8, 8), float64, 0 for paper to 1 for ink.
        labels: Shape (count,), int64.
    """

    pixels: NDArray[np.float64]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """Digits for training, and digits held out."""

    train: Examples
    held_out: Examples


@dataclass(frozen=True)
class DigitTask:
    """A question about images.

    Attributes:
        classes: How many answers there are.
        change: Turns digits into the task's examples; draws from the generator where it draws at all.
    """

    classes: int
    change: Callable[[Examples, np.random.Generator], Examples]

    def __call__(self, digits: Examples) -> Examples:
        """Return the task's images and answers, the same ones at each call.

        Args:
            digits: Images labelled with their digits.

        Returns:
            As many examples, labelled from 0 to `classes - 1`.
        """
        return self.change(digits, np.random.default_rng(_SEED))


def _ask(*answers: int) -> DigitTask:
    """Ask something else about the same images: one answer for each of the ten digits."""

    def change(digits: Examples, generator: np.random.Generator) -> Examples:
        return replace(digits, labels=np.array(answers)[digits.labels])

    return DigitTask(max(answers) + 1, change)


def _show(see: Callable[[_Image, np.random.Generator], _Image]) -> DigitTask:
    """Ask which digit it is, of changed images."""

    def change(digits: Examples, generator: np.random.Generator) -> Examples:
        return replace(digits, pixels=see(digits.pixels, generator))

    return DigitTask(10, change)


def _spot(count: int, do: Callable[[_Image, int], _Image]) -> DigitTask:
    """Do one of `count` things to each image and ask which."""

    def change(digits: Examples, generator: np.random.Generator) -> Examples:
        answers = generator.integers(count, size=len(digits.labels))
        pixels = np.stack([do(image, int(answer)) for image, answer in zip(digits.pixels, answers, strict=True)])
        return Examples(pixels, answers)

    return DigitTask(count, change)


TASKS: Mapping[str, DigitTask] = MappingProxyType(
    {
        "parity": _ask(0, 1, 0, 1, 0, 1, 0, 1, 0, 1),
        "greater-than-four": _ask(0, 0, 0, 0, 0, 1, 1, 1, 1, 1),
        "prime": _ask(0, 0, 1, 1, 0, 1, 0, 1, 0, 0),
        "loops": _ask(1, 0, 0, 0, 1, 0, 1, 0, 2, 1),
        "modulo-three": _ask(0, 1, 2, 0, 1, 2, 0, 1, 2, 0),
        "modulo-four": _ask(0, 1, 2, 3, 0, 1, 2, 3, 0, 1),
        "is-seven": _ask(0, 0, 0, 0, 0, 0, 0, 1, 0, 0),
        "renamed": _ask(3, 8, 5, 0, 9, 1, 7, 2, 4, 6),
        "inverted": _show(lambda pixels, _: 1 - pixels),
        "noisy": _show(lambda pixels, generator: (pixels + generator.normal(0, 0.3, pixels.shape)).clip(0, 1)),
        "upper-half": _show(lambda pixels, _: pixels * (np.arange(8) < 4)[:, None]),
        "left-half": _show(lambda pixels, _: pixels * (np.arange(8) < 4)),
        "rotation": _spot(4, lambda image, turns: np.rot90(image, turns)),
        "brightness": _spot(3, lambda image, level: image * (1 + level) / 3),
        "mirrored": _spot(2, lambda image, flip: image[:, ::-1] if flip else image),
    }
)
"""Fifteen tasks by name. Those that `_ask` list an answer for each of the digits 0 to 9."""


def load() -> Split:
    """Load the digits, split once and for all.

    Returns:
        1540 images to train on and 257 held out, all different, labelled with their digits.

    Raises:
        DetuneError: The extra `bench` is not installed.
    """
    from detune._runtime import needs_extra

    with needs_extra("bench"):
        from sklearn.datasets import load_digits

    data = load_digits()
    pixels, labels = data.images / 16, data.target.astype(np.int64)
    held_out = np.arange(len(labels)) % _EVERY == 0
    return Split(Examples(pixels[~held_out], labels[~held_out]), Examples(pixels[held_out], labels[held_out]))


def some(examples: Examples, count: int | None, seed: int) -> Examples:
    """Draw some of the examples.

    Args:
        examples: All of them.
        count: How many; None, or more than there are, is all as they come.
        seed: Seed of the draw.
    """
    if count is None or count >= len(examples.labels):
        return examples
    chosen = np.random.default_rng(seed).permutation(len(examples.labels))[:count]
    return Examples(examples.pixels[chosen], examples.labels[chosen])


def draw(pixels: NDArray[np.float64], size_pixels: int) -> list["Image"]:
    """Make pictures: enlarged, white ink on black, three equal channels of 8 bits.

    Args:
        pixels: Shape (count, 8, 8), from 0 to 1.
        size_pixels: Width and height of each picture.

    Returns:
        As many RGB pictures.

    Raises:
        DetuneError: The extra `bench` is not installed.
    """
    from detune._runtime import needs_extra

    with needs_extra("bench"):
        from PIL import Image

    grey = (255 * pixels).round().astype(np.uint8)
    size = (size_pixels, size_pixels)
    return [Image.fromarray(image).resize(size, Image.Resampling.BILINEAR).convert("RGB") for image in grey]
