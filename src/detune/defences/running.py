"""Running a checkpoint: in the class that its configuration names, on a text file or on fixed random inputs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detune._runtime import needs_extra, quiet
from detune.checkpoints import load_pretrained, model_class_of
from detune.errors import DetuneError, InputError, reason_of

__all__ = ["input_moments", "load_model", "outputs", "probe"]

_BATCH = 8
_LENGTH_TOKENS = 64


def load_model(directory: Path, dtype: torch.dtype) -> Any:
    """Load a model for inference, with all of its weights.

    Args:
        directory: In Hugging Face layout.
        dtype: What to compute in.

    Raises:
        InputError: transformers does not know the model, or weights are missing.
        DetuneError: transformers is not installed.
    """
    with needs_extra("demo"):
        import transformers

    try:
        with quiet():
            model_class = model_class_of(load_pretrained(transformers.AutoConfig, directory))
            model, about = load_pretrained(model_class, directory, dtype=dtype, output_loading_info=True)
    except DetuneError:
        raise
    except Exception as error:  # whatever a configuration makes a library raise
        raise InputError(
            f"the model in {directory} cannot be run",
            f"got: {type(error).__name__}: {reason_of(error)}",
            "give a directory that transformers can load",
        ) from error
    if about["missing_keys"]:
        raise InputError(
            f"the model in {directory} cannot be run",
            f"weights are missing, {min(about['missing_keys'])} the first",
            "copy it again",
        )
    return model.to(dtype).eval()


def probe(model: Any, seed: int = 0) -> dict[str, Tensor]:
    """Fixed random inputs: token ids, or pixels.

    Args:
        model: Model of transformers.
        seed: Seed of the inputs.

    Raises:
        InputError: The configuration speaks of neither.
    """
    config, generator = model.config, torch.Generator().manual_seed(seed)
    if getattr(config, "vocab_size", None):
        ids = torch.randint(config.vocab_size, (4, 16), generator=generator)
        return {"input_ids": ids} | ({"decoder_input_ids": ids.flip(0)} if config.is_encoder_decoder else {})
    size = getattr(config, "image_size", None)
    if size:
        height, width = (size, size) if isinstance(size, int) else size
        pixels = torch.randn(2, config.num_channels, height, width, generator=generator, dtype=torch.float64)
        return {"pixel_values": pixels.to(model.dtype)}
    raise InputError(
        f"no inputs for a model of type {config.model_type!r}",
        "expected vocab_size or image_size in its config.json",
        "defend models of text or of images",
    )


@torch.no_grad()
def outputs(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """All that a model puts out, in one vector."""
    found = [value.flatten() for value in model(**inputs).values() if isinstance(value, Tensor)]
    return torch.cat(found)


@torch.no_grad()
def input_moments(directory: Path, texts: Path) -> dict[str, Tensor]:
    """Second moments of what each linear layer is given: `C = mean_t x_t x_t^T` over the tokens of a text file.

    Args:
        directory: A model of text with its tokenizer.
        texts: A file with a text on each line.

    Returns:
        By the module's name in memory: `(in, in)`, float64.

    Raises:
        InputError: The model, its tokenizer or the texts cannot be read.
    """
    lines = _lines(texts)
    with needs_extra("demo"):
        from transformers import AutoTokenizer
        from transformers.pytorch_utils import Conv1D

    model = load_model(directory, torch.float32)
    try:
        with quiet():
            tokenizer = load_pretrained(AutoTokenizer, directory)
    except DetuneError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {reason_of(error)}"
        raise InputError(f"no tokenizer in {directory}", reason, "copy it beside the weights") from error
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    mask = torch.empty(0)

    def watch(name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            # Padding is no input; a pooler sees one token of each text.
            x = x[mask] if x.shape[:2] == mask.shape else x.flatten(0, -2)
            sums[name] = sums.get(name, torch.zeros(())) + (x.mT @ x).double()
            counts[name] = counts.get(name, 0) + len(x)

        return hook

    hooks = [
        module.register_forward_pre_hook(watch(name))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
    ]
    for start in range(0, len(lines), _BATCH):
        tokens = tokenizer(
            lines[start : start + _BATCH], padding=True, truncation=True, max_length=_LENGTH_TOKENS, return_tensors="pt"
        )
        mask = tokens["attention_mask"].bool()
        model(**tokens)
    for hook in hooks:
        hook.remove()
    return {name: sums[name] / counts[name] for name in sums}


def _lines(texts: Path) -> list[str]:
    try:
        lines = [line.strip() for line in texts.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{texts} cannot be read", str(error), "give a file with a text on each line") from error
    if not lines:
        raise InputError(f"{texts} has no text", "expected one on each line", "give some texts like the model's own")
    return lines
