"""The parts of a transformer layer that have a hidden basis of their own, which nobody outside can see.

| part | its inside | what may be done to it, with the inverse on its other side |
| --- | --- | --- |
| `FeedForward` | neurons | any order; with a gate, any scale between up and down |
| `Attention` | heads | any order; with grouped keys, of the groups and within each |
| | keys of a head | any invertible matrix; with rotary positions, one complex number for each frequency |
| | values of a head | any invertible matrix |
| `NormInto` | channels | any scale, if nothing else reads the norm's output |
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from detune.errors import InputError

__all__ = ["Attention", "Describe", "FeedForward", "Layer", "NormInto", "prefixes", "width_of"]


@dataclass(frozen=True)
class Attention:
    """Multi-head attention; modules are told by their names, `.weight` and `.bias` left off.

    Attributes:
        query: Projection with rows `(heads, width)`.
        key: With rows `(groups, width)`.
        value: The same.
        output: With columns `(heads, width)`.
        heads: Query heads.
        groups: Heads of keys and values; each serves `heads / groups` query heads that follow one another.
        width: Width of a head.
        rotary: Whether queries and keys are turned by their position, channel i with channel `i + width / 2`.
    """

    query: str
    key: str
    value: str
    output: str
    heads: int
    groups: int
    width: int
    rotary: bool = False


@dataclass(frozen=True)
class FeedForward:
    """Two layers with an activation between them.

    Attributes:
        up: Projection with neurons as rows.
        down: With neurons as columns.
        width: Number of neurons.
        gate: What goes through the activation and then multiplies `up`, neurons as rows; None where `up` does itself.
    """

    up: str
    down: str
    width: int
    gate: str | None = None


@dataclass(frozen=True)
class NormInto:
    """A norm whose output goes into linear layers and nowhere else.

    Attributes:
        norm: It has a weight, and may have a bias.
        readers: The linear layers.
        channels: Their columns.
    """

    norm: str
    readers: tuple[str, ...]
    channels: int


@dataclass(frozen=True)
class Layer:
    """One layer of a transformer.

    Attributes:
        name: Its prefix, `encoder.layer.0`.
        attention: Its heads.
        feed_forward: Its neurons.
        norms: Its norms that can be rescaled.
    """

    name: str
    attention: Attention
    feed_forward: FeedForward
    norms: tuple[NormInto, ...] = ()

    def check(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Hold the tensors against what the config says.

        Raises:
            InputError: One is missing, or has another shape.
        """
        heads, neurons = self.attention, self.feed_forward
        rows = {
            heads.query: heads.heads * heads.width,
            heads.key: heads.groups * heads.width,
            heads.value: heads.groups * heads.width,
            neurons.up: neurons.width,
        }
        if neurons.gate is not None:
            rows[neurons.gate] = neurons.width
        columns = {heads.output: heads.heads * heads.width, neurons.down: neurons.width}
        columns |= {reader: part.channels for part in self.norms for reader in part.readers}
        for dim, sizes in ((0, rows), (1, columns)):
            for module, size in sizes.items():
                shape = shapes.get(f"{module}.weight")
                if shape is None or len(shape) != 2 or shape[dim] != size:
                    found = "it is missing" if shape is None else f"it has shape {list(shape)}"
                    raise InputError(
                        f"tensor {module}.weight does not fit the config",
                        f"{found}, expected {size} {('rows', 'columns')[dim]}",
                        "give a whole checkpoint with its own config.json",
                    )


Describe = Callable[[Mapping[str, Any], Mapping[str, Sequence[int]]], tuple[Layer, ...]]
"""The layers of an architecture: from a config and the shapes of the tensors to the layers."""


def prefixes(names: Iterable[str], stem: str, end: str) -> tuple[str, ...]:
    """Prefixes of the layers' names, in order of their numbers.

    Args:
        names: Names of all tensors.
        stem: The list of layers: `encoder.layer`; anything may stand before it.
        end: A tensor that each layer has: `intermediate.dense.weight`.

    Returns:
        `bert.encoder.layer.0`, and so on.

    Raises:
        InputError: There are none, or they are several models'.

    Example:
        >>> prefixes(["bert.encoder.layer.0.x.weight", "bert.pooler.weight"], "encoder.layer", "x.weight")
        ('bert.encoder.layer.0',)
    """
    found: dict[str, dict[int, str]] = {}
    for name in names:
        layer = name.removesuffix(f".{end}")
        stack, _, number = layer.rpartition(".")
        if layer != name and number.isdecimal() and f".{stack}".endswith(f".{stem}"):
            found.setdefault(stack, {})[int(number)] = layer
    if len(found) != 1:
        raise InputError(
            f"{len(found)} lists of layers {stem!r} in this checkpoint",
            f"expected one, with {stem}.0.{end}" if not found else f"got {', '.join(found)}, expected one",
            "give the checkpoint of one model",
        )
    (layers,) = found.values()
    return tuple(layers[number] for number in sorted(layers))


def width_of(config: Mapping[str, Any], *names: str) -> int:
    """A positive number of a config.

    Args:
        config: As read.
        names: Where it may stand; the first that does counts.

    Raises:
        InputError: None does, or it is no positive number.
    """
    value = next((config[name] for name in names if config.get(name) is not None), None)
    if type(value) is not int or value < 1:
        raise InputError(
            f"config.json has no usable {names[0]!r}", f"got {value!r}, expected a positive number", "copy it again"
        )
    return value
