"""The manifest of a pack: models, their files, and how each tensor is coded."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import torch

from detune import __version__
from detune.checkpoints.entries import MAX_ELEMENTS, check_shape, is_text
from detune.checkpoints.paths import is_plain_path
from detune.checkpoints.stored_dtypes import DTYPE_NAMES, DTYPES

FORMAT = "detune pack"
VERSION = 1


class TensorCoding(StrEnum):
    """The coding of a tensor."""

    SAME = "same"
    """As the base's."""
    PREDICTED = "predicted"
    """By what sets it apart from base and factors."""
    PLAIN = "plain"
    """As it is."""


@dataclass(frozen=True)
class PackedTensor:
    """A tensor of one model.

    Attributes:
        index: Number of the tensor: its base is in `base/index`.
        coding: How it is told.
        dtype: Its dtype.
        rank: Rank of the factors; 0 where there are none.
        exponent: Exponent of their unit.
    """

    index: int
    coding: TensorCoding
    dtype: torch.dtype
    rank: int = 0
    exponent: int = 0

    def nbytes(self, base: Sequence["BaseTensor"]) -> int:
        """Its size, given the base's tensors."""
        return math.prod(base[self.index].shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Span:
    """A tensor in a weight file.

    Attributes:
        tensor: Its qualified name.
        offset: Its first byte.
    """

    tensor: str
    offset: int


@dataclass(frozen=True)
class PackedFile:
    """A file of a model.

    Attributes:
        path: Below the model's directory, with forward slashes.
        size_bytes: Its size.
        sha256: Its hash.
        member: Holds its bytes, or those between its tensors.
        spans: Its tensors in the order of their offsets; empty in files without weights.
    """

    path: str
    size_bytes: int
    sha256: str
    member: str
    spans: tuple[Span, ...] = ()


@dataclass(frozen=True)
class PackedModel:
    """A model.

    Attributes:
        name: Name of the directory that it is restored to.
        spec: As it was given; a place on the packing machine from where the pack was made.
        files: All of its files.
        tensors: Those of its weight files, by qualified name.
    """

    name: str
    spec: str
    files: tuple[PackedFile, ...]
    tensors: Mapping[str, PackedTensor]


@dataclass(frozen=True)
class BaseTensor:
    """A tensor of the base, `base/index`.

    Attributes:
        name: Its qualified name.
        shape: Its shape, which is that of every model's.
        dtype: Its dtype.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Manifest:
    """All of a pack.

    Attributes:
        base: The base's tensors.
        models: The models.
    """

    base: tuple[BaseTensor, ...]
    models: tuple[PackedModel, ...]

    def to_json(self) -> bytes:
        """The manifest as it is stored."""
        content = {"format": FORMAT, "version": VERSION, "detune": __version__, **asdict(self)}
        return json.dumps(content, default=DTYPE_NAMES.__getitem__).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Manifest":
        """Read what `to_json` wrote.

        Raises:
            InputError: A tensor has an impossible shape.
            Exception: It is something else, of another version, names a place outside its directory, or does not add
                up; of whatever kind the fault makes it.
        """
        content = json.loads(data)
        if content["format"] != FORMAT or content["version"] != VERSION:
            raise ValueError(f"{content['format']} {content['version']}, expected {FORMAT} {VERSION}")
        base = tuple(_base_tensor(row) for row in _rows(content, "base"))
        models = tuple(_model(row, base) for row in _rows(content, "models"))
        _check_paths([model.name for model in models])
        if any("/" in model.name for model in models):
            raise ValueError("a model is to go to a directory below its own")
        return cls(base, models)


def _base_tensor(row: Any) -> BaseTensor:
    name = _text(row, "name")
    return BaseTensor(name, check_shape(f"tensor {name!r}", _rows(row, "shape")), DTYPES[row["dtype"]])


def _model(row: Any, base: Sequence[BaseTensor]) -> PackedModel:
    tensors = {name: _tensor(name, fields, base) for name, fields in row["tensors"].items()}
    files = tuple(_file(fields, tensors, base) for fields in _rows(row, "files"))
    _check_paths([file.path for file in files])
    return PackedModel(_text(row, "name"), _text(row, "spec"), files, tensors)


def _tensor(name: str, row: Any, base: Sequence[BaseTensor]) -> PackedTensor:
    packed = PackedTensor(
        _count(row, "index"),
        TensorCoding(row["coding"]),
        DTYPES[row["dtype"]],
        _count(row, "rank"),
        _whole(row, "exponent"),
    )
    shape = base[packed.index].shape
    if packed.rank > max(shape, default=0):
        raise ValueError(f"tensor {name!r} is to change by rank {packed.rank}, its shape is {shape}")
    return packed


def _file(row: Any, tensors: Mapping[str, PackedTensor], base: Sequence[BaseTensor]) -> PackedFile:
    spans = tuple(Span(_text(fields, "tensor"), _count(fields, "offset")) for fields in _rows(row, "spans"))
    file = PackedFile(_text(row, "path"), _count(row, "size_bytes"), _text(row, "sha256"), _text(row, "member"), spans)
    end = 0
    for span in spans:
        if span.offset < end:
            raise ValueError(f"tensor {span.tensor!r} lies over another one in {file.path!r}")
        packed = tensors[span.tensor]
        end = span.offset + packed.nbytes(base)
    if end > file.size_bytes:
        raise ValueError(f"the tensors of {file.path!r} take {end} of its {file.size_bytes} bytes")
    return file


def _rows(row: Any, key: str) -> list[Any]:
    value = row[key]
    if not isinstance(value, list):
        raise TypeError(f"{key} is {type(value).__name__}, expected a list")
    return value


def _text(row: Any, key: str) -> str:
    value = row[key]
    if not (isinstance(value, str) and is_text(value)):
        raise TypeError(f"{key} is {type(value).__name__}, expected text")
    return value


def _whole(row: Any, key: str) -> int:
    value = row[key]
    if type(value) is not int:
        raise TypeError(f"{key} is {type(value).__name__}, expected a whole number")
    return value


def _count(row: Any, key: str) -> int:
    value = _whole(row, key)
    if not 0 <= value <= MAX_ELEMENTS:
        raise ValueError(f"{key} is {value}, expected a number of bytes or things")
    return value


def _check_paths(paths: Sequence[str]) -> None:
    """A pack from anybody must not write anywhere else."""
    for path in paths:
        if not is_plain_path(path):
            raise ValueError(f"a file is to go to {path!r}")
    if len(set(paths)) != len(paths):
        raise ValueError("two files have one name")
