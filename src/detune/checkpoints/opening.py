"""Opening a model: from what the user typed to a checkpoint, without reading its weights."""

import os
from pathlib import Path

import torch

from detune.checkpoints.excerpt import Excerpt
from detune.checkpoints.formats import GGUF, SAFETENSORS, WEIGHT_SUFFIXES, format_of
from detune.checkpoints.gguf_file import with_gguf_names
from detune.checkpoints.hub import cached_snapshot, find_repository, is_on_hub, locate
from detune.checkpoints.layout import component_dirs, pick_weights, weight_map
from detune.checkpoints.lora import open_lora
from detune.checkpoints.merged_checkpoint import MergedCheckpoint
from detune.checkpoints.remote import HubFiles
from detune.checkpoints.scaled import with_scales
from detune.checkpoints.source import Checkpoint
from detune.checkpoints.storage import LocalFiles, Storage
from detune.checkpoints.unmerged import without_adapters
from detune.errors import InputError, parsing

__all__ = ["absolute", "open_checkpoint"]


def open_checkpoint(spec: str | Path, *, merge_dtype: torch.dtype | None = None, rows: int | None = None) -> Checkpoint:
    """Open a model without reading its weights.

    Args:
        spec: One of
            a directory in Hugging Face layout (safetensors or `torch.save` files, sharded or not);
            a diffusers pipeline or sentence-transformers directory, whose parts get names `component/tensor`;
            one weight file, GGUF among them;
            a Hub id `org/name` or `org/name@revision`;
            `BASE+ADAPTER`, a model with a LoRA of PEFT, diffusers or kohya to be merged on the fly.
        merge_dtype: For `BASE+ADAPTER`: the dtype in which touched tensors are merged and presented. None
            is the base's own dtype, merged bit for bit as PEFT does it.
        rows: Rows of every matrix that are shown, see `Excerpt`. The weights of a Hub id are then read where they
            are; otherwise they are downloaded.

    Returns:
        The checkpoint.

    Raises:
        InputError: There is no such model, or its files are damaged or incomplete.

    Example:
        >>> with open_checkpoint("my-model") as checkpoint:  # doctest: +SKIP
        ...     weight = checkpoint.read("encoder.layer.0.attention.self.query.weight")
    """
    text = os.fspath(spec)
    with parsing(text):
        if rows is None:
            return _open(text, merge_dtype)
        return Excerpt(_open_remote(text) if is_on_hub(text) else _open(text, merge_dtype), rows)


def _open(text: str, merge_dtype: torch.dtype | None) -> Checkpoint:
    if not Path(text).exists() and "+" in text:
        base_spec, adapter = _split_adapter(text)
        base = open_checkpoint(base_spec)
        lora = open_lora(adapter, base, allow_extra=False)
        return MergedCheckpoint(text, base, lora, merge_dtype=merge_dtype)
    path = locate(text)
    if path.is_file():
        if format_of(path) is None:
            raise InputError(
                f"{path} is not a weight file",
                f"expected {', '.join(WEIGHT_SUFFIXES[:-1])} or {WEIGHT_SUFFIXES[-1]}",
                "give a weight file or the model's directory",
            )
        return _as_meant(Checkpoint(text, LocalFiles(path.parent), [path.name], single_file=True))
    if not path.is_dir():
        raise InputError(f"{path} is neither a file nor a directory", "expected a model", "give one that is on a disk")
    return _open_directory(text, LocalFiles(path))


def _as_meant(stored: Checkpoint) -> Checkpoint:
    """A checkpoint with quantised tensors dequantised, and without adapters that were not merged.

    Raises:
        InputError: A scale is missing, or does not fit.
    """
    if any(format_of(file.file) is GGUF for file in stored.weight_files):
        return with_gguf_names(stored)
    return without_adapters(with_scales(stored))


def _open_remote(hub_id: str) -> Checkpoint:
    """Open a repository whose weights stay on the Hub, unless they are here already or have to be downloaded."""
    try:
        repository = find_repository(hub_id)
    except InputError as why:
        return _open_directory(hub_id, LocalFiles(cached_snapshot(hub_id, why)))
    root = repository.download_side_files()
    weights = repository.weights(root)
    # Only a safetensors file tells where its tensors are without being read from end to end.
    if all(format_of(file) is SAFETENSORS for file in weights) and not all((root / file).exists() for file in weights):
        return _open_directory(hub_id, HubFiles(repository, root))
    return _open_directory(hub_id, LocalFiles(repository.download(weights) if weights else root))


def absolute(spec: str | Path) -> str:
    """Write a model so that it means the same in every working directory.

    Args:
        spec: As `open_checkpoint` takes it.

    Returns:
        Paths made absolute; Hub ids as they are.
    """
    text = os.fspath(spec)
    path = Path(text).expanduser()
    if path.exists():
        return str(path.absolute())
    return "+".join(map(absolute, _split_adapter(text))) if "+" in text else text


def _split_adapter(spec: str) -> tuple[str, str]:
    # File names may contain "+" too: prefer the split with the most sides that exist.
    cuts = [position for position, character in enumerate(spec) if character == "+"]
    sides = [(spec[:cut], spec[cut + 1 :]) for cut in cuts if 0 < cut < len(spec) - 1]
    if not sides:
        raise InputError(f"no such model: {spec!r}", "one side of '+' is empty", "write BASE+ADAPTER")
    return max(sides, key=lambda pair: sum(Path(side).expanduser().exists() for side in pair))


def _open_directory(spec: str, storage: Storage) -> Checkpoint:
    root = storage.root
    files: list[str] = []
    indices: list[str] = []
    components = component_dirs(root)
    for component in components:
        names = storage.names(component)
        if names is None:
            raise InputError(
                f"{root} is incomplete",
                f"its component {component!r} is missing",
                "copy or download the model again",
            )
        prefix = f"{component}/" if component else ""
        chosen = pick_weights(names, storage.where(component))
        if chosen is None:
            continue
        if not chosen.endswith(".json"):
            files.append(prefix + chosen)
            continue
        indices.append(prefix + chosen)
        for file in sorted(set(weight_map(root / prefix / chosen).values())):
            if file not in names:
                raise InputError(
                    f"{storage.where(prefix + chosen)} names a missing file",
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
    checkpoint = Checkpoint(spec, storage, files, components=components, index_files=indices)
    for index in indices:
        _check_index(checkpoint, index)
    return _as_meant(checkpoint)


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
