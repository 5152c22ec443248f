"""What is in a pack: models, their files, and how each tensor is told."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import torch

from detune import __version__
from detune.checkpoints.headers import DTYPES
from detune.checkpoints.paths import is_plain_path

FORMAT = "detune pack"
VERSION = 1

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Coding(StrEnum):
    """How a tensor is told."""

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
        rank: Of the factors; 0 where there are none.
        exponent: Of their unit.
    """

    index: int
    coding: Coding
    dtype: torch.dtype
    rank: int = 0
    exponent: int = 0


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
        name: Of the directory that it is restored to.
        spec: As it was given.
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
        """As it is stored."""
        content = {"format": FORMAT, "version": VERSION, "detune": __version__, **asdict(self)}
        return json.dumps(content, default=_NAMES.__getitem__).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Manifest":
        """Read what `to_json` wrote.

        Raises:
            ValueError: It is something else, of another version, or names a place outside its directory.
            KeyError: Something is missing.
            TypeError: Something is of another type.
        """
        content = json.loads(data)
        if content["format"] != FORMAT or content["version"] != VERSION:
            raise ValueError(f"{content['format']} {content['version']}, expected {FORMAT} {VERSION}")
        base = tuple(BaseTensor(row["name"], tuple(row["shape"]), DTYPES[row["dtype"]]) for row in content["base"])
        models = tuple(_model(row) for row in content["models"])
        _check_paths([model.name for model in models])
        if any("/" in model.name for model in models):
            raise ValueError("a model is to go to a directory below its own")
        return cls(base, models)


def _model(row: Mapping[str, Any]) -> PackedModel:
    files = tuple(
        PackedFile(**{**file, "spans": tuple(Span(**span) for span in file["spans"])}) for file in row["files"]
    )
    _check_paths([file.path for file in files])
    tensors = {
        name: PackedTensor(**{**tensor, "coding": Coding(tensor["coding"]), "dtype": DTYPES[tensor["dtype"]]})
        for name, tensor in row["tensors"].items()
    }
    return PackedModel(row["name"], row["spec"], files, tensors)


def _check_paths(paths: Sequence[str]) -> None:
    """A pack from anybody must not write anywhere else."""
    for path in paths:
        if not is_plain_path(path):
            raise ValueError(f"a file is to go to {path!r}")
    if len(set(paths)) != len(paths):
        raise ValueError("two files have one name")
