"""Headers of weight files: the place of every tensor, found without reading a single weight.

Every format ends in the same table of `Entry`, so that everything after this module reads with plain `pread`.
"""

from pathlib import Path, PurePosixPath

from detune.checkpoints.entries import Header
from detune.checkpoints.gguf_header import GGUF_SUFFIX, read_gguf
from detune.checkpoints.safetensors_file import read_safetensors
from detune.checkpoints.torch_archive import read_torch_archive
from detune.errors import parsing
from detune.files import open_regular

__all__ = ["PICKLE_SUFFIXES", "read_header", "safetensors_name"]

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


def read_header(path: Path) -> Header:
    """Read the header of a weight file.

    Args:
        path: A `.safetensors` or `.gguf` file, or a `torch.save` archive with one of `PICKLE_SUFFIXES`.

    Returns:
        The table of tensors.

    Raises:
        InputError: The file cannot be read, is damaged, or holds something other than plain tensors.
    """
    with parsing(path), open_regular(path) as file:
        if path.suffix == GGUF_SUFFIX:
            return read_gguf(path, file)
        return read_torch_archive(path, file) if path.suffix in PICKLE_SUFFIXES else read_safetensors(path, file)


def safetensors_name(file: str) -> str:
    """Name a weight file or index as safetensors would.

    Args:
        file: A path such as `unet/pytorch_model-00001-of-00002.bin` or `pytorch_model.bin.index.json`.

    Returns:
        The path with the name Hugging Face libraries look for, here `unet/model-00001-of-00002.safetensors`.
    """
    path = PurePosixPath(file)
    name = path.name
    if name.endswith(".json"):
        name = name.replace(".bin.index.", ".safetensors.index.")
    elif path.suffix in (GGUF_SUFFIX, *PICKLE_SUFFIXES):
        name = path.stem + ".safetensors"
    if name != path.name and name.startswith("pytorch_model"):
        name = name.removeprefix("pytorch_")
    return str(path.with_name(name))
