"""Weights in fp8 or int8 with their scales beside them: compressed-tensors, DeepSeek, diffusion models.

| who | value | scale, by which it is multiplied |
| --- | --- | --- |
| compressed-tensors, vLLM, fbgemm | `x.weight` | `x.weight_scale`: one, one a row, one a group, or one a block |
| DeepSeek, transformers | `x.weight` | `x.weight_scale_inv`, one for each block of 128 x 128 |
| ComfyUI | `x.weight` | `x.scale_weight`, one |
| compressed-tensors, integers | `x.weight` | the same, after `x.weight_zero_point` is taken off |
| bitsandbytes, 8 bits | `x.weight` | `x.SCB / 127`, one a row |
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from detune.checkpoints.layout import read_json
from detune.checkpoints.quantised import Coding, Decoded
from detune.checkpoints.source import Checkpoint, TensorInfo
from detune.checkpoints.stored_dtypes import FP8
from detune.errors import InputError

__all__ = ["ScaledCodes", "with_scales"]

SCALES = ("weight_scale", "weight_scale_inv", "scale_weight", "SCB")
# bitsandbytes stores the largest magnitude of a row, which is level 127.
FACTORS = {"SCB": 1 / 127}
# Numbers that are packed in the order of a kernel: GPTQ and AWQ, compressed-tensors, bitsandbytes' 4 bits.
PACKED = ("qweight", "weight_packed", "absmax")
# Tensors of running a quantised model, not of its weights.
OTHERS = (
    "input_scale",
    "input_zero_point",
    "scale_input",
    "k_scale",
    "v_scale",
    "q_scale",
    "output_scale",
    "weight_format",
)
# An empty tensor by which ComfyUI knows its files.
MARKER = "scaled_fp8"
# Keys of a configuration that say that weights are quantised, and files that say nothing else.
CONFIGS = ("quantization_config", "compression_config")
CONFIG_FILES = ("quantization_config.json", "quantize_config.json")
# Sides of blocks that are in use.
SIDES = (128, 64, 32, 16, 256, 512, 1024)


@dataclass(frozen=True)
class ScaledCodes:
    """A tensor of small numbers, each of which is to be multiplied by a scale.

    Attributes:
        weight: Name of the numbers, as stored.
        scale: Name of the scales; None where they are one.
        zero_point: Name of what is taken off before; None where that is nothing.
        shape: Shape of the numbers.
        sides: How many neighbours have one scale, in each dimension.
        about: See `Coding`.
        factor: What all scales are multiplied by.
    """

    weight: str
    scale: str | None
    zero_point: str | None
    shape: tuple[int, ...]
    sides: tuple[int, ...]
    about: str
    factor: float = 1.0

    def decode(self, stored: Checkpoint, rows: slice) -> Tensor:
        """See `Coding.decode`."""
        values = self._codes(stored, rows).float()
        if self.zero_point is not None:
            values = values - self._spread(stored, self.zero_point, rows)
        return values if self.scale is None else values * (self.factor * self._spread(stored, self.scale, rows))

    def steps(self, stored: Checkpoint, rows: slice) -> Tensor:
        """See `Coding.steps`."""
        step = _spacing(self._codes(stored, rows))
        return step if self.scale is None else step * self.factor * self._spread(stored, self.scale, rows).abs()

    def _codes(self, stored: Checkpoint, rows: slice) -> Tensor:
        return stored.read_rows(self.weight, [rows]) if self.shape else stored.read(self.weight)

    def _spread(self, stored: Checkpoint, name: str, rows: slice) -> Tensor:
        """Expand what is stored for each block to every entry of some rows."""
        each = stored.read(name).float().reshape(_scale_shape(stored.tensors[name].shape, self.shape))
        for dim, side in enumerate(self.sides):
            if side > 1 and each.shape[dim] > 1:
                each = each.repeat_interleave(side, dim).narrow(dim, 0, self.shape[dim])
        return each[rows] if each.ndim and each.shape[0] > 1 else each


def with_scales(model: Checkpoint) -> Checkpoint:
    """A checkpoint with its fp8 and scaled tensors read as what they mean; itself where it has none.

    Raises:
        InputError: A scale is missing, there twice, or does not fit its tensor; or weights are packed.
    """
    _require_unpacked(model)
    scales: dict[str, str] = {}
    for name in model.tensors:
        weight = _weight_of(name)
        if _ending(name) not in SCALES or weight not in model.tensors or not model.tensors[weight].shape:
            continue
        if weight in scales:
            raise InputError(
                f"tensor {weight!r} of {model.spec} has two scales",
                f"found {scales[weight]!r} and {name!r}",
                "remove the one that does not belong to it, or convert the model to bf16",
            )
        scales[weight] = name
    codings: dict[str, Coding] = {}
    for name, info in model.tensors.items():
        if name in scales and info.shape and (info.dtype in FP8 or _is_integer(info.dtype)):
            codings[name] = _coding(model, name, scales[name])
        elif _is_code(name, info):
            raise InputError(
                f"tensor {name!r} of {model.spec} has no scale",
                f"it is stored as {_name(info.dtype)}, and {name}_scale is not there",
                "copy the model again, or convert it to bf16",
            )
        elif info.dtype in FP8 and len(info.shape) > 1:
            if scales:
                raise InputError(
                    f"tensor {name!r} of {model.spec} has no scale",
                    f"it is stored as {_name(info.dtype)}, and {len(scales)} others have one, "
                    f"{next(iter(scales.values()))!r} for instance",
                    "copy the model again, or convert it to bf16",
                )
            codings[name] = ScaledCodes(name, None, None, info.shape, (1,) * len(info.shape), _name(info.dtype))
    if not codings:
        return model
    hidden = {name for name in model.tensors if _ending(name) in (*OTHERS, MARKER, "weight_zero_point")}
    hidden |= {scales[name] for name in codings if name in scales}
    return Decoded(model, codings, frozenset(hidden), made=_plain_configs(model), dropped=CONFIG_FILES)


def _require_unpacked(model: Checkpoint) -> None:
    """Refuse weights that only the library that packed them can read."""
    for name, info in model.tensors.items():
        if _ending(name) in PACKED or ".quant_state." in name:
            raise InputError(
                f"{model.spec} holds weights packed for a kernel",
                f"{name!r} is {_name(info.dtype)} of shape {list(info.shape)}",
                "dequantise them with the library that packed them, and save that",
            )


def _is_code(name: str, info: TensorInfo) -> bool:
    """Whether a tensor is a matrix of weights in 8 bits that are levels, not numbers."""
    return info.dtype in (torch.int8, torch.uint8) and len(info.shape) > 1 and _ending(name) == "weight"


def _plain_configs(model: Checkpoint) -> dict[str, bytes]:
    """The configurations of a quantised model as those of what it is dequantised to, where they have to be others."""
    plain = {}
    for path in model.side_files():
        if path.name == "config.json":
            config = read_json(model.root / path)
            if isinstance(config, Mapping) and any(key in config for key in CONFIGS):
                kept = {key: value for key, value in config.items() if key not in CONFIGS}
                plain[path.as_posix()] = (json.dumps(kept, indent=2) + "\n").encode()
    return plain


def _coding(model: Checkpoint, name: str, scale: str) -> ScaledCodes:
    info = model.tensors[name]
    sides = _sides(model, name, scale)
    zero_point = f"{name}_zero_point"
    if zero_point in model.tensors:
        _sides(model, name, zero_point)
    per = [f"{side}" if side > 1 else "1" for side in sides]
    blocks = "one scale" if math.prod(model.tensors[scale].shape) == 1 else f"a scale for each {'x'.join(per)}"
    found = zero_point if zero_point in model.tensors else None
    factor = FACTORS.get(_ending(scale), 1.0)
    return ScaledCodes(name, scale, found, info.shape, sides, f"{_name(info.dtype)}, {blocks}", factor)


def _sides(model: Checkpoint, name: str, scale: str) -> tuple[int, ...]:
    """The number of neighbours with one scale, in each dimension.

    Raises:
        InputError: The scales do not fit.
    """
    shape, given, dtype = model.tensors[name].shape, model.tensors[scale].shape, model.tensors[scale].dtype
    scales = _scale_shape(given, shape)
    sides = tuple(side for pair in zip(shape, scales, strict=False) if (side := _side(*pair)) is not None)
    # A scale of fewer dimensions is one for all or one a row: blocks would not say in which dimension they lie.
    whole = len(given) == len(shape) or all(
        side in (1, size) for side, size in zip(sides, shape[: len(sides)], strict=True)
    )
    if len(sides) == len(shape) == len(scales) and whole and (dtype.is_floating_point or _is_integer(dtype)):
        return sides
    raise InputError(
        f"the scales {scale!r} of {model.spec} do not fit their tensor",
        f"they are {_name(dtype)} of shape {list(given)}, the tensor has {list(shape)}: expected real numbers, one, "
        "one a row, or one a block",
        "copy the model again, or convert it to bf16",
    )


def _scale_shape(given: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    """A shape of scales with as many dimensions as the tensor: those that are left out are one, or the last ones."""
    if math.prod(given) == 1:
        return (1,) * len(shape)
    return (*given, *(1,) * (len(shape) - len(given)))


def _side(size: int, scales: int) -> int | None:
    if scales in (1, size):
        return size if scales == 1 else 1
    found = [side for side in (*SIDES, size // scales if scales else 0) if side and -(-size // side) == scales]
    return found[0] if found else None


def _ending(name: str) -> str:
    return name.rpartition("/")[2].rpartition(".")[2]


def _weight_of(scale: str) -> str:
    return scale[: len(scale) - len(_ending(scale))] + "weight"


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _spacing(codes: Tensor) -> Tensor:
    """The distance between neighbouring numbers of a dtype, at each."""
    if codes.dtype not in FP8:
        return torch.ones(())
    return _steps(codes.dtype)[codes.view(torch.uint8).long()]


@cache
def _steps(dtype: torch.dtype) -> Tensor:
    """The distance to the next larger magnitude, for each of the 256 codes; to the next smaller for the largest."""
    values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    finite = values[values.isfinite()].abs().unique()
    gaps = finite.diff()
    gaps = torch.cat([gaps, gaps[-1:]])
    places = torch.searchsorted(finite, values.abs().nan_to_num(nan=0.0, posinf=float(finite[-1])))
    return gaps[places]
