"""The device that is computed on: whether it will do, how weights get there, and how exactly it multiplies."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from detune.errors import InputError

CPU = torch.device("cpu")


@lru_cache
def find_device(device: torch.device | str) -> torch.device:
    """A device that can be computed on.

    Args:
        device: `cpu`, `cuda`, `cuda:1`, `mps` or another that torch knows.

    Returns:
        The device; the CPU, with a warning, where it has no float64: the small factorisations need that.

    Raises:
        InputError: It is not there.
    """
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise InputError(
            f"no device '{device}' here", reason, "use --device cpu, or install torch for your GPU"
        ) from None
    try:
        torch.ones(1, dtype=torch.float64, device=device).item()
    except (RuntimeError, TypeError):
        warnings.warn(f"device '{device}' has no float64: computing on the CPU", stacklevel=2)
        return CPU
    return torch.device(device)


@lru_cache
def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether products of bf16 matrices, added up in float32, take half the time: on CPUs with units for them.

    Elsewhere they are emulated. GPUs are left to float32: how they add up is for their libraries to choose.

    Args:
        device: Where to compute.
    """
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    # Torch has no public name for it in all versions.
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())


@dataclass(frozen=True)
class _Upload:
    """Rows on their way.

    Attributes:
        tensors: Tensors of every matrix, on the device; to be touched only after `arrived`.
        arrived: Recorded behind the last copy.
    """

    tensors: list[Tensor]
    arrived: torch.cuda.Event


def upload(matrices: Sequence[Tensor], runs: Sequence[slice], device: torch.device) -> Iterator[list[Tensor]]:
    """Bring rows to a device, run by run, in the dtype that they are stored in: bf16 crosses the bus as bf16.

    To CUDA they go through pinned memory on a stream of their own, and the next run is on its way while this one is
    computed with.

    Args:
        matrices: `(out, in)`, all on one device.
        runs: The rows, in order.
        device: Where they are wanted.

    Yields:
        For each run these rows of every matrix, on the device. Where that is their own, they are views.
    """
    if device.type != "cuda" or matrices[0].device.type != "cpu":
        for rows in runs:
            yield [W_i[rows].to(device) for W_i in matrices]
        return
    stream = torch.cuda.Stream(device)

    def start(rows: slice) -> _Upload:
        with torch.cuda.stream(stream):
            # Pinned memory goes back to torch's pool when its copy is done, and not before.
            pinned = [_compact(W_i[rows]).pin_memory() for W_i in matrices]
            tensors = [W_i.to(device, non_blocking=True) for W_i in pinned]
            return _Upload(tensors, stream.record_event())

    ahead = [start(rows) for rows in runs[:1]]
    for following in (*runs[1:], None):
        now = ahead.pop()
        if following is not None:
            ahead.append(start(following))
        computing = torch.cuda.current_stream(device)
        computing.wait_event(now.arrived)
        for tensor in now.tensors:
            tensor.record_stream(computing)
        yield now.tensors


def _compact(rows: Tensor) -> Tensor:
    """Copy rows without gaps in memory, in their own order: pinning takes the gaps along."""
    return rows.mT.contiguous().mT if rows.stride(0) < rows.stride(1) else rows.contiguous()


class _Products:
    """The precision in which torch multiplies float32 matrices: one setting for the process and all its threads.

    The first one in keeps the user's setting, and the last one out restores it.
    """

    def __init__(self) -> None:
        backends: Any = torch.backends
        matmul = backends.cuda.matmul
        # One setting for GPUs, one for CPUs with bf16 units. Before torch 2.9 there was but one for both.
        self._backends: tuple[Any, ...] = ()
        if hasattr(matmul, "fp32_precision"):
            self._backends = (matmul, backends.mkldnn.matmul)
        self._lock = Lock()
        self._inside = 0
        self._users: list[str] = []

    def enter(self) -> None:
        with self._lock:
            if not self._inside:
                self._users = self._get()
                self._set(["ieee" if self._backends else "highest"] * len(self._users))
            self._inside += 1

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._set(self._users)

    def _get(self) -> list[str]:
        if not self._backends:
            return [torch.get_float32_matmul_precision()]
        return [backend.fp32_precision for backend in self._backends]

    def _set(self, settings: list[str]) -> None:
        if not self._backends:
            torch.set_float32_matmul_precision(settings[0])
        for backend, setting in zip(self._backends, settings, strict=False):
            backend.fp32_precision = setting


_PRODUCTS = _Products()


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply float32 matrices in float32 in the block, whatever the user has set: TF32 has 11 bits of 24.

    Example:
        >>> torch.set_float32_matmul_precision("high")
        >>> with full_precision():
        ...     pass
        >>> torch.get_float32_matmul_precision()
        'high'
        >>> torch.set_float32_matmul_precision("highest")
    """
    _PRODUCTS.enter()
    try:
        yield
    finally:
        _PRODUCTS.leave()
