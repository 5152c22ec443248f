"""Which entries are certain: boolean arrays, packed into bits while a run lasts, and one file of all of them."""

import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

__all__ = ["save_mask", "write_masks"]


def save_mask(path: Path, mask: torch.Tensor) -> None:
    """Write one tensor's mask, eight entries a byte, and wait until it is on the disk.

    Args:
        path: The file to make.
        mask: Of any shape, bool.
    """
    with path.open("wb") as file:
        np.save(file, np.packbits(mask.cpu().numpy()))
        file.flush()
        os.fsync(file.fileno())


def write_masks(path: Path, masks: Mapping[str, Path], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Write one file of masks that `numpy.load` reads by the tensors' names.

    Args:
        path: The file to make, a `.npz` by content.
        masks: What `save_mask` wrote, by tensor; one is in memory at a time.
        shapes: Of the tensors.

    Example:
        >>> write_masks(partial, {"layer.0.weight": part}, {"layer.0.weight": (768, 768)})  # doctest: +SKIP
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, allowZip64=True) as archive:
        for name, source in masks.items():
            bits = np.unpackbits(np.load(source), count=math.prod(shapes[name]))
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, bits.view(np.bool_).reshape(shapes[name]), allow_pickle=False)
