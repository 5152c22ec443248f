"""A LoRA against its base model: which tensor each layer changes, and by which factors.

The published adapters of a benchmark are more than their merges: the factors say what was added, at which
rank, and let one base be merged anew in any precision.
"""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from detune.checkpoints.aliases import names_in_memory
from detune.checkpoints.hub import locate
from detune.checkpoints.layout import pick_weights
from detune.checkpoints.lora_formats import AdapterTable, Factors, read_table
from detune.checkpoints.source import Checkpoint
from detune.checkpoints.storage import LocalFiles
from detune.errors import InputError, parsing

__all__ = ["FLOATS", "Lora", "LoraLayer", "PlacedFactors", "open_lora"]

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""The dtypes in which a weight can be added to; others are quantised."""

_ADAPTER_FILES = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
)


@dataclass(frozen=True)
class LoraLayer:
    """The change of one tensor by one LoRA: `W + alpha / rank * B @ A`.

    Kernels are flattened behind their first dimension: `B.flatten(1) @ A.flatten(1)` has the entries of W.

    Attributes:
        name: Qualified name of the tensor in the base, `unet/conv_in.weight`.
        A: Shape (r, in) or (r, in, *kernel), float32.
        B: Shape (out, r) or (out, r, 1, ...), float32.
        rank: r.
        alpha: The numerator; that of a rank-stabilised LoRA times sqrt(r), so that the formula holds.
    """

    name: str
    A: Tensor
    B: Tensor
    rank: int
    alpha: float


@dataclass(frozen=True)
class PlacedFactors:
    """The factors of one layer, still in their file, and the tensor they change.

    Attributes:
        name: Qualified name of the tensor in the base.
        factors: What the adapter says.
        transposed: Whether the tensor is (in, out), so that it is the transpose of B @ A that is added.
    """

    name: str
    factors: Factors
    transposed: bool


@dataclass(frozen=True)
class Lora:
    """A LoRA on disk, placed in its base and read lazily. Made by `open_lora`.

    Attributes:
        spec: The adapter as the user typed it.
        name: The name of its directory or file.
        layers: Every changed tensor by qualified name, in the order of the base's files.
        extra: Names, in the adapter, of tensors that were trained in full: a classifier, say. They are left out.
        file: The adapter's weight file.
    """

    spec: str
    name: str
    layers: Mapping[str, PlacedFactors]
    extra: tuple[str, ...]
    file: Checkpoint

    @property
    def names(self) -> tuple[str, ...]:
        """The changed tensors, in the order of the base's files."""
        return tuple(self.layers)

    def read(self, name: str) -> LoraLayer:
        """Read the factors of one tensor.

        Args:
            name: A key of `layers`.

        Returns:
            The factors, turned so that B @ A has the orientation of the stored weight.

        Raises:
            InputError: The file can no longer be read.
        """
        placed = self.layers[name]
        A, B = (self.file.read(key).float() for key in (placed.factors.A, placed.factors.B))
        if placed.transposed:
            A, B = B.T.contiguous(), A.T.contiguous()
        return LoraLayer(name, A, B, placed.factors.rank, placed.factors.alpha)


def open_lora(spec: str | Path, base: Checkpoint, *, allow_extra: bool = True) -> Lora:
    """Open a LoRA of a base model without reading its factors.

    Args:
        spec: A PEFT adapter (its directory), a diffusers or kohya LoRA (its file, or a directory with nothing
            else), or a Hub id of one.
        base: The model that the LoRA was trained on. Of a transformers model under its name in memory or on
            disk, with or without a head; of diffusers, the pipeline or the one component.
        allow_extra: Whether modules trained in full beside the LoRA are listed in `extra`, instead of refused.

    Returns:
        The LoRA.

    Raises:
        InputError: There is no such adapter, it is not a LoRA or more than one, or it does not fit the base.
        DetuneError: It is diffusers' or kohya's, and diffusers is not installed.

    Example:
        >>> lora = open_lora("my-adapter", open_checkpoint("my-base"))  # doctest: +SKIP
        >>> layer = lora.read(lora.names[0])  # doctest: +SKIP
        >>> weight + layer.alpha / layer.rank * (layer.B @ layer.A)  # doctest: +SKIP
    """
    text = os.fspath(spec)
    file = _open_adapter(text)
    with parsing(f"adapter {text}"):
        table = read_table(file, allow_extra=allow_extra)
    return Lora(text, _name(text), _place(base, file, table), table.extra, file)


def _name(spec: str) -> str:
    path = Path(os.path.abspath(Path(spec).expanduser()))
    if path.exists():
        return path.stem if path.is_file() else path.name
    return spec.partition("@")[0].rpartition("/")[2]


def _place(base: Checkpoint, adapter: Checkpoint, table: AdapterTable) -> Mapping[str, PlacedFactors]:
    file = adapter.root / adapter.weight_files[0].file
    placed: dict[str, Factors] = {}
    stored, in_memory = _Weights(base.tensors), None
    aliases: Mapping[str, str] = {}
    for factors in table.factors:
        matches = stored.of(factors.module)
        if not matches:
            if in_memory is None:
                aliases = _aliases(base)
                in_memory = _Weights(aliases)
            matches = [aliases[alias] for alias in in_memory.of(factors.module)]
        if len(matches) != 1:
            got = f"{len(matches)} tensors fit, among them {matches[:2]}" if matches else "no tensor fits"
            raise InputError(
                f"cannot place module {factors.module!r} of adapter {file} in {base.spec}",
                f"expected one tensor named like {factors.module + '.weight'!r}, {got}",
                "use the base model the adapter was trained on",
            )
        (name,) = matches
        if name in placed:
            raise InputError(
                f"adapter {file} changes tensor {name!r} twice",
                f"through {placed[name].A!r} and {factors.A!r}",
                "copy the adapter again",
            )
        placed[name] = factors
    transposed = _transposed(base, adapter, placed, table)
    return MappingProxyType(
        {name: PlacedFactors(name, placed[name], transposed[name]) for name in base.tensors if name in placed}
    )


class _Weights:
    """The tensors of a base, found by the names that adapters have for their modules.

    Args:
        names: Theirs, or those that they have in memory.
    """

    # The last parts of a name that are looked up at once: "experts.5.up_proj.weight".
    _PARTS = 4

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._tables: dict[str, _Table] = {}

    def of(self, module: str) -> list[str]:
        """The tensors that may be a module's weight.

        Args:
            module: Its name in the adapter.

        Returns:
            Those of exactly that name in a component, or else all that differ by what either side has in front: a
            prefix for the model inside its head ("bert.", "text_model."), or the component ("unet/").
        """
        component, slash, path = module.rpartition("/")
        wanted = f"{path}.weight"
        table = self._tables.get(component + slash) or self._table(component + slash)
        exact = table.whole.get(wanted)
        if exact:
            return exact
        longer = [name for name in table.ends.get(_tail(wanted, self._PARTS), ()) if name.endswith(f".{wanted}")]
        dots = [place for place, character in enumerate(wanted) if character == "."]
        return longer + [name for dot in dots for name in table.whole.get(wanted[dot + 1 :], ())]

    def _table(self, component: str) -> "_Table":
        # A component on its own has no directories.
        inside = [name for name in self._names if name.startswith(component)] or [
            name for name in self._names if "/" not in name
        ]
        table = self._tables[component] = _Table({}, {})
        for name in inside:
            bare = name.rpartition("/")[2]
            table.whole.setdefault(bare, []).append(name)
            for end in {_tail(bare, parts) for parts in range(1, self._PARTS + 1)}:
                table.ends.setdefault(end, []).append(name)
        return table


@dataclass(frozen=True)
class _Table:
    """Names of one component: by all that stands behind it, and by their last parts."""

    whole: dict[str, list[str]]
    ends: dict[str, list[str]]


def _tail(name: str, parts: int) -> str:
    return ".".join(name.split(".")[-parts:])


def _aliases(base: Checkpoint) -> dict[str, str]:
    found: dict[str, str] = {}
    for prefix in {info.component for info in base.tensors.values()}:
        names = [name.removeprefix(prefix) for name, info in base.tensors.items() if info.component == prefix]
        renamed = names_in_memory(base.root / prefix, names)
        found |= {prefix + name: prefix + stored for name, stored in renamed.items()}
    return found


def _transposed(
    base: Checkpoint, adapter: Checkpoint, placed: Mapping[str, Factors], table: AdapterTable
) -> dict[str, bool]:
    """Check that the product of the factors can be added to each weight, and say whether by its transpose.

    The shape decides wherever it can, as one adapter can hold layers of both kinds. Of a square weight PEFT goes by the
    module's class, whatever the configuration says: here by that of the adapter's other layers, where they agree.
    """
    shapes = {
        name: (adapter.tensors[factors.B].shape[0], *adapter.tensors[factors.A].shape[1:])
        for name, factors in placed.items()
    }
    oblong = {
        name: shape[::-1] == base.tensors[name].shape
        for name, shape in shapes.items()
        if len(shape) == 2 and shape[0] != shape[1] and not placed[name].is_embedding
    }
    kinds = set(oblong.values())
    square = kinds.pop() if len(kinds) == 1 else table.fan_in_fan_out
    found = {
        name: placed[name].is_embedding or oblong.get(name, square and len(shape) == 2)
        for name, shape in shapes.items()
    }
    for name, shape in shapes.items():
        _check_fit(base, name, adapter, placed[name], shape[::-1] if found[name] else shape)
    return found


def _check_fit(base: Checkpoint, name: str, adapter: Checkpoint, factors: Factors, shape: tuple[int, ...]) -> None:
    info = base.tensors[name]
    if info.dtype not in FLOATS:
        raise InputError(
            f"cannot merge into tensor {name!r} in {base.root / info.file}",
            f"it is stored as {info.dtype}",
            "use the unquantised base model",
        )
    for found in (shape, *(() if factors.base_layer is None else (adapter.tensors[factors.base_layer].shape,))):
        if found != info.shape:
            raise InputError(
                f"adapter {adapter.root} does not fit tensor {name!r} in {base.root / info.file}",
                f"its update has shape {found}, the weight {info.shape}",
                "use the base model the adapter was trained on",
            )


def _open_adapter(spec: str) -> Checkpoint:
    """Open the weights of a LoRA adapter.

    Args:
        spec: A PEFT directory, a file of diffusers or kohya, a directory with such a file, or a Hub id.

    Returns:
        A checkpoint of the one file.

    Raises:
        InputError: There is no such adapter.
    """
    with parsing(spec):
        return _open_weights(spec, locate(spec))


def _open_weights(spec: str, root: Path) -> Checkpoint:
    if root.is_file():
        return Checkpoint(spec, LocalFiles(root.parent), [root.name], single_file=True)
    for name in _ADAPTER_FILES:
        if (root / name).is_file():
            return Checkpoint(spec, LocalFiles(root), [name])
    chosen = pick_weights([child.name for child in root.iterdir() if child.is_file()], str(root))
    if chosen is None or chosen.endswith(".json"):
        raise InputError(
            f"{root} is not an adapter",
            f"expected {_ADAPTER_FILES[0]}, {_ADAPTER_FILES[2]} or one other *.safetensors",
            "give the directory that PEFT's save_pretrained wrote, or the file of a LoRA",
        )
    return Checkpoint(spec, LocalFiles(root), [chosen])
