"""The files of a directory that make up a model."""

import json
import re
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Any

from detune.checkpoints.entries import is_text
from detune.checkpoints.formats import FORMATS
from detune.checkpoints.mark import MARK
from detune.checkpoints.paths import is_plain_path
from detune.checkpoints.side_files import CARD
from detune.errors import InputError, parsing
from detune.files import MAX_JSON_BYTES, read_regular

__all__ = ["component_dirs", "is_index", "pick_weights", "read_json", "weight_map"]

# <stem>.<format> or <stem>.<variant>.<format>, and the same with .index for shards: model.safetensors,
# model.fp16.safetensors, model.safetensors.index.json, model.safetensors.index.fp16.json
_STEM = r"(model|diffusion_pytorch_model|pytorch_model)"
_SUFFIXES = [form.in_directories for form in FORMATS if form.in_directories]
_FORMAT = rf"(?P<format>{'|'.join(_SUFFIXES)})"
_SINGLE = re.compile(_STEM + r"(?:\.(?P<variant>[\w-]+))?\." + _FORMAT)
_INDEX = re.compile(_STEM + r"\." + _FORMAT + r"\.index(?:\.(?P<variant>[\w-]+))?\.json")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
_ANY_INDEX = re.compile(r".*\.index(\.[\w-]+)?\.json")


def pick_weights(names: Collection[str], where: str) -> str | None:
    """Choose the weight file, or the index of the shards, that a loader would read from one directory.

    Safetensors come before pickles, one whole file before shards, and a plain file before a variant such as
    `model.fp16.safetensors`.

    Args:
        names: The file names in the directory.
        where: The directory, for messages.

    Returns:
        The name of a weight file or of an index, or None where the directory holds no weights.

    Raises:
        InputError: The choice is ambiguous, or there are shards without their index.
    """
    ranked: dict[tuple[bool, bool, int, bool], list[str]] = {}
    for name in names:
        match = _SINGLE.fullmatch(name) or _INDEX.fullmatch(name)
        if match and not _SHARD.search(name):
            rank = (False, match["variant"] is not None, _SUFFIXES.index(match["format"]), name.endswith(".json"))
        elif name.endswith(".safetensors") and not name.startswith("adapter_") and not _SHARD.search(name):
            rank = (True, False, 0, False)
        elif name.endswith(".safetensors.index.json"):
            rank = (True, False, 0, True)
        else:
            continue
        ranked.setdefault(rank, []).append(name)
    if not ranked:
        shards = sorted(name for name in names if _SHARD.search(name) and name.endswith(tuple(_SUFFIXES)))
        if shards:
            raise InputError(
                f"{where} has shards without their index",
                f"found {shards[0]} and no *.index.json",
                "copy the index file too",
            )
        return None
    best = sorted(ranked[min(ranked)])
    if len(best) > 1:
        raise InputError(
            f"{where} holds several sets of weights", f"found {', '.join(best)}", "give the path of one file"
        )
    return best[0]


def component_dirs(root: Path) -> list[str]:
    """List the sub-directories that hold parts of a model, "" being the directory itself.

    A diffusers pipeline names them in `model_index.json`, sentence-transformers in `modules.json`.

    Args:
        root: The model's directory.

    Returns:
        Relative directories in the order of the file that names them.

    Raises:
        InputError: One of the two files is malformed.
    """
    pipeline, modules = root / "model_index.json", root / "modules.json"
    try:
        if pipeline.is_file():
            # Options such as "_class_name" stand beside the components; [null, null] is an absent component.
            found = [
                name
                for name, value in read_json(pipeline).items()
                if isinstance(value, list) and len(value) == 2 and value[1] is not None
            ]
        elif modules.is_file():
            # A module without parameters, such as a normalisation, may have no directory at all.
            named = [PurePosixPath(module["path"]).as_posix() for module in read_json(modules)]
            found = [path for path in named if (root / path).is_dir()]
        else:
            found = [""]
    except (AttributeError, TypeError, KeyError) as error:
        raise InputError(f"{root} has a malformed list of components", str(error), "copy the model again") from error
    for name in found:
        if name not in ("", ".") and not is_plain_path(name):
            raise InputError(f"{root} names a component outside itself", f"got {name!r}", "do not trust this model")
        if name.casefold() in (CARD.casefold(), MARK):
            raise InputError(f"{root} names a file as a component", f"got {name!r}", "do not trust this model")
    return list(dict.fromkeys("" if name == "." else name for name in found))


def read_json(path: Path) -> Any:
    """Read a JSON file of a checkpoint.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        InputError: The file cannot be read or is not JSON.
    """
    with parsing(path):
        content = read_regular(path, MAX_JSON_BYTES)
    try:
        return json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON", str(error), "download or copy the file again") from error


def is_index(name: str) -> bool:
    """Whether a file of this name says which shard holds which tensor."""
    return _ANY_INDEX.fullmatch(name) is not None


def weight_map(path: Path) -> dict[str, str]:
    """Read which shard holds which tensor.

    Args:
        path: A `*.index.json`.

    Returns:
        Tensor name to file name.

    Raises:
        InputError: The index is malformed or names a file outside its directory.
    """
    content = read_json(path)
    table = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(table, dict) or not table or not all(map(is_text, (*table.keys(), *table.values()))):
        raise InputError(f"{path} is not an index of shards", "expected a weight_map of file names", "copy it again")
    if not isinstance(content.get("metadata", {}), dict | None):
        raise InputError(f"{path} has malformed metadata", "expected a table", "copy it again")
    for name, file in table.items():
        # An index must not be able to point at other files of this machine.
        if PurePosixPath(file).name != file:
            raise InputError(
                f"{path} places tensor {name!r} outside its directory",
                f"got {file!r}",
                "do not trust this model",
            )
    return table
