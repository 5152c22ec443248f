"""A model with a LoRA merged on the fly, tensor by tensor.

For a linear layer the merged weight is

    W + scaling * B @ A,        scaling = alpha / r, or alpha / sqrt(r) with rsLoRA.

The order of casts is PEFT's own (`merge_and_unload` after `PeftModel.from_pretrained`, on the CPU), so that
the result has the same bits: A and B are held in float32 (float64 for a float64 base); the product is added
to a half precision W with one rounding at the end, except for embeddings, where PEFT rounds the product
first.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch

from detune.checkpoints.blocks import copy_block, file_hash
from detune.checkpoints.lora import FLOATS, Lora
from detune.checkpoints.source import Checkpoint

__all__ = ["MergedCheckpoint", "merge"]


class MergedCheckpoint(Checkpoint):
    """`BASE+ADAPTER` as if merged and saved; tensors the adapter leaves alone pass through unchanged.

    Args:
        spec: The model as the user typed it.
        base: The base model.
        lora: The adapter, opened against that base.
        merge_dtype: The dtype of the merged tensors; None is the base's, bit for bit as PEFT merges.

    Raises:
        ValueError: `merge_dtype` is not a floating point dtype that can be merged in.
    """

    def __init__(self, spec: str, base: Checkpoint, lora: Lora, *, merge_dtype: torch.dtype | None = None) -> None:
        if merge_dtype is not None and merge_dtype not in FLOATS:
            raise ValueError(f"merge_dtype is {merge_dtype}, expected one of {FLOATS}")
        self.spec = spec
        self.root = base.root
        self.index_files = base.index_files
        self._base = base
        self._lora = lora

        tensors = dict(base.tensors)
        for name in lora.names:
            info = tensors[name]
            dtype = merge_dtype or info.dtype
            tensors[name] = replace(info, dtype=dtype, nbytes=math.prod(info.shape) * dtype.itemsize)
        self.tensors = MappingProxyType(tensors)
        # The base's header still describes a file in which no tensor has changed its dtype.
        self.weight_files = tuple(
            file
            if all(tensors[name].dtype is base.tensors[name].dtype for name in file.names)
            else replace(file, header=None)
            for file in base.weight_files
        )

    @property
    def paths(self) -> tuple[Path, ...]:
        """The paths that belong to this model and must not be overwritten."""
        return (*self._base.paths, *self._lora.file.paths)

    @property
    def places(self) -> tuple[Path, ...]:
        """See `Checkpoint.places`."""
        return (*self._base.places, *self._lora.file.places)

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor, merged where the adapter touches it; see `Checkpoint.read`.

        Args:
            name: A key of `tensors`.

        Returns:
            A new CPU tensor in the dtype and shape of its `TensorInfo`.

        Raises:
            InputError: A file can no longer be read.
        """
        placed = self._lora.layers.get(name)
        if placed is None:
            return self._base.read(name)
        factors, adapter = placed.factors, self._lora.file
        dtype = self.tensors[name].dtype
        weight = self._base.read(name) if factors.base_layer is None else adapter.read(factors.base_layer)
        weight = weight.to(self._base.tensors[name].dtype).to(dtype)
        A, B = (adapter.read(key) for key in (factors.A, factors.B))
        return merge(
            weight,
            A,
            B,
            scaling=factors.scaling,
            transposed=placed.transposed,
            is_embedding=factors.is_embedding,
        )

    def read_rows(self, name: str, runs: Sequence[slice]) -> torch.Tensor:
        """Read some rows of a tensor; see `Checkpoint.read_rows`. A merged one is merged whole."""
        if name not in self._lora.layers:
            return self._base.read_rows(name, runs)
        tensor = self.read(name)
        return torch.cat([tensor[run] for run in runs])

    def content_key(self, name: str) -> Hashable | None:
        """See `Checkpoint.content_key`; of what the adapter leaves alone."""
        return None if name in self._lora.layers else self._base.content_key(name)

    def read_bytes(
        self, name: str, start: int = 0, length: int | None = None, out: memoryview | None = None
    ) -> memoryview:
        """Read a block of a tensor's bytes; see `Checkpoint.read_bytes`. Each call merges anew.

        Args:
            name: A key of `tensors`.
            start: First byte, counted from the start of the tensor.
            length: Number of bytes; cut at the end of the tensor. None reads to the end.
            out: Writable memory of at least that many bytes to read into, instead of new memory.

        Returns:
            The bytes read.
        """
        if name not in self._lora.layers:
            return self._base.read_bytes(name, start, length, out)
        nbytes = self.tensors[name].nbytes
        stop = nbytes if length is None else min(start + length, nbytes)
        return copy_block(self.read(name), start, stop, out)

    def hashes(self) -> dict[str, str]:
        """Compute the SHA-256 of the base's weight files and of the adapter's, with PEFT's configuration.

        Returns:
            Relative path to hexadecimal digest; the adapter's paths begin with `+`.
        """
        root = self._lora.file.root
        names = [file.file for file in self._lora.file.weight_files]
        if (root / "adapter_config.json").is_file():
            names.insert(0, "adapter_config.json")
        return self._base.hashes() | {f"+{root.name}/{name}": file_hash(root / name) for name in names}

    def known_hashes(self) -> dict[str, str]:
        """See `Checkpoint.known_hashes`; none of a model that no file holds."""
        return {}

    def made_files(self) -> Mapping[str, bytes]:
        """See `Checkpoint.made_files`."""
        return self._base.made_files()

    def side_files(self) -> list[Path]:
        """List the base's files that should travel to a checkpoint made like this one."""
        return self._base.side_files()


def merge(
    weight: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    *,
    scaling: float = 1.0,
    transposed: bool = False,
    is_embedding: bool = False,
) -> torch.Tensor:
    """Merge one layer as PEFT does, to the last bit.

    Args:
        weight: The base's, in the dtype to merge in. It is changed in place.
        A: `(r, in)`, or `(r, in, *kernel)`.
        B: `(out, r)`, or `(out, r, 1, ...)`.
        scaling: What `B @ A` is multiplied by.
        transposed: Whether the weight is `(in, out)`.
        is_embedding: Whether the layer is an embedding, where PEFT rounds the product before it adds it.

    Returns:
        `weight`.
    """
    compute_dtype = torch.float64 if weight.dtype is torch.float64 else torch.float32
    delta = _delta(A.to(compute_dtype), B.to(compute_dtype), scaling, transposed)
    weight += delta.to(weight.dtype) if is_embedding else delta
    return weight


def _delta(A: torch.Tensor, B: torch.Tensor, scaling: float, transposed: bool) -> torch.Tensor:
    # Each product is written exactly as PEFT writes it: another order of operations gives other bits.
    if A.ndim == 2:
        product = B @ A
        return (product.T if transposed else product) * scaling
    if A.shape[2:] == (1, 1):
        product = B.squeeze(3).squeeze(2) @ A.squeeze(3).squeeze(2)
        return product.unsqueeze(2).unsqueeze(3) * scaling
    convolve = {3: torch.conv1d, 4: torch.conv2d, 5: torch.conv3d}[A.ndim]
    return convolve(A.transpose(0, 1), B).transpose(0, 1) * scaling
