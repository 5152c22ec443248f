"""Masks of the certain entries: boolean arrays, packed into bits while a run lasts, and one file of all of them."""

import math
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

__all__ = ["pack_mask", "write_masks"]


def pack_mask(mask: torch.Tensor) -> bytes:
    """Pack one tensor's mask, eight entries a byte.

    Args:
        mask: Any shape, bool.
    """
    return np.packbits(mask.cpu().numpy()).tobytes()


def write_masks(path: Path, masks: Iterable[tuple[str, tuple[int, ...], bytes]]) -> None:
    """Write one file of masks that `numpy.load` reads by the tensors' names.

    Args:
        path: The file to make, a `.npz` by content.
        masks: The name of each tensor, its shape and what `pack_mask` made of its mask; one is in memory at a time.

    Example:
        >>> write_masks(partial, [("layer.0.weight", (768, 768), packed)])  # doctest: +SKIP
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, allowZip64=True) as archive:
        for name, shape, packed in masks:
            bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=math.prod(shape))
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, bits.view(np.bool_).reshape(shape), allow_pickle=False)
