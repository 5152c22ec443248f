"""Checkpoints with the rows of a subset merged in: the base with other weights in their places."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from detune._runtime import OnPart, OnStart, telling
from detune.bench.layers import Layer
from detune.bench.subsets import Subset, clean_name
from detune.checkpoints import Checkpoint, CheckpointWriter, folded, open_checkpoint
from detune.errors import InputError

__all__ = ["merge_subset", "tensor_name", "write_with"]


def tensor_name(layer: Layer, base: Checkpoint) -> str:
    """The tensor of the base that a row is about.

    Raises:
        InputError: The base has no such tensor, or of another size.
    """
    inside = f"{layer.model}/{layer.name}"
    for name in (inside, f"{inside}.weight", layer.name, f"{layer.name}.weight"):
        info = base.tensors.get(name)
        if info is not None:
            if tuple(info.shape[:1]) == tuple(layer.weight.shape[:1]) and layer.weight.numel() == math.prod(info.shape):
                return name
            raise InputError(
                f"row {layer.index}, layer {layer.name!r}, has shape {list(layer.weight.shape)}",
                f"tensor {name!r} of {base.spec} has {list(info.shape)}",
                "give the base that the rows were made from",
            )
    raise InputError(
        f"row {layer.index}, layer {layer.name!r}, is not in {base.spec}",
        f"expected a tensor {layer.name!r} or {inside!r}",
        "give the base that the rows were made from",
    )


def write_with(base: Checkpoint, weights: Mapping[str, Callable[[], Tensor]], out: Path) -> None:
    """Write a base with some tensors replaced.

    Args:
        base: The checkpoint whose layout, names and dtypes the output has.
        weights: What to read for each tensor that is replaced; of any shape with the tensor's entries.
        out: The directory to make.
    """
    with CheckpointWriter(base, out) as writer:
        for name, info in base.tensors.items():
            if name in weights:
                writer.write(name, weights[name]().reshape(info.shape))
            else:
                writer.copy(name)


def merge_subset(
    subset: Subset,
    out: Path,
    *,
    base: str | Path | None = None,
    on_start: OnStart | None = None,
    on_part: OnPart | None = None,
) -> list[Path]:
    """Write every fine-tuned model of a subset as a merged checkpoint: what a publisher would have published.

    Each row is read once and written to all of them.

    Args:
        subset: The rows.
        out: A directory; each model gets one below, named after its LoRA. What a name of a file should not hold becomes
            a hyphen, and where two names come out the same, all get a number in front.
        base: The model that the LoRAs were trained on; None takes the one beside the rows.
        on_start: For progress: called once with the base's tensors, and what is written of each in bytes.
        on_part: Called with a tensor's name when it is begun, and when it is done.

    Returns:
        The checkpoints, in the order of the LoRAs.

    Raises:
        InputError: There is no base, the rows do not fit it, or two are about one tensor.
        OutputError: A directory cannot be written.
    """
    where = base or subset.base
    if where is None:
        raise InputError(
            f"{subset.source} has no base beside its rows",
            "a merged model is the base with the rows' weights in it",
            f"give it with --base, {subset.first().base!r} for example",
        )
    first = subset.first()
    paths = [out / name for name in _directory_names([lora.name for lora in first.loras])]
    with ExitStack() as stack:
        checkpoint = stack.enter_context(open_checkpoint(where))
        tensor_name(first, checkpoint)
        writers = [stack.enter_context(CheckpointWriter(checkpoint, path)) for path in paths]
        if on_start:
            on_start({name: len(paths) * info.nbytes for name, info in checkpoint.tensors.items()})
        written: dict[str, int] = {}
        for layer in subset.layers():
            name = tensor_name(layer, checkpoint)
            if name in written:
                raise InputError(
                    f"row {layer.index} of {subset.source}, layer {layer.name!r}, is there twice",
                    f"row {written[name]} is about tensor {name!r} of {checkpoint.spec} too, expected one row each",
                    "remove one of them",
                )
            written[name] = layer.index
            with telling(on_part, name):
                for i, writer in enumerate(writers):
                    writer.write(name, layer.merged(i).reshape(checkpoint.tensors[name].shape))
        for name in checkpoint.tensors:
            if name not in written:
                with telling(on_part, name):
                    for writer in writers:
                        writer.copy(name)
    return paths


def _directory_names(loras: Sequence[str]) -> list[str]:
    """A directory for each LoRA: names that stay below their parent and differ even where case does not count."""
    names = [clean_name(lora.replace("/", "--")) for lora in loras]
    if len(set(map(folded, names))) < len(names):
        names = [f"{i:02}-{name}" for i, name in enumerate(names)]
    return names
