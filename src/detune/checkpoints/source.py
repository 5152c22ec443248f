"""Lazy reading of checkpoints: opening one reads headers, and a weight is read when it is asked for.

Names that share one storage (tied weights): `save_pretrained` stores only one of them in safetensors, so
there is nothing to do. In a `.bin` all of them are listed; they are read from the same bytes and so stay
equal.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

import torch

from detune.checkpoints.blocks import copy_block, file_hash, memory_of, new_block, read_into
from detune.checkpoints.headers import PICKLE_SUFFIXES, Entry, read_header
from detune.checkpoints.hub import fetch, is_hub_id
from detune.checkpoints.layout import component_dirs, pick_weights, side_files, weight_map
from detune.errors import InputError

__all__ = ["Checkpoint", "TensorInfo", "WeightFile", "open_adapter", "open_checkpoint"]

_ADAPTER_FILES = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
)


@dataclass(frozen=True)
class TensorInfo:
    """What a checkpoint's headers say about one tensor.

    Attributes:
        name: Qualified name: `encoder.x.weight`, or `unet/down.weight` in a component directory.
        shape: Its shape.
        dtype: The dtype in which it is read.
        nbytes: Its size in that dtype.
        file: Its weight file relative to the checkpoint's root, with forward slashes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    file: str


@dataclass(frozen=True)
class WeightFile:
    """One weight file of a checkpoint.

    Attributes:
        file: Its path relative to the checkpoint's root, with forward slashes.
        names: Qualified names of its tensors in the order of their offsets.
        metadata: The `__metadata__` of a safetensors file.
        header: The bytes of a safetensors file up to the first tensor; None where one has to be made.
    """

    file: str
    names: tuple[str, ...]
    metadata: Mapping[str, str]
    header: bytes | None


class Checkpoint:
    """A model on disk, read lazily. Made by `open_checkpoint`; safe to read from several threads.

    Args:
        spec: The model as the user typed it.
        root: Its directory (of a single file: the parent).
        files: Weight files relative to `root`, in reading order.
        components: Directories below `root` that hold the parts of the model.
        index_files: Indices of shards relative to `root`.
        single_file: Whether the model is one file and the rest of `root` has nothing to do with it.

    Attributes:
        spec: As given.
        root: As given.
        tensors: Every tensor by qualified name, in file order and then offset order: reading in this order is
            sequential.
        weight_files: The files with their metadata.
        index_files: As given.

    Raises:
        InputError: A file cannot be read, is damaged, or two files hold the same tensor.
    """

    def __init__(
        self,
        spec: str,
        root: Path,
        files: Iterable[str],
        *,
        components: Iterable[str] = ("",),
        index_files: Iterable[str] = (),
        single_file: bool = False,
    ) -> None:
        self.spec = spec
        self.root = root
        self.index_files = tuple(index_files)
        self._components = tuple(components)
        self._single_file = single_file
        self._entries: dict[str, Entry] = {}
        tensors: dict[str, TensorInfo] = {}
        weight_files: list[WeightFile] = []
        for file in files:
            header = read_header(root / file)
            prefix = file[: file.rfind("/") + 1]
            for entry in header.entries:
                name = prefix + entry.name
                if name in tensors:
                    raise InputError(
                        f"tensor {entry.name!r} is stored twice",
                        f"in {root / tensors[name].file} and {root / file}",
                        "copy the model again",
                    )
                tensors[name] = TensorInfo(name, entry.shape, entry.dtype, entry.nbytes, file)
                self._entries[name] = entry
            names = tuple(prefix + entry.name for entry in header.entries)
            weight_files.append(WeightFile(file, names, MappingProxyType(dict(header.metadata)), header.raw))
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)
        self.weight_files = tuple(weight_files)

    @property
    def paths(self) -> tuple[Path, ...]:
        """What on disk belongs to this model and must not be overwritten: directories, or the one file."""
        return (self.root / self.weight_files[0].file,) if self._single_file else (self.root,)

    @property
    def total_bytes(self) -> int:
        """Size of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor.

        Args:
            name: A key of `tensors`.

        Returns:
            A new CPU tensor in the dtype and shape of its `TensorInfo`.

        Raises:
            InputError: The file can no longer be read.
        """
        entry, path = self._entries[name], self.root / self.tensors[name].file
        if entry.stride is None:
            tensor = torch.empty(entry.shape, dtype=entry.dtype)
            read_into(path, entry.offset, memory_of(tensor), name)
            return tensor
        span = torch.empty(entry.span_bytes // entry.dtype.itemsize, dtype=entry.dtype)
        read_into(path, entry.offset, memory_of(span), name)
        return span.as_strided(entry.shape, entry.stride).clone(memory_format=torch.contiguous_format)

    def read_bytes(
        self, name: str, start: int = 0, length: int | None = None, out: memoryview | None = None
    ) -> memoryview:
        """Read a block of a tensor's bytes, to compare or copy it without holding the whole.

        Args:
            name: A key of `tensors`.
            start: First byte, counted from the start of the tensor.
            length: Number of bytes; cut at the end of the tensor. None reads to the end.
            out: Writable memory of at least that many bytes to read into, instead of new memory.

        Returns:
            The bytes read: the beginning of `out` where it was given.

        Raises:
            InputError: The file can no longer be read.
        """
        entry = self._entries[name]
        stop = entry.nbytes if length is None else min(start + length, entry.nbytes)
        if entry.stride is not None:
            return copy_block(self.read(name), start, stop, out)
        block = new_block(stop - start, out)
        read_into(self.root / self.tensors[name].file, entry.offset + start, block, name)
        return block

    def hashes(self) -> dict[str, str]:
        """Compute the SHA-256 of each weight file, as `sha256sum` prints it.

        Returns:
            Relative path to hexadecimal digest.

        Raises:
            InputError: A file can no longer be read.
        """
        return {file.file: file_hash(self.root / file.file) for file in self.weight_files}

    def side_files(self) -> list[Path]:
        """List the files that should travel to a checkpoint made like this one, relative to `root`."""
        return [] if self._single_file else side_files(self.root, self._components)

    def close(self) -> None:
        """Release what the checkpoint holds: nothing today, files are open only while they are read."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.spec!r}, {len(self.tensors)} tensors)"


def open_checkpoint(spec: str | Path, *, merge_dtype: torch.dtype | None = None) -> Checkpoint:
    """Open a model without reading its weights.

    Args:
        spec: One of
            a directory in Hugging Face layout (safetensors or `torch.save` files, sharded or not);
            a diffusers pipeline or sentence-transformers directory, whose parts get names `component/tensor`;
            one weight file;
            a Hub id `org/name` or `org/name@revision`;
            `BASE+ADAPTER`, a model with a LoRA of PEFT, diffusers or kohya to be merged on the fly.
        merge_dtype: For `BASE+ADAPTER`: the dtype in which touched tensors are merged and presented. None
            is the base's own dtype, merged bit for bit as PEFT does it.

    Returns:
        The checkpoint.

    Raises:
        InputError: There is no such model, or its files are damaged or incomplete.

    Example:
        >>> with open_checkpoint("my-model") as checkpoint:  # doctest: +SKIP
        ...     weight = checkpoint.read("encoder.layer.0.attention.self.query.weight")
    """
    text = os.fspath(spec)
    if not Path(text).exists() and "+" in text:
        from detune.checkpoints.adapters import MergedCheckpoint
        from detune.checkpoints.lora import open_lora

        base_spec, adapter = _split_adapter(text)
        base = open_checkpoint(base_spec)
        lora = open_lora(adapter, base, allow_extra=False)
        return MergedCheckpoint(text, base, lora, merge_dtype=merge_dtype)
    path = _locate(text)
    if path.is_file():
        if path.suffix != ".safetensors" and path.suffix not in PICKLE_SUFFIXES:
            raise InputError(
                f"{path} is not a weight file",
                f"expected .safetensors or {', '.join(PICKLE_SUFFIXES)}",
                "give a weight file or the model's directory",
            )
        return Checkpoint(text, path.parent, [path.name], single_file=True)
    return _open_directory(text, path)


def open_adapter(spec: str) -> Checkpoint:
    """Open the weights of a LoRA adapter.

    Args:
        spec: A PEFT directory, a file of diffusers or kohya, a directory with such a file, or a Hub id.

    Returns:
        A checkpoint of the one file.

    Raises:
        InputError: There is no such adapter.
    """
    root = _locate(spec)
    if root.is_file():
        return Checkpoint(spec, root.parent, [root.name], single_file=True)
    for name in _ADAPTER_FILES:
        if (root / name).is_file():
            return Checkpoint(spec, root, [name])
    chosen = pick_weights([child.name for child in root.iterdir() if child.is_file()], str(root))
    if chosen is None or chosen.endswith(".json"):
        raise InputError(
            f"{root} is not an adapter",
            f"expected {_ADAPTER_FILES[0]}, {_ADAPTER_FILES[2]} or one other *.safetensors",
            "give the directory that PEFT's save_pretrained wrote, or the file of a LoRA",
        )
    return Checkpoint(spec, root, [chosen])


def _locate(spec: str) -> Path:
    """Find a path or fetch a Hub id.

    Args:
        spec: What the user typed.

    Returns:
        An existing file or directory.

    Raises:
        InputError: There is neither such a path nor such a repository.
    """
    path = Path(spec).expanduser()
    if path.exists():
        return path
    if is_hub_id(spec):
        return fetch(spec)
    raise InputError(f"no such model: {spec!r}", "neither an existing path nor a Hub id org/name", "check the spelling")


def _split_adapter(spec: str) -> tuple[str, str]:
    # File names may contain "+" too: prefer the split with the most sides that exist.
    cuts = [position for position, character in enumerate(spec) if character == "+"]
    sides = [(spec[:cut], spec[cut + 1 :]) for cut in cuts if 0 < cut < len(spec) - 1]
    if not sides:
        raise InputError(f"no such model: {spec!r}", "one side of '+' is empty", "write BASE+ADAPTER")
    return max(sides, key=lambda pair: sum(Path(side).expanduser().exists() for side in pair))


def _open_directory(spec: str, root: Path) -> Checkpoint:
    files: list[str] = []
    indices: list[str] = []
    components = component_dirs(root)
    for component in components:
        directory = root / component
        if not directory.is_dir():
            raise InputError(
                f"{root} is incomplete",
                f"its component {component!r} is missing",
                "copy or download the model again",
            )
        prefix = f"{component}/" if component else ""
        chosen = pick_weights([child.name for child in directory.iterdir() if child.is_file()], str(directory))
        if chosen is None:
            continue
        if not chosen.endswith(".json"):
            files.append(prefix + chosen)
            continue
        indices.append(prefix + chosen)
        for file in sorted(set(weight_map(directory / chosen).values())):
            if not (directory / file).is_file():
                raise InputError(
                    f"{directory / chosen} names a missing file",
                    f"expected {file}",
                    "copy or download it too",
                )
            files.append(prefix + file)
    if not files:
        if (root / "adapter_config.json").is_file():
            raise InputError(f"{root} is a PEFT adapter, not a model", "it has no base weights", "write BASE+ADAPTER")
        raise InputError(
            f"{root} holds no weights",
            "expected *.safetensors or pytorch_model.bin",
            "give the directory of a model saved with save_pretrained",
        )
    checkpoint = Checkpoint(spec, root, files, components=components, index_files=indices)
    for index in indices:
        _check_index(checkpoint, index)
    return checkpoint


def _check_index(checkpoint: Checkpoint, index: str) -> None:
    prefix = index[: index.rfind("/") + 1]
    for name, file in weight_map(checkpoint.root / index).items():
        info = checkpoint.tensors.get(prefix + name)
        if info is None or info.file != prefix + file:
            raise InputError(
                f"{checkpoint.root / prefix / file} lacks tensor {name!r}",
                f"{index} places it there",
                "copy or download both files again",
            )
