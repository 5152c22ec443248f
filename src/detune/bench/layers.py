"""One row of LoWRA Bench: a weight matrix of the base with the LoRAs that were trained on it, in Arrow and in torch.

The published schema, one row per layer: `task_name, layer_model, layer_name, pre_ft_name, pre_ft_weight`, and for each
LoRA i from 0: `lora_{i}_name, lora_{i}_A_weight, lora_{i}_B_weight, lora_{i}_rank, lora_{i}_alpha`. Weights are nested
lists of float32. The fine-tuned weight is

    W_i = pre_ft + (alpha / rank · B) A,

computed in float32 in this order, as the benchmark's authors do.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from detune.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Layer", "LoraFactors", "arrow_schema", "count_loras", "layer_of", "rank_columns", "ranks_of", "row_of"]

_TEXTS = ("task_name", "layer_model", "layer_name", "pre_ft_name")
_LORA_PARTS = ("name", "A_weight", "B_weight", "rank", "alpha")


@dataclass(frozen=True)
class LoraFactors:
    """One LoRA of one layer.

    Attributes:
        name: Which adapter it is.
        A: `(rank, in)`, or `(rank, in, h, w)` of a kernel; float32.
        B: `(out, rank)`, or `(out, rank, 1, 1)`; float32.
        rank: The r of `alpha / rank`.
        alpha: The numerator.
    """

    name: str
    A: Tensor
    B: Tensor
    rank: int
    alpha: float


@dataclass(frozen=True)
class Layer:
    """One weight matrix and its LoRAs.

    Attributes:
        index: Its row.
        task: `task_name`: the subset it belongs to.
        model: `layer_model`: the part of the model, a component of a pipeline (`unet`) or the model itself.
        name: `layer_name`: the parameter's name in there.
        base: `pre_ft_name`: the model before fine-tuning.
        weight: `pre_ft_weight`, in its stored shape, float32.
        loras: Every LoRA.
    """

    index: int
    task: str
    model: str
    name: str
    base: str
    weight: Tensor
    loras: tuple[LoraFactors, ...]

    def merged(self, lora: int) -> Tensor:
        """The fine-tuned weight `W_i = pre_ft + (alpha / rank · B) A`, shape and dtype of `weight`.

        Args:
            lora: Which one, from 0.
        """
        factors = self.loras[lora]
        B, A = factors.B.flatten(1), factors.A.flatten(1)
        return self.weight + ((factors.alpha / factors.rank * B) @ A).reshape(self.weight.shape)

    def rank(self, loras: Sequence[int]) -> int:
        """The largest rank among some LoRAs: what the paper's method is told."""
        return max(self.loras[i].rank for i in loras)

    @cached_property
    def depth(self) -> int | None:
        """The first number in the name: the block it lies in; None where there is none."""
        found = re.search(r"\.(\d+)\.", f".{self.name}.")
        return int(found[1]) if found else None

    @property
    def kind(self) -> str:
        """The projection: the last part of the module's name that is not a number."""
        parts = [part for part in self.name.removesuffix(".weight").split(".") if not part.isdigit()]
        return parts[-1]


def arrow_schema(n: int) -> "pa.Schema":
    """The published schema for n LoRAs, with the metadata by which `datasets` knows its features."""
    from datasets import Features, List, Value

    matrix = List(List(Value("float32")))
    features: dict[str, Any] = {name: Value("string") for name in _TEXTS} | {"pre_ft_weight": matrix}
    kinds = (Value("string"), matrix, matrix, Value("int64"), Value("float64"))
    for i in range(n):
        features |= {f"lora_{i}_{part}": kind for part, kind in zip(_LORA_PARTS, kinds, strict=True)}
    return Features(features).arrow_schema


def row_of(layer: Layer, schema: "pa.Schema") -> "pa.Table":
    """The layer as a table of one row.

    Kernels are written as matrices `(out, in·h·w)`, as in the published rows. Whoever reads them back has matrices
    too: `layer_of` keeps the shape that a row has.
    """
    import pyarrow as pa

    values: dict[str, Any] = {
        "task_name": layer.task,
        "layer_model": layer.model,
        "layer_name": layer.name,
        "pre_ft_name": layer.base,
        "pre_ft_weight": layer.weight,
    }
    for i, lora in enumerate(layer.loras):
        parts = (lora.name, lora.A, lora.B, lora.rank, lora.alpha)
        values |= {f"lora_{i}_{part}": value for part, value in zip(_LORA_PARTS, parts, strict=True)}
    columns = [
        _nested(values[field.name], field.type)
        if isinstance(values[field.name], Tensor)
        else pa.array([values[field.name]], field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def count_loras(columns: Sequence[str], source: str) -> int:
    """The number of LoRAs that the columns have.

    Args:
        columns: Names of a table's columns.
        source: What to call the table in an error.

    Raises:
        InputError: A column of the schema is missing.
    """
    found = {int(match[1]) for name in columns if (match := re.fullmatch(r"lora_(\d+)_\w+", name))}
    wanted = [*_TEXTS, "pre_ft_weight"]
    wanted += [f"lora_{i}_{part}" for i in range(max(found, default=0) + 1) for part in _LORA_PARTS]
    missing = [name for name in wanted if name not in columns]
    if missing:
        raise InputError(
            f"{source} lacks column{'s' * (len(missing) > 1)} {', '.join(missing[:4])}"
            + (f" and {len(missing) - 4} more" if len(missing) > 4 else ""),
            f"expected the columns of LoWRA Bench, got {', '.join(list(columns)[:6])} ...",
            "build the subset with `detune bench build`",
        )
    return max(found) + 1


def layer_of(table: "pa.Table", index: int, source: str) -> Layer:
    """Read a table of one row; its arrays keep the shape that they are stored in, matrices or kernels.

    Args:
        table: One row of a subset.
        index: The row's number in the subset.
        source: What to call the subset in an error.

    Raises:
        InputError: A column or a text is missing, a matrix is ragged, does not fit or holds NaN or Inf, a rank is no
            positive integer, an alpha is no finite number (zero is one: such a LoRA changes nothing).
    """
    n = count_loras(table.column_names, source)
    where = _where(index, source, table["layer_name"][0].as_py())
    task, model, name, base = (_text(table, column, where) for column in _TEXTS)
    weight = _tensor(table, "pre_ft_weight", where)
    loras = tuple(_lora(table, i, weight, where) for i in range(n))
    return Layer(index, task, model, name, base, weight, loras)


def rank_columns(n: int) -> list[str]:
    """The columns that `ranks_of` reads, for n LoRAs."""
    return ["layer_name", *(f"lora_{i}_rank" for i in range(n))]


def ranks_of(table: "pa.Table", source: str) -> tuple[tuple[int, ...], ...]:
    """The rank of each LoRA in each row.

    Args:
        table: The `rank_columns` of all rows of a subset.
        source: What to call the subset in an error.

    Raises:
        InputError: A rank is missing or no positive integer.
    """
    names, *columns = (column.to_pylist() for column in table.columns)
    return tuple(
        tuple(_rank(rank, f"lora_{i}_rank", _where(index, source, name)) for i, rank in enumerate(ranks))
        for index, (name, *ranks) in enumerate(zip(names, *columns, strict=True))
    )


def _where(index: int, source: str, layer: object) -> str:
    return f"row {index} of {source}, layer {layer!r}"


def _text(table: "pa.Table", column: str, where: str) -> str:
    value = table[column][0].as_py()
    if value is None:
        raise InputError(f"{where}: {column} is missing", "expected a text", "mend the row")
    return str(value)


def _rank(value: Any, column: str, where: str) -> int:
    number = _number(value)
    if number is None or number < 1 or number != int(number):
        got = "missing" if value is None else repr(value)
        raise InputError(f"{where}: {column} is {got}", "expected a positive integer", "mend the row")
    return int(number)


def _alpha(value: Any, column: str, where: str) -> float:
    number = _number(value)
    if number is None:
        got = "missing" if value is None else repr(value)
        raise InputError(f"{where}: {column} is {got}", "expected a finite number", "mend the row")
    return number


def _number(value: Any) -> float | None:
    """The value if it is a finite number, else None."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def _lora(table: "pa.Table", i: int, weight: Tensor, where: str) -> LoraFactors:
    name = _text(table, f"lora_{i}_name", where)
    rank = _rank(table[f"lora_{i}_rank"][0].as_py(), f"lora_{i}_rank", where)
    alpha = _alpha(table[f"lora_{i}_alpha"][0].as_py(), f"lora_{i}_alpha", where)
    A, B = (_tensor(table, f"lora_{i}_{part}_weight", where) for part in "AB")
    out, columns = weight.shape[0], weight[0].numel()
    if A.shape[0] != rank or A[0].numel() != columns or tuple(B.shape[:2]) != (out, rank) or B[0].numel() != rank:
        raise InputError(
            f"{where}: lora_{i} has A {_shape(A)}, B {_shape(B)}",
            f"expected A {rank}x{columns}, B {out}x{rank} for rank {rank} and a weight {_shape(weight)}",
            f"mend the row of {name}",
        )
    return LoraFactors(name, A, B, rank, alpha)


def _tensor(table: "pa.Table", column: str, where: str) -> Tensor:
    """A nested list of numbers as a float32 tensor, without going through Python's floats."""
    import pyarrow as pa
    import pyarrow.compute as pc

    array = table[column].combine_chunks()
    array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
    array = array.storage if isinstance(array, pa.ExtensionArray) else array
    shape: list[int] = []
    while pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        lengths = pc.unique(pc.list_value_length(array)).to_pylist()
        if len(lengths) != 1 or not lengths[0]:
            got = "rows of different lengths" if len(lengths) > 1 else "nothing"
            raise InputError(f"{where}: {column} is no matrix", f"expected a nested list, got {got}", "mend the row")
        shape.append(lengths[0])
        array = array.flatten()
    if len(shape) < 2 or array.null_count or not pa.types.is_floating(array.type):
        got = f"{len(shape)} levels of {array.type}" + (", some empty" if array.null_count else "")
        raise InputError(f"{where}: {column} is no matrix", f"expected nested lists of floats, got {got}", "mend it")
    tensor = torch.from_numpy(array.to_numpy(zero_copy_only=False).copy()).float().reshape(shape)
    if not bool(torch.isfinite(tensor).all()):
        raise InputError(f"{where}: {column} holds NaN or Inf", "expected numbers that float32 can hold", "mend it")
    return tensor


def _nested(tensor: Tensor, kind: "pa.DataType") -> "pa.Array":
    import numpy as np
    import pyarrow as pa

    matrix = tensor.float().flatten(1).contiguous()
    rows, columns = matrix.shape
    offsets = np.arange(0, rows * columns + 1, columns, dtype=np.int32)
    lists = pa.ListArray.from_arrays(offsets, pa.array(matrix.numpy().reshape(-1)))
    return pa.ListArray.from_arrays(np.array([0, rows], dtype=np.int32), lists).cast(kind)


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))
