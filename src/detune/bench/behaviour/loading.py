"""Loading a model with all its weights, or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from detune.checkpoints import load_pretrained
from detune.errors import DetuneError, InputError, reason_of

__all__ = ["load", "loading"]


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Turn what `from_pretrained` raises into one line.

    Args:
        what: "the tokenizer in base/".

    Raises:
        InputError: The block failed for want of files, for damaged ones, for weights of other shapes, or for whatever a
            configuration makes a library raise.
    """
    try:
        yield
    except DetuneError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {reason_of(error)}"
        raise InputError(f"{what} cannot be loaded", f"got: {reason}", "check its files") from error


def load(model_class: Any, model_dir: Path, dtype: torch.dtype, *, unused: str | None = None) -> Any:
    """Load a model for inference.

    Weights that a checkpoint lacks are drawn at random by transformers, and left to whatever memory holds by diffusers.
    Such a model would be compared in earnest.

    Args:
        model_class: A class of transformers or diffusers with `from_pretrained`.
        model_dir: The model, in Hugging Face layout.
        dtype: What to compute in.
        unused: Part of the names of weights that may be missing, because what they do is not looked at.

    Returns:
        The model, in evaluation mode.

    Raises:
        InputError: The model cannot be loaded, or weights are missing.
    """
    with loading(f"the model in {model_dir}"):
        model, about = load_pretrained(model_class, model_dir, dtype=dtype, output_loading_info=True)
    missing = sorted(name for name in about["missing_keys"] if unused is None or unused not in name)
    if missing:
        raise InputError(
            f"the model in {model_dir} is not complete",
            f"{len(missing)} weights are missing, {missing[0]} the first",
            "copy or recover it again",
        )
    return model.to(dtype).eval()
