"""The weights among all that a training run saves: `state_dict` beside epochs, schedules and an optimizer."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from detune.checkpoints.pickles import Foreign, StoredTensor
from detune.errors import InputError

__all__ = ["state_dict", "tensors_in"]

# Keys of the model's weights: Lightning's and timm's; Keras-like loops'; others'.
NAMES = ("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "weights", "params")
# Tables of these names hold tensors that are no weights.
OTHERS = ("optim", "sched", "scaler", "callback", "loop", "rng", "random", "hyper", "args", "config")
# Tables are looked into down to this depth.
DEPTH = 3
# Names that a pickle may have, as `torch.load(weights_only=True)` allows them: data, for which no code is run.
PLAIN = ("set", "frozenset")


def state_dict(path: Path, saved: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Find the table of the model's tensors.

    Args:
        path: The file, for messages.
        saved: What it holds.

    Returns:
        The table: `saved` itself, where that has tensors, or the one table in it that has nothing else.

    Raises:
        InputError: There are several, or an object that is no plain data.
    """
    if not saved or any(isinstance(value, StoredTensor) for value in saved.values()):
        return saved
    tables = dict(_tables(saved, "", DEPTH))
    if not tables:
        return saved
    foreign = next((each for each in _walk(saved) if isinstance(each, Foreign) and each.what not in PLAIN), None)
    if foreign is not None:
        raise InputError(
            f"{path} holds something other than plain data, and detune never runs code from a pickle",
            f"besides tensors there is {foreign.what}",
            "save the state dict alone, or convert it to safetensors with a tool you trust",
        )
    named = [key for name in NAMES for key in tables if key.rpartition(".")[2] == name]
    if len(tables) > 1 and not named:
        raise InputError(
            f"{path} holds {len(tables)} tables of tensors",
            f"they are {', '.join(repr(key) for key in list(tables)[:4])}",
            f"save the model's alone, or as one of {', '.join(map(repr, NAMES[:3]))}",
        )
    return tables[named[0] if named else next(iter(tables))]


def tensors_in(saved: Any) -> Iterator[StoredTensor]:
    """Every tensor in tables, lists and tuples, however deep."""
    return (each for each in _walk(saved) if isinstance(each, StoredTensor))


def _tables(saved: Mapping[Any, Any], prefix: str, depth: int) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Tables of nothing but tensors, by the names that lead to them."""
    for key, value in saved.items():
        if not isinstance(key, str) or not isinstance(value, dict) or any(part in key.lower() for part in OTHERS):
            continue
        if value and all(isinstance(k, str) and isinstance(v, StoredTensor) for k, v in value.items()):
            yield prefix + key, value
        elif depth > 1:
            yield from _tables(value, f"{prefix}{key}.", depth - 1)


def _walk(saved: Any) -> Iterator[Any]:
    seen: set[int] = set()
    waiting = [saved]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict | list | tuple):
            if id(value) in seen:
                continue
            seen.add(id(value))
            waiting.extend((*value.keys(), *value.values()) if isinstance(value, dict) else value)
        else:
            yield value
