"""A second device on a machine that has none: an error for everything that a GPU would not compute.

Tensors of the second device are computed by the CPU, and take care that no operation mixes them with tensors of the
first, as a real device would.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

# A device that torch knows and no tensor of ours is on otherwise.
THERE = torch.device("meta")

aten = torch.ops.aten
# What moves between devices, or takes indices from the CPU.
CROSSES = (
    aten._to_copy.default,
    aten.copy_.default,
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
)


class Elsewhere(Tensor):
    """A tensor of the second device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Elsewhere":
        made = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=THERE,
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class SecondDevice(TorchDispatchMode):
    """Lets tensors be made there."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # There is nothing to skip, and skipping imports a compiler for seconds.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    found = Found()
    held_args = found.held(args)
    held_kwargs = {key: found.held(value) for key, value in kwargs.items()} if kwargs else kwargs
    device, there = kwargs.get("device"), found.there
    if device is None and not there:
        return func(*args, **kwargs)
    if there and found.here and func not in CROSSES:
        raise RuntimeError(f"{func} mixes devices: {[type(arg).__name__ for arg in args]}")
    if device is not None:
        there = torch.device(device) == THERE
        held_kwargs["device"] = torch.device("cpu")
    elif func in CROSSES:
        there = isinstance(args[0], Elsewhere)
    result = func(*held_args, **held_kwargs)
    if not there or func is aten._local_scalar_dense.default:
        return result
    result = moved(result)
    return return_and_correct_aliasing(func, args, kwargs, result) if aliases(func) else result


class Found:
    """What the arguments of an operation are, by the way of taking them back to the CPU."""

    def __init__(self) -> None:
        self.there = self.here = False

    def held(self, value: Any) -> Any:
        if isinstance(value, Elsewhere):
            self.there = True
            return value.held
        if isinstance(value, Tensor):
            # Numbers may be anywhere.
            self.here |= value.ndim > 0
        elif isinstance(value, list | tuple):
            return type(value)([self.held(item) for item in value])
        return value


def moved(result: Any) -> Any:
    if isinstance(result, Tensor):
        return Elsewhere(result)
    return type(result)([moved(item) for item in result]) if isinstance(result, list | tuple) else result


@cache
def aliases(func: Any) -> bool:
    """Whether what an operation returns is its argument, or a view of it."""
    return any(value.alias_info is not None for value in (*func._schema.arguments, *func._schema.returns))


class AnyGenerator(torch.Generator):
    """Draws on the CPU for either device."""

    def __new__(cls, device: Any = "cpu") -> "AnyGenerator":
        return super().__new__(cls, "cpu")


@contextmanager
def second_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A device beside the CPU in the block."""
    make = torch.tensor

    def tensor(data: Any, *, device: Any = "cpu", **options: Any) -> Tensor:
        # It fills the tensor where no mode sees it.
        return make(data, **options).to(device)

    submit = ThreadPoolExecutor.submit

    def submit_there(pool: ThreadPoolExecutor, call: Any, /, *args: Any, **kwargs: Any) -> Any:
        # A mode is its thread's own.
        def compute_there() -> Any:
            with SecondDevice():
                return call(*args, **kwargs)

        return submit(pool, compute_there)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", submit_there)
    monkeypatch.setattr(torch, "Generator", AnyGenerator)
    monkeypatch.setattr(torch, "tensor", tensor)
    with SecondDevice():
        yield THERE


def fetched(tensor: Tensor) -> Tensor:
    """The tensor on the CPU; an error where it is there already."""
    assert isinstance(tensor, Elsewhere), f"on {tensor.device}"
    return tensor.held
