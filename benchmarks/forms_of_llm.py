"""Sets of a language model's matrices in GGUF's K quants, and in mixed dtypes, for `forms.py`.

SmolLM2-135M's: K quants have 256 weights in a superblock, and MiniLM's matrices have 384 columns. `llm_models.py`
trains the adapters, which takes some minutes, and keeps them in `benchmarks/.cache/llm`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import gguf
import llm_models
import torch
from k_quants import quantize
from llm_models import DTYPES, STRENGTHS
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]
Make = Callable[[Path], list[Path]]
# Matrices with 1536 columns, and those of attention; all adapters named change them.
WIDE = tuple(f"model.layers.{k}.mlp.down_proj.weight" for k in (3, 9, 15, 21))
ATTENTION = tuple(f"model.layers.{k}.self_attn.{kind}_proj.weight" for k in (8, 25) for kind in "qkvo")
OF_WIDE, OF_ATTENTION = ("B", "C", "E"), ("A", "B", "C")


@dataclass(frozen=True)
class Form:
    """A form.

    Attributes:
        make: Writes the models below a directory.
        reference: The form that it is held against.
        names: The matrices.
        is_lossy: Whether quantisation takes what no average brings back.
    """

    make: Make
    reference: str
    names: tuple[str, ...]
    is_lossy: bool = False

    def truth(self) -> State:
        """The base's matrices."""
        return {name: changes()[name].W for name in self.names}


@cache
def changes() -> dict[str, llm_models.Change]:
    """The matrices with the deltas of all adapters that are used."""
    found = llm_models.changes(sorted({*OF_WIDE, *OF_ATTENTION}))
    return {name: found[name] for name in (*WIDE, *ATTENTION)}


def merges(strength: str, names: tuple[str, ...], adapter: str, dtype: torch.dtype) -> State:
    """One model's matrices, merged in a dtype."""
    return {
        name: (changes()[name].W.double() + STRENGTHS[strength] * changes()[name].deltas[adapter]).to(dtype)
        for name in names
    }


def mixed(strength: str, *dtypes: str) -> Make:
    """A file for each model, in its dtype."""

    def make(folder: Path) -> list[Path]:
        folder.mkdir(parents=True)
        paths = [folder / f"{adapter}.safetensors" for adapter in OF_ATTENTION]
        for path, adapter, dtype in zip(paths, OF_ATTENTION, dtypes, strict=True):
            save_file(merges(strength, ATTENTION, adapter, DTYPES[dtype]), path)
        return paths

    return make


def quantised(kind: str) -> Make:
    """A GGUF file for each model."""

    def make(folder: Path) -> list[Path]:
        folder.mkdir(parents=True)
        own = gguf.GGMLQuantizationType[kind]
        paths = [folder / f"{adapter}.gguf" for adapter in OF_WIDE]
        for path, adapter in zip(paths, OF_WIDE, strict=True):
            writer = gguf.GGUFWriter(path, "other")
            for name, matrix in merges("heavy", WIDE, adapter, torch.float32).items():
                writer.add_tensor(name, quantize(matrix.numpy(), own), raw_dtype=own)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        return paths

    return make


ORDINARY, LIGHT, F32 = "ordinary, three in bf16", "light, three in bf16", "heavy, GGUF F32"
KINDS = ("Q6_K", "Q5_K", "Q4_K")
FORMS = {
    ORDINARY: Form(mixed("ordinary", "bf16", "bf16", "bf16"), ORDINARY, ATTENTION),
    "ordinary, bf16 fp16 float32": Form(mixed("ordinary", "bf16", "fp16", "float32"), ORDINARY, ATTENTION),
    LIGHT: Form(mixed("light", "bf16", "bf16", "bf16"), LIGHT, ATTENTION),
    "light, bf16 bf16 float32": Form(mixed("light", "bf16", "bf16", "float32"), LIGHT, ATTENTION),
    "light, bf16 fp16 float32": Form(mixed("light", "bf16", "fp16", "float32"), LIGHT, ATTENTION),
    "light, float32 bf16 float32": Form(mixed("light", "float32", "bf16", "float32"), LIGHT, ATTENTION),
    F32: Form(quantised("F32"), F32, WIDE),
    **{f"heavy, GGUF {kind}": Form(quantised(kind), F32, WIDE, is_lossy=True) for kind in KINDS},
}
