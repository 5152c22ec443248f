"""Defending a checkpoint: tensor by tensor into a new directory, and a look at whether the model does the same."""

import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from detune._runtime import OnStart
from detune.checkpoints import (
    Checkpoint,
    CheckpointWriter,
    new_directory,
    open_checkpoint,
    require_outside,
    resolved,
)
from detune.defences.base import Defence
from detune.defences.running import load_model, outputs, probe
from detune.documents import document, to_json
from detune.errors import OutputError
from detune.numerics.float_grid import spacing

__all__ = ["Defended", "Preservation", "defend"]

# A transform rounds every weight once, and rounding errors of one transform add up a little otherwise than of another.
TOLERANCE = 8.0
# Rounding of a computation in float64, as a share of the outputs.
COMPUTED = 1e-10


@dataclass(frozen=True)
class Preservation:
    """The outputs of a defended model against those of its original, on fixed random inputs in float64.

    Attributes:
        largest_difference: Largest difference of any output.
        largest_output: Largest output of the original.
        rounding_difference: What rounding every weight of the original once more would change: the yardstick.
    """

    largest_difference: float
    largest_output: float
    rounding_difference: float

    @property
    def preserved(self) -> bool:
        """Whether the difference is no more than rounding explains."""
        allowed = TOLERANCE * self.rounding_difference + COMPUTED * self.largest_output
        return self.largest_difference <= allowed


@dataclass(frozen=True)
class Defended:
    """A record of what was done to a model, for its owner: nothing of it is in the directory that is released.

    Attributes:
        defence: Its name.
        settings: Its hyperparameters.
        model: The model, as it was given.
        out: Where the defended one is.
        seed: What was drawn from; who knows it can undo what can be undone.
        tensors: Number of tensors.
        changed: Number of those that were changed.
        relative_change: Root mean square of the change over that of the weights, in the tensors that were changed.
        copied: Files of the model that are in `out` as they are.
        preservation: For a defence that preserves the function: the proof.
    """

    defence: str
    settings: dict[str, Any]
    model: str
    out: str
    seed: int
    tensors: int
    changed: int
    relative_change: float
    copied: tuple[str, ...]
    preservation: Preservation | None

    def to_json(self) -> str:
        """All of it as JSON."""
        return to_json(document("detune-defend/1", asdict(self)))


def defend(
    defence: Defence,
    model: str | Path,
    out: str | Path,
    seed: int | None = None,
    *,
    verify: bool = True,
    on_start: OnStart | None = None,
    on_tensor: Callable[[str, bool | None], None] | None = None,
) -> Defended:
    """Write a defended copy of a model.

    The copy has the model's files, names, dtypes, config and tokenizer, and nothing else: not the seed, not the
    defence's name. Where the defence is to preserve the function, both models are run on fixed random inputs, and a
    copy that does not do the same is not kept.

    Args:
        defence: With its settings.
        model: As `detune.checkpoints.open_checkpoint` takes it.
        out: The directory to make.
        seed: For all that is drawn; None draws one that nobody can guess.
        verify: False takes the defence's word for what it preserves.
        on_start: For progress: called once with the tensors, and what is read of each in bytes.
        on_tensor: Called with a tensor's name and None when it is begun, and with whether it changed when it is done.

    Returns:
        What was done, with the seed.

    Raises:
        InputError: No such model, or one that the defence does not know or that cannot be run.
        OutputError: `out` exists or lies inside the model, or the function was not preserved.

    Example:
        >>> defend(Noise(size=0.01), "fine-tune", "release").changed  # doctest: +SKIP
        36
    """
    seed = secrets.randbits(63) if seed is None else seed
    target = resolved(out)
    with open_checkpoint(model) as checkpoint:
        require_outside(target, checkpoint.places)
        with new_directory(target) as partial:
            change = defence.prepare(checkpoint, seed)
            changed, moved, size = 0, 0.0, 0.0
            if on_start:
                on_start({name: checkpoint.shown_bytes(name) for name in checkpoint.tensors})
            with CheckpointWriter(checkpoint, partial) as writer:
                for name in checkpoint.tensors:
                    if on_tensor:
                        on_tensor(name, None)
                    tensor = checkpoint.read(name)
                    defended = change(name, tensor)
                    writer.write(name, defended)
                    differs = not torch.equal(defended, tensor)
                    if on_tensor:
                        on_tensor(name, differs)
                    if differs:
                        changed += 1
                        moved += float((defended.double() - tensor.double()).square().sum())
                        size += float(tensor.double().square().sum())
            copied = writer.side_files
            preservation = None
            if defence.preserves_function and verify:
                preservation = _compare(checkpoint, partial)
                _require(preservation, defence.name)
        return Defended(
            defence.name,
            {field.name: getattr(defence, field.name) for field in fields(defence)},  # type: ignore[arg-type]
            checkpoint.spec,
            str(target),
            seed,
            len(checkpoint.tensors),
            changed,
            (moved / size) ** 0.5 if size else 0.0,
            copied,
            preservation,
        )


def _compare(original: Checkpoint, defended: Path) -> Preservation:
    model = load_model(original.root, torch.float64)
    inputs = probe(model)
    expected = outputs(model, inputs)
    _round(model, original)
    rounded = outputs(model, inputs)
    del model
    found = outputs(load_model(defended, torch.float64), inputs)
    return Preservation(
        float((found - expected).abs().max()), float(expected.abs().max()), float((rounded - expected).abs().max())
    )


@torch.no_grad()
def _round(model: torch.nn.Module, original: Checkpoint) -> None:
    """Move every weight of a float64 model within half a step of the dtype that it is stored in."""
    coarsest = max((i.dtype for i in original.tensors.values() if i.dtype.is_floating_point), key=_coarseness)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        drawn = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) - 0.5
        parameter.add_(drawn * spacing(parameter, coarsest))


def _coarseness(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _require(preservation: Preservation, name: str) -> None:
    if not preservation.preserved:
        raise OutputError(
            f"{name} changed what the model does, and its output was not kept",
            f"outputs differ by {preservation.largest_difference:.2g} of up to {preservation.largest_output:.2g}, "
            f"expected no more than rounding does, {preservation.rounding_difference:.2g}",
            "report this with the model's config.json",
        )
