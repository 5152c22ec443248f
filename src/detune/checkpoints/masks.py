"""Which entries are certain: one file of boolean arrays, written tensor by tensor."""

import zipfile
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch

from detune.checkpoints.atomic import new_file

__all__ = ["MaskWriter"]


class MaskWriter:
    """Writes boolean tensors into a file that `numpy.load` reads by their names. A context manager.

    The file appears when the block ends normally.

    Args:
        path: The file to make.

    Raises:
        OutputError: It exists, or the disk refuses.

    Example:
        >>> with MaskWriter("certain.npz") as masks:  # doctest: +SKIP
        ...     masks.write("layer.0.weight", certain)
    """

    def __init__(self, path: str | Path) -> None:
        self._path = path
        self._opened = ExitStack()

    def __enter__(self) -> Self:
        partial = self._opened.enter_context(new_file(self._path))
        archive = zipfile.ZipFile(partial, "w", compression=zipfile.ZIP_DEFLATED, allowZip64=True)
        self._archive = self._opened.enter_context(archive)
        return self

    def write(self, name: str, mask: torch.Tensor) -> None:
        """Add a tensor's mask, of the tensor's shape, bool."""
        with self._archive.open(f"{name}.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array(file, mask.cpu().numpy(), allow_pickle=False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.__exit__(kind, error, trace)
