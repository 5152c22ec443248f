"""One pass over the tensors of a family: what `recover` and `inspect` have in common."""

import logging
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest

import torch
from torch import Tensor

from detune.family import Family, damaged
from detune.report import Status, TensorRow
from detune.solvers import Bits, NonFinite
from detune.solvers.certificate import Certificate
from detune.solvers.device import full_precision
from detune.solvers.grid import name_of

logger = logging.getLogger(__name__)

OnTensor = Callable[[str, TensorRow | None], None]

# What the stack in work and the one read ahead may hold together, in float32 copies of the largest tensor.
STACKS = 2
# Matrices with fewer entries are computed on one thread: up to 1024x1024 a second was no faster, and may have to wait.
SHARED_OUT = 2**20


@dataclass(frozen=True)
class Answer:
    """What became of one tensor, before it has a name.

    Attributes:
        status: As in the report; so are `method` to `noise_ratio`.
        certificate: The solver's answer judged by the data, where there was something to solve.
        bits: What is known of the base's bits.
    """

    status: Status
    method: str
    reason: str
    ranks: tuple[int, ...] = ()
    relative_residual: float | None = None
    noise_ratio: float | None = None
    certificate: Certificate | None = None
    bits: Bits | None = None

    def row(self, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], seconds: float) -> TensorRow:
        """The report's row."""
        certificate, bits = self.certificate, self.bits
        return TensorRow(
            name,
            shape,
            ", ".join(dict.fromkeys(name_of(dtype) for dtype in dtypes)),
            self.status,
            self.method,
            self.reason,
            self.ranks,
            self.relative_residual,
            self.noise_ratio,
            certificate.undetermined if certificate else None,
            certificate.predicted_w_error if certificate else None,
            certificate.agreement if certificate else None,
            name_of(bits.grid) if bits else None,
            bits.log10_false_positive if bits else None,
            bits.share if bits else None,
            seconds,
        )


def walk(
    family: Family,
    on_shared: Callable[[str], None],
    on_changed: Callable[[str, tuple[Tensor, ...]], Answer],
    on_tensor: OnTensor | None = None,
    names: Iterable[str] | None = None,
) -> list[TensorRow]:
    """Visit tensors one at a time, while the next one's stack is read where memory allows it.

    Args:
        family: The models.
        on_shared: Called with the name of a tensor that is identical in all models; it is not read whole.
        on_changed: Called with the name and the stored tensors of one that differs; says what became of it.
        on_tensor: For progress: called with the name and None before, with the row after.
        names: The tensors to visit; None is all of them, in file order.

    Returns:
        A row for each tensor.

    Raises:
        InputError: A model holds NaN or Inf.
    """
    rows = []
    with closing(_read_ahead(family, list(family.names if names is None else names))) as stacks:
        for name, read in stacks:
            if on_tensor:
                on_tensor(name, None)
            began = time.perf_counter()
            tensors = read()
            if tensors is None:
                on_shared(name)
                answer = Answer(Status.SHARED, "copy", "identical in all models")
            else:
                try:
                    with full_precision(), computing_threads(tensors[0].numel()):
                        answer = on_changed(name, tensors)
                except NonFinite as error:
                    raise damaged(name, family.models[error.model].spec) from None
            # Not while the next is read.
            del tensors, read
            row = answer.row(name, family.shape(name), family.dtypes(name), time.perf_counter() - began)
            rows.append(row)
            logger.debug("%s: %s, %s", name, row.status, row.reason)
            if on_tensor:
                on_tensor(name, row)
    return rows


_Read = Callable[[], tuple[Tensor, ...] | None]


def _read_ahead(family: Family, names: Sequence[str]) -> Generator[tuple[str, _Read], None, None]:
    """Each tensor with what gives its stack, None where it is shared; a thread reads the next one meanwhile.

    Two stacks together hold at most `STACKS` float32 copies of the largest tensor; where they would hold more, the next
    one is read when its turn comes.
    """

    def load(name: str) -> tuple[Tensor, ...] | None:
        return None if family.is_shared(name) else family.stack(name)

    sizes = {name: math.prod(family.shape(name)) for name in names}
    held = {name: sizes[name] * sum(dtype.itemsize for dtype in family.dtypes(name)) for name in names}
    limit_bytes = STACKS * 4 * max(sizes.values(), default=0)
    with ThreadPoolExecutor(1, thread_name_prefix="detune-read") as reader:
        ahead: Future[tuple[Tensor, ...] | None] | None = None
        for name, following in zip_longest(names, names[1:]):
            read = ahead.result if ahead else partial(load, name)
            fits = following is not None and held[name] + held[following] <= limit_bytes
            ahead = reader.submit(load, following) if fits else None
            yield name, read


@contextmanager
def computing_threads(entries: int) -> Iterator[None]:
    """Compute on one thread in the block where a matrix is too small to share out.

    Args:
        entries: Of the matrix.
    """
    threads = torch.get_num_threads()
    if entries >= SHARED_OUT or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def matricise(tensor: Tensor) -> Tensor:
    """A tensor as the matrix in which a LoRA is low-rank: kernels `(out, in, h, w)` become `(out, in h w)`."""
    return tensor.reshape(1, -1) if tensor.ndim < 2 else tensor.reshape(tensor.shape[0], -1)
