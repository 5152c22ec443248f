"""A description of one model by its headers alone: format, dtypes, quantisation, adapters inside, missing tensors."""

import math
from collections import Counter

from detune.checkpoints import Checkpoint, Unmerged, raw
from detune.checkpoints.formats import SAFETENSORS, format_of
from detune.compatibility.common_tensors import is_stack
from detune.numerics.float_grid import name_of


def describe(model: Checkpoint) -> tuple[str, ...]:
    """Say what a model is, a sentence each.

    Args:
        model: An opened checkpoint.

    Returns:
        Format, tensors and dtypes; quantisation; stacks of experts; adapters; what recovering its base needs.
    """
    whole = raw(model)
    tensors = whole.tensors.values()
    formats = {(format_of(file.file) or SAFETENSORS).name for file in whole.weight_files}
    dtypes = Counter(name_of(info.dtype) for info in tensors if not info.quantised)
    codings = Counter(info.quantised for info in tensors if info.quantised)
    entries = sum(math.prod(info.shape) for info in tensors)
    notes = [
        f"{' and '.join(sorted(formats))}, {len(whole.weight_files)} file{'s' * (len(whole.weight_files) > 1)}, "
        f"{len(tensors)} tensors of {entries:,} numbers: {_counted(dtypes + codings)}"
    ]
    if codings:
        notes.append("quantised tensors are read as scale times level, with the noise of levels; the output is bf16")
    stacks = [info.name for info in tensors if is_stack(info.name, info.shape)]
    if stacks:
        count = f"{len(stacks)} stack{'s' * (len(stacks) > 1)} of experts"
        notes.append(f"{count}, first {stacks[0]!r}: each expert is a matrix of its own")
    if isinstance(whole, Unmerged):
        notes += _adapters(whole)
    else:
        notes.append(
            "its base needs two more fine-tunes of it, merged from LoRA; alone, `recover --method lattice` finds one "
            "that is stored more coarsely than the model"
        )
    return tuple(notes)


def _adapters(model: Unmerged) -> list[str]:
    notes = []
    for name, factors in model.adapters.items():
        ranks = {min(model.stored.tensors[own].shape[:2]) for own in factors.values()}
        modules = {module for module, _ in factors}
        notes.append(f"adapter {name!r}: a LoRA of {len(modules)} modules, rank {', '.join(map(str, sorted(ranks)))}")
    if model.others:
        notes.append(f"{len(model.others)} other tensors of adapters, first {model.others[0]!r}")
    notes.append("saved without merging: `recover` gives the base from it alone, exactly, and `extract` the adapter")
    return notes


def _counted(kinds: "Counter[str]") -> str:
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
