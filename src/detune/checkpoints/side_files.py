"""The files that travel with the weights into whatever is made of a model: configuration, tokenizer, scheduler, code.

They are known by their names. A model's directory may hold anything else beside them, such as keys, logs and the runs
of a trainer, and links to anywhere: neither may end in an output that is given away.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import IO

from detune.errors import InputError, parsing
from detune.files import open_regular

__all__ = [
    "CARD",
    "MAX_CARD_BYTES",
    "MAX_SIDE_FILE_BYTES",
    "is_side_file",
    "read_side_file",
    "require_own",
    "side_files",
]

MAX_SIDE_FILE_BYTES = 256 * 2**20
"""The largest tokenizers take a tenth of it."""

CARD = "README.md"
"""A model's words on itself. They do not travel: what is made of a model has a card of its own."""

MAX_CARD_BYTES = 2**20
"""Cards of popular models have some 50 kB."""

_NAMES = frozenset(
    {
        # models
        "config.json", "generation_config.json", "quantization_config.json", "quantize_config.json", "params.json",
        # tokenizers
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
        "vocab.txt", "merges.txt", "bpe.codes", "dict.txt", "encoder.json", "entity_vocab.json", "target_vocab.json",
        "normalizer.json", "tekken.json", "word_shape.json", "word_pronunciation.json", "emoji.json", "byte_maps.json",
        "chat_template.json",
        # processors
        "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
        "audio_tokenizer_config.json", "image_processor_config.json", "feature_extractor_config.json",
        # diffusers
        "model_index.json", "scheduler_config.json",
        # sentence-transformers
        "modules.json", "config_sentence_transformers.json", "data_config.json", "wordembedding_config.json",
        "whitespacetokenizer_config.json", "stopwords.txt", "router_config.json",
        # OpenCLIP and timm
        "open_clip_config.json",
    }
)  # fmt: skip
_SUFFIXES = frozenset({".model", ".spm", ".tiktoken", ".bpe", ".jinja"})
# Files that `auto_map` names, by transformers' conventions, and the limits of models in sentence-transformers.
_PATTERNS = re.compile(
    r"(configuration|modeling|tokenization|processing|image_processing|video_processing|feature_extraction|generation)"
    r"_\w+\.py|sentence_\w+_config\.json"
)
# Beside the components: where transformers keeps templates.
_DIRECTORIES = ("additional_chat_templates",)


def is_side_file(name: str) -> bool:
    """Whether a file of this name travels with the weights.

    Example:
        >>> [is_side_file(name) for name in ("config.json", "spiece.model", "modeling_x.py", "credentials.json")]
        [True, True, True, False]
    """
    return name in _NAMES or PurePosixPath(name).suffix in _SUFFIXES or _PATTERNS.fullmatch(name) is not None


def side_files(root: Path, components: Iterable[str]) -> list[Path]:
    """List the files that travel with the weights, by their names, from the components and nowhere else.

    Args:
        root: The checkpoint's directory.
        components: Its component directories.

    Returns:
        Sorted paths relative to `root`.

    Raises:
        InputError: One is a link that leaves the model, no regular file, or larger than `MAX_SIDE_FILE_BYTES`.
    """
    directories = {Path(), *map(Path, components)}
    directories |= {directory / name for directory in directories for name in _DIRECTORIES}
    found = [
        directory / name
        for directory in directories
        if (root / directory).is_dir()
        for name in os.listdir(root / directory)
        if is_side_file(name) and not (root / directory / name).is_dir()
    ]
    for relative in found:
        _opened(root, relative).close()
    return sorted(found)


def read_side_file(root: Path, relative: Path | str) -> bytes:
    """Read a file that travels with the weights.

    Args:
        root: The checkpoint's directory.
        relative: The file in it.

    Raises:
        InputError: As `side_files`, or it can no longer be read.
    """
    with _opened(root, relative) as file:
        return file.read(MAX_SIDE_FILE_BYTES)


def require_own(root: Path, relative: Path | str) -> None:
    """Refuse a file that is not the model's own: a link that leaves the model, a pipe, a device.

    Args:
        root: The checkpoint's directory.
        relative: The file in it, of any name and size.

    Raises:
        InputError: It is not.
    """
    _opened(root, relative, None).close()


def _opened(root: Path, relative: Path | str, most_bytes: int | None = MAX_SIDE_FILE_BYTES) -> IO[bytes]:
    path = root / relative
    with parsing(path):
        place, real = root.resolve(strict=True), path.resolve(strict=True)
        if not (real.is_relative_to(place) or real.is_relative_to(_blobs(place))):
            raise InputError(
                f"{path} is a link out of the model",
                f"it leads to {real}, and would be copied into what is made here",
                "put the file there that it should be, or remove it",
            )
        file = open_regular(real)
        size_bytes = os.fstat(file.fileno()).st_size
    if most_bytes is not None and size_bytes > most_bytes:
        file.close()
        raise InputError(
            f"{path} is too large to be what it is called",
            f"it has {size_bytes} bytes, expected at most {most_bytes}",
            "do not trust this model",
        )
    return file


def _blobs(place: Path) -> Path:
    """The directory of a snapshot's files in the Hub's cache; the directory itself where it is no snapshot."""
    blobs = place.parent.parent / "blobs"
    return blobs if place.parent.name == "snapshots" and not blobs.is_symlink() else place
