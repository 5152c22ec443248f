"""Distances of two sets of generated images: in 8-bit levels, and as people see it (LPIPS)."""

import warnings
from collections.abc import Callable
from http.client import HTTPException
from pickle import UnpicklingError
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from detune._runtime import needs_extra
from detune.errors import DetuneError, InputError, reason_of

__all__ = ["largest_level_difference", "lpips_distance"]

Images: TypeAlias = NDArray[np.uint8]
Network: TypeAlias = Callable[[Tensor, Tensor], Tensor]

_SIDE_PIXELS = 224  # what VGG was trained on, and what the paper resizes to
_VGG_WEIGHTS = "vgg16-397923af.pth"


def largest_level_difference(original: Images, recovered: Images) -> int:
    """Largest difference between two sets of images, over all pixels and channels.

    Args:
        original: Images of the original model, shape (n, height, width, 3), uint8.
        recovered: Images of the recovered model, the same shape, uint8.

    Returns:
        Levels from 0 to 255. At most 1 means that the images are equal to within 8-bit rounding.

    Raises:
        InputError: The two are not sets of 8-bit images of one shape.

    Example:
        >>> black = np.zeros((1, 2, 2, 3), dtype=np.uint8)
        >>> largest_level_difference(black, black + np.uint8(3))
        3
    """
    _check(original, recovered)
    return int(np.abs(original.astype(np.int16) - recovered.astype(np.int16)).max())


def lpips_distance(original: Images, recovered: Images, *, network: Network | None = None) -> float:
    """Mean LPIPS, the distance of two images as a deep network sees them; 0 where they are equal.

    Images are resized to 224×224 pixels by antialiased bilinear interpolation, as Pillow and torchvision's `Resize` do,
    and scaled to [-1, 1]. Pairs are compared one at a time, in float32.

    Args:
        original: Images of the original model, shape (n, height, width, 3), uint8.
        recovered: Images of the recovered model, the same shape, uint8.
        network: Maps two float32 batches of shape (1, 3, 224, 224) to the distance, one number. None takes the paper's,
            `lpips.LPIPS(net="vgg")`; torchvision loads the weights of its VGG-16 on first use.

    Raises:
        InputError: The two are not sets of 8-bit images of one shape.
        DetuneError: No network was given, and lpips, torchvision or the weights of VGG-16 are missing.

    Reference:
        Zhang, Isola, Efros, Shechtman, Wang, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric",
        CVPR 2018; with VGG as in Horwitz, Kahana & Hoshen 2024 (arXiv 2402.10208).
    """
    _check(original, recovered)
    measure = _vgg() if network is None else network
    with torch.no_grad():
        distances = [float(measure(_prepare(a), _prepare(b))) for a, b in zip(original, recovered, strict=True)]
    return float(np.mean(distances))


def _check(original: Images, recovered: Images) -> None:
    for images in (original, recovered):
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or images.size == 0:
            raise InputError(
                "images cannot be compared",
                f"got {images.dtype} of shape {images.shape}, expected uint8 of shape (n, height, width, 3)",
                "stack RGB images of one size",
            )
    if original.shape != recovered.shape:
        raise InputError(
            "images of two models cannot be compared",
            f"got shapes {original.shape} and {recovered.shape}, expected one",
            "generate both sets with the same prompts and size",
        )


def _prepare(image: Images) -> Tensor:
    """Return one image, shape (height, width, 3), as a batch of shape (1, 3, 224, 224) from -1 to 1."""
    levels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).unsqueeze(0).float()
    resized = F.interpolate(levels, size=(_SIDE_PIXELS, _SIDE_PIXELS), mode="bilinear", antialias=True)
    return resized.round() / 127.5 - 1.0  # rounded, because Pillow's images have 8 bits


def _vgg() -> Network:
    """Load LPIPS with VGG-16, or say what is missing."""
    with needs_extra("lpips"):
        try:
            import lpips
        except ModuleNotFoundError:
            raise
        except (ImportError, OSError, RuntimeError) as error:  # a torchvision that was built for another torch
            raise DetuneError(
                f"lpips cannot be imported: {reason_of(error)}",
                f"its torchvision does not fit torch {torch.__version__}",
                "install the torchvision that was released with this torch, from the same index",
            ) from error
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"torchvision\.")  # lpips calls it the way of older releases
            network: Network = lpips.LPIPS(net="vgg", verbose=False)
    except (OSError, HTTPException, RuntimeError, EOFError, UnpicklingError) as error:  # no network; a damaged file
        raise DetuneError(
            "LPIPS needs the weights of VGG-16, and torchvision could not load them",
            f"got: {reason_of(error)}",
            f"connect to the network once, or copy https://download.pytorch.org/models/{_VGG_WEIGHTS} to "
            f"{torch.hub.get_dir()}/checkpoints",
        ) from error
    return network
