"""One pass over the tensors of a family: what `recover` and `inspect` have in common."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from detune.family import Family, damaged
from detune.report import Status, TensorRow
from detune.solvers import Bits, NonFinite
from detune.solvers.certificate import Certificate

logger = logging.getLogger(__name__)

OnTensor = Callable[[str, TensorRow | None], None]


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
            ", ".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in dtypes)),
            self.status,
            self.method,
            self.reason,
            self.ranks,
            self.relative_residual,
            self.noise_ratio,
            certificate.undetermined if certificate else None,
            certificate.predicted_w_error if certificate else None,
            certificate.agreement if certificate else None,
            str(bits.grid).removeprefix("torch.") if bits else None,
            bits.log10_false_positive if bits else None,
            bits.share if bits else None,
            seconds,
        )


def walk(
    family: Family,
    on_shared: Callable[[str], None],
    on_changed: Callable[[str, tuple[Tensor, ...]], Answer],
    on_tensor: OnTensor | None = None,
) -> list[TensorRow]:
    """Visit every tensor in file order, holding one tensor's stack at a time.

    Args:
        family: The models.
        on_shared: Called with the name of a tensor that is identical in all models; it is not read whole.
        on_changed: Called with the name and the stored tensors of one that differs; says what became of it.
        on_tensor: For progress: called with the name and None before, with the row after.

    Returns:
        A row for each tensor.

    Raises:
        InputError: A model holds NaN or Inf.
    """
    rows = []
    for name in family.names:
        if on_tensor:
            on_tensor(name, None)
        began = time.perf_counter()
        if family.is_shared(name):
            on_shared(name)
            answer = Answer(Status.SHARED, "copy", "identical in all models")
        else:
            try:
                answer = on_changed(name, family.stack(name))
            except NonFinite as error:
                raise damaged(name, family.models[error.model].spec) from None
        row = answer.row(name, family.shape(name), family.dtypes(name), time.perf_counter() - began)
        rows.append(row)
        logger.debug("%s: %s, %s", name, row.status, row.reason)
        if on_tensor:
            on_tensor(name, row)
    return rows


def matricise(tensor: Tensor) -> Tensor:
    """A tensor as the matrix in which a LoRA is low-rank: kernels `(out, in, h, w)` become `(out, in h w)`."""
    return tensor.reshape(1, -1) if tensor.ndim < 2 else tensor.reshape(tensor.shape[0], -1)
