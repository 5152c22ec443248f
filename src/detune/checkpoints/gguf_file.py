"""GGUF files, as llama.cpp writes them, through the package `gguf`.

A file is a table of settings, a table of tensors, and their data. F32, F16 and BF16 are read where they lie. Quantised
tensors are rows of blocks, each with its scales and small integers; they are dequantised row by row when they are read.
The names are llama.cpp's own, `blk.0.attn_q.weight`, and some tensors have their rows in another order. Where
transformers knows the architecture, both are turned back, and the configuration is made from the settings.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from detune._runtime import quiet
from detune.checkpoints.pretrained import load_pretrained, require_reasonable
from detune.checkpoints.quantised import Coding, Decoded
from detune.checkpoints.source import Checkpoint
from detune.errors import InputError

__all__ = ["with_gguf_names"]

logger = logging.getLogger(__name__)

# Neighbours that have one scale, in the formats with blocks of 256 in which that is not 32.
_GROUPS = {"Q2_K": 16, "Q3_K": 16, "Q6_K": 16}
# Bytes of a block of 32, in the formats that begin with the distance of its levels, fp16.
_SCALED = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24}
# Bytes of a block of 256, in the formats whose levels are even, with a scale for each 32 or 16 (`_k_steps`).
_K_SCALED = {"Q4_K": 144, "Q5_K": 176, "Q6_K": 210}
# Architectures whose tensors transformers stores as llama.cpp does, but for the order of rows.
_ARCHITECTURES = ("llama", "qwen2", "qwen3", "falcon", "phi3", "stablelm", "starcoder2")


@dataclass(frozen=True)
class Blocks:
    """A tensor that is stored as rows of blocks.

    Attributes:
        weight: Its name in the file.
        shape: Shape of the tensor.
        encoding: The format of the blocks, as `gguf` names it.
    """

    weight: str
    shape: tuple[int, ...]
    encoding: str

    @property
    def about(self) -> str:
        """See `Coding`."""
        return f"GGUF {self.encoding}"

    def decode(self, stored: Checkpoint, rows: slice) -> Tensor:
        """See `Coding.decode`."""
        from gguf import GGMLQuantizationType, dequantize

        packed = stored.read_rows(self.weight, [rows])
        # A damaged scale may be infinite: what comes of it is told where weights are looked at.
        with np.errstate(all="ignore"):
            return torch.from_numpy(dequantize(packed.numpy(), GGMLQuantizationType[self.encoding]))

    def steps(self, stored: Checkpoint, rows: slice) -> Tensor:
        """See `Coding.steps`: the scale that is stored, where levels are even.

        Elsewhere it is what lies closest among the entries of one scale, which are many beside its levels.
        """
        if self.encoding in _K_SCALED:
            packed = stored.read_rows(self.weight, [rows])
            return _k_steps(packed.view(-1, _K_SCALED[self.encoding]), self.encoding).view(len(packed), -1)
        if self.encoding in _SCALED:
            packed = stored.read_rows(self.weight, [rows])
            blocks = packed.view(len(packed), -1, _SCALED[self.encoding])
            scales = blocks[..., :2].contiguous().view(torch.float16).float().abs()
            return scales.expand(-1, -1, 32).reshape(len(packed), -1)
        values = self.decode(stored, rows)
        groups = values.reshape(-1, _GROUPS.get(self.encoding, 32))
        gaps = groups.sort(dim=1).values.diff(dim=1)
        # Levels are apart by far more than the rounding of float32.
        least = groups.abs().amax(dim=1, keepdim=True) * 1e-5
        closest = torch.where(gaps > least, gaps, torch.inf).amin(dim=1, keepdim=True)
        steps = torch.where(closest.isfinite(), closest, 0.0)
        return steps.expand_as(groups).reshape(values.shape)


def _k_steps(blocks: Tensor, encoding: str) -> Tensor:
    """The distances of levels in K quants, `d s`, for each weight of blocks.

    Args:
        blocks: `(blocks, bytes)`, uint8.
        encoding: Q4_K and Q5_K, with eight scales of 6 bits in the twelve bytes after `d` and `d_min`; or Q6_K, with
            sixteen of 8 bits before `d`, which comes last.
    """
    if encoding == "Q6_K":
        scales, d = blocks[:, 192:208].contiguous().view(torch.int8), blocks[:, 208:]
    else:
        first, last = blocks[:, 4:8], blocks[:, 12:16]
        scales, d = torch.cat([first & 63, (last & 15) | (first >> 6 << 4)], dim=1), blocks[:, :2]
    steps = d.contiguous().view(torch.float16).float() * scales.float()
    return steps.abs().repeat_interleave(256 // scales.shape[1], dim=1)


def with_gguf_names(model: Checkpoint) -> Checkpoint:
    """A GGUF file with its quantised tensors dequantised, under the names that transformers has for them.

    Args:
        model: The file's tensors, as stored.

    Returns:
        The model. Its names stay llama.cpp's where transformers is absent or does not know the architecture.
    """
    codings: dict[str, Coding] = {}
    for name, info in model.tensors.items():
        encoding = model.encoding(name)
        if encoding:
            codings[name] = Blocks(name, _shape(info.shape, encoding), encoding)
    file = model.weight_files[0]
    architecture = file.metadata.get("architecture", "")
    known = _known(model.root, file.file, file.metadata) if architecture in _ARCHITECTURES else None
    if known is None or not set(known.names) >= {name for name in model.tensors if name not in _UNNAMED}:
        logger.debug("%s keeps llama.cpp's names: architecture %r", model.spec, architecture)
        return Decoded(model, codings)
    heads = {name: known.heads[kind] for name in model.tensors for kind in known.heads if f".{kind}." in name}
    for name, count in heads.items():
        rows = codings[name].shape[0] if name in codings else model.tensors[name].shape[0]
        if not count or rows % (2 * count):
            raise InputError(
                f"tensor {name!r} of {model.spec} has {rows} rows",
                f"its settings speak of {count} heads, of an even number of rows each",
                "download or copy the file again",
            )
    names = {own: name for own, name in known.names.items() if own in model.tensors}
    return Decoded(model, codings, _UNNAMED, names, heads, {"config.json": known.config})


# Tensors of the file that are no weights of the model.
_UNNAMED = frozenset({"rope_freqs.weight"})


@dataclass(frozen=True)
class _Known:
    """The configuration that transformers reads from a file.

    Attributes:
        names: Its name for each tensor of llama.cpp.
        heads: Kinds of tensors whose rows llama.cpp has in another order, and how many heads they are of.
        config: The `config.json`.
    """

    names: Mapping[str, str]
    heads: Mapping[str, int]
    config: bytes


def _known(root: Path, file: str, metadata: Mapping[str, str]) -> _Known | None:
    # Neither the maps nor the parser of settings are stable interfaces: whatever goes wrong, names stay as they are.
    try:
        import transformers
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        with quiet(), torch.device("meta"):
            config = load_pretrained(transformers.AutoConfig, root, gguf_file=file)
            require_reasonable(config.to_dict(), root / file)
            model = transformers.AutoModelForCausalLM.from_config(config)
        (kind,) = (kind for kind, name in MODEL_ARCH_NAMES.items() if name == metadata["architecture"])
        known = get_tensor_name_map(kind, config.num_hidden_layers)
        own_names = {name: known.get_name(name, (".weight", ".bias")) for name in model.state_dict()}
        names = {own: name for name, own in own_names.items() if own is not None}
        config.architectures = [type(model).__name__]
        counts = (config.num_attention_heads, config.num_key_value_heads) if metadata["architecture"] == "llama" else ()
        told = metadata.get("heads")
        if counts and str(counts[0]) != told:
            # A setting that is not there has a default in transformers, by which rows would change places.
            raise ValueError(f"{told or 'no'} heads in the file, {counts[0]} in its configuration")
        heads = dict(zip(("attn_q", "attn_k"), counts, strict=False))
        return _Known(names, heads, config.to_json_string(use_diff=True).encode())
    except Exception as error:
        logger.debug("transformers does not know %s: %s", root / file, error)
        return None


def _shape(packed: tuple[int, ...], encoding: str) -> tuple[int, ...]:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[encoding]]
    return (*packed[:-1], packed[-1] // nbytes * block)
