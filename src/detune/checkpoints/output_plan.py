"""The plan of a checkpoint that is to be written like another: files, headers, and the place of each tensor."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch

from detune.checkpoints.entries import Entry
from detune.checkpoints.formats import safetensors_name
from detune.checkpoints.layout import read_json
from detune.checkpoints.safetensors_file import encode_safetensors_header
from detune.checkpoints.side_files import read_side_file
from detune.checkpoints.source import Checkpoint, TensorInfo, WeightFile
from detune.errors import OutputError

__all__ = ["OutputPlan"]


@dataclass(frozen=True)
class _Place:
    """The place of a tensor: its output file and the first byte there."""

    file: str
    offset: int


@dataclass(frozen=True)
class OutputPlan:
    """Weight files as safetensors with the names and metadata of another checkpoint's. Made by `like`.

    A file whose tensors are all stored as they were has the header that it had.

    Attributes:
        tensors: Each as it will be stored.
        headers: Header of each weight file.
        sizes_bytes: Size of each weight file, its header included.
        places: Place of each tensor.
    """

    tensors: Mapping[str, TensorInfo]
    headers: Mapping[str, bytes]
    sizes_bytes: Mapping[str, int]
    places: Mapping[str, _Place]

    @classmethod
    def like(cls, model: Checkpoint, dtype: torch.dtype | None) -> Self:
        """Plan a checkpoint.

        Args:
            model: The checkpoint whose layout it takes.
            dtype: What float tensors are stored in; None is what they are in, bf16 where that is quantised.

        Raises:
            OutputError: Two weight files would have one name.
        """
        tensors = {name: _stored(info, dtype) for name, info in model.tensors.items()}
        headers: dict[str, bytes] = {}
        sizes_bytes: dict[str, int] = {}
        places: dict[str, _Place] = {}
        for file in model.weight_files:
            output = safetensors_name(file.file)
            if output in headers:
                raise OutputError(
                    f"two weight files of {model.spec} clash", f"both would become {output}", "rename one of them"
                )
            headers[output], infos = _header(file, model.tensors, tensors)
            offset = len(headers[output])
            for info in infos:
                places[info.name] = _Place(output, offset)
                offset += info.nbytes
            sizes_bytes[output] = offset
        return cls(tensors, headers, sizes_bytes, places)

    def index(self, model: Checkpoint, file: str) -> bytes:
        """An index of shards, brought up to date.

        Args:
            model: As given to `like`.
            file: One of its index files.

        Raises:
            InputError: It can no longer be read.
        """
        unchanged = self.tensors == dict(model.tensors) and all(
            weight_file.header is not None for weight_file in model.weight_files
        )
        if unchanged and safetensors_name(file) == file:
            return read_side_file(model.root, file)
        content = read_json(model.root / file)
        prefix = file[: file.rfind("/") + 1]
        files = {prefix + shard for shard in content["weight_map"].values()}
        within = [name.removeprefix(prefix) for name, info in model.tensors.items() if info.file in files]
        # Names keep the order of the index; those that it does not have come last.
        names = list(dict.fromkeys([name for name in content["weight_map"] if name in set(within)] + within))
        total_bytes = sum(self.tensors[prefix + name].nbytes for name in names)
        content["metadata"] = {**(content.get("metadata") or {}), "total_size": total_bytes}
        content["weight_map"] = {name: self.places[prefix + name].file.removeprefix(prefix) for name in names}
        return (json.dumps(content, indent=2) + "\n").encode()


def _header(
    file: WeightFile, before: Mapping[str, TensorInfo], after: Mapping[str, TensorInfo]
) -> tuple[bytes, list[TensorInfo]]:
    """The header of a weight file, and its tensors in the order of their data."""
    infos = [after[name] for name in file.names]
    if file.header is not None and infos == [before[name] for name in file.names]:
        return file.header, infos
    # Largest elements first keeps every tensor aligned, as the safetensors library does.
    infos.sort(key=lambda info: -info.dtype.itemsize)
    prefix = file.file[: file.file.rfind("/") + 1]
    entries = [Entry(info.name.removeprefix(prefix), info.dtype, info.shape, 0) for info in infos]
    return encode_safetensors_header(entries, dict(file.metadata) or {"format": "pt"}), infos


def _stored(info: TensorInfo, dtype: torch.dtype | None) -> TensorInfo:
    """A tensor as it will be stored."""
    dtype = dtype or (torch.bfloat16 if info.quantised else info.dtype)
    if not info.dtype.is_floating_point or info.dtype == dtype:
        return info
    return replace(info, dtype=dtype, nbytes=math.prod(info.shape) * dtype.itemsize)
