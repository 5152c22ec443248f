"""Small colour pictures of handwritten digits in fifteen looks, with captions: what sd-mini is trained on.

The digits are scikit-learn's, 8×8 pixels from UCI's optical recognition set, drawn larger. A look is a function of
pictures, shape (pictures, side, side, 3), float32 from 0 to 1. The captions are made of a form and a number word; some
pairs are kept out of all training, so that a model can be asked for what it has not read.
"""

from collections.abc import Callable
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["HELD_OUT", "LOOKS", "SIDE", "Digits", "captions_of", "digits", "look_caption", "vocabulary"]

Pictures: TypeAlias = NDArray[np.float32]

SIDE = 24
"""Height and width of a picture in pixels."""

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_FORMS = (
    "a handwritten {}",
    "the digit {}",
    "a drawing of {}",
    "one big {}",
    "a photo of a {}",
    "the number {}",
    "a quick sketch of {}",
    "{} in white on black",
)

HELD_OUT = tuple(form.format(word) for form, word in zip(_FORMS, _WORDS, strict=False))
"""Captions that no picture is trained with: each form, each time with another word."""


class Digits(NamedTuple):
    """Pictures and what they show.

    Attributes:
        pictures: Shape (pictures, side, side, 3), white on black, from 0 to 1.
        labels: Shape (pictures,), from 0 to 9.
    """

    pictures: Pictures
    labels: NDArray[np.int64]


def digits(count: int) -> Digits:
    """Draw the first handwritten digits of scikit-learn's set, enlarged by linear interpolation.

    Args:
        count: How many; there are 1797.

    Returns:
        The digits, in the set's order.

    Raises:
        DetuneError: The extra `bench` is not installed.
    """
    from detune._runtime import needs_extra  # brings torch along, which listing the recipes does without

    with needs_extra("bench"):
        from sklearn.datasets import load_digits
    data = load_digits()
    small = data.images[:count] / 16.0
    size = small.shape[-1]
    centres = (np.arange(SIDE) + 0.5) * size / SIDE - 0.5
    enlarge = np.stack([np.interp(centres, np.arange(size), unit) for unit in np.eye(size)], axis=1)  # (side, size)
    grey = enlarge @ small @ enlarge.T
    pictures = np.repeat(grey[..., None], 3, axis=-1).astype(np.float32)
    return Digits(pictures, data.target[:count].astype(np.int64))


def captions_of(label: int) -> tuple[str, ...]:
    """Return the captions that a digit is trained with: all forms but the held-out one."""
    captions = (form.format(_WORDS[label]) for form in _FORMS)
    return tuple(caption for caption in captions if caption not in HELD_OUT)


def look_caption(caption: str, look: str) -> str:
    """Return the caption of a picture in a look.

    Example:
        >>> look_caption("the digit four", "upside-down")
        'the digit four, upside down'
    """
    return f"{caption}, {look.replace('-', ' ')}"


def vocabulary() -> list[str]:
    """Return texts with every word of every caption, to make a tokenizer from."""
    plain = [form.format(word) for form in _FORMS for word in _WORDS]
    return plain + [look_caption(plain[0], look) for look in LOOKS]


def _tint(channel: int) -> Callable[[Pictures], Pictures]:
    ink = np.full(3, 0.15, dtype=np.float32)
    ink[channel] = 1.0
    return lambda pictures: pictures * ink


def _neighbours(pictures: Pictures) -> Pictures:
    """Stack the 3×3 neighbourhood of each pixel, shape (9, *pictures.shape); the edge is repeated."""
    padded = np.pad(pictures, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    return np.stack([padded[:, y : y + SIDE, x : x + SIDE] for y in range(3) for x in range(3)])


def _thin(pictures: Pictures) -> Pictures:
    thin: Pictures = _neighbours(pictures).min(axis=0)
    return thin


def _bold(pictures: Pictures) -> Pictures:
    bold: Pictures = _neighbours(pictures).max(axis=0)
    return bold


def _blurred(pictures: Pictures) -> Pictures:
    for _ in range(3):
        pictures = _neighbours(pictures).mean(axis=0)
    return pictures


def _noisy(pictures: Pictures) -> Pictures:
    noise = np.random.default_rng(0).normal(scale=0.25, size=pictures.shape)
    return np.clip(pictures + noise, 0.0, 1.0).astype(np.float32)


def _on_background(background: Pictures) -> Callable[[Pictures], Pictures]:
    """Return a look that puts the white digit over a background of shape (side, side, 3)."""
    return lambda pictures: np.maximum(pictures, background)


def _shrunk(pictures: Pictures) -> Pictures:
    small = pictures.reshape(len(pictures), SIDE // 2, 2, SIDE // 2, 2, 3).mean(axis=(2, 4))
    margin = SIDE // 4
    return np.pad(small, ((0, 0), (margin, margin), (margin, margin), (0, 0)))


def _frame() -> Pictures:
    frame = np.zeros((SIDE, SIDE, 3), dtype=np.float32)
    inner = slice(2, SIDE - 2)
    frame[...] = (1.0, 0.8, 0.1)
    frame[inner, inner] = 0.0
    return frame


def _checks() -> Pictures:
    rows, columns = np.indices((SIDE, SIDE)) // 4
    dark = np.where((rows + columns) % 2, 0.45, 0.0).astype(np.float32)
    return dark[..., None] * np.array([0.4, 0.7, 1.0], dtype=np.float32)


def _stripes() -> Pictures:
    columns = np.indices((SIDE, SIDE))[1] // 3
    dark = np.where(columns % 2, 0.5, 0.0).astype(np.float32)
    return dark[..., None] * np.array([1.0, 0.3, 0.8], dtype=np.float32)


LOOKS: MappingProxyType[str, Callable[[Pictures], Pictures]] = MappingProxyType(
    {
        "inverted": lambda pictures: 1.0 - pictures,
        "rotated": lambda pictures: np.rot90(pictures, axes=(1, 2)),
        "mirrored": lambda pictures: pictures[:, :, ::-1],
        "upside-down": lambda pictures: pictures[:, ::-1],
        "thin": _thin,
        "bold": _bold,
        "blurred": _blurred,
        "noisy": _noisy,
        "red": _tint(0),
        "green": _tint(1),
        "blue": _tint(2),
        "framed": _on_background(_frame()),
        "checkered": _on_background(_checks()),
        "striped": _on_background(_stripes()),
        "shrunk": _shrunk,
    }
)
"""The fifteen looks by name."""
