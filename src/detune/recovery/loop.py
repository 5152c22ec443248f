"""One pass over the tensors of a family: what `recover` and `inspect` have in common."""

import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch

from detune.certificate.certify import Certificate
from detune.compatibility.model_set import Held, ModelSet, Why, damaged
from detune.methods import Auto
from detune.numerics.device import full_precision
from detune.numerics.float_grid import name_of
from detune.problem import DecodedBits, NonFinite
from detune.recovery.report import Status, TensorRow
from detune.recovery.scheduler import TensorLoad, TensorScheduler

logger = logging.getLogger(__name__)

OnTensor = Callable[[str, TensorRow | None], None]
# What solvers hold for each model beyond three, in copies of a matrix: mostly its folded rows.
MORE_COPIES = 1 / 3
# The method that a row names where nothing was computed, and what that is called.
COPY = "copy"
COPIED = {
    Why.SHARED: Status.SHARED,
    Why.BASE: Status.EXACT,
    Why.ALONE: Status.NOT_DETERMINED,
    Why.NOBODY: Status.NOT_DETERMINED,
}


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
    bits: DecodedBits | None = None

    def row(self, family: ModelSet, name: str, seconds: float) -> TensorRow:
        """The report's row."""
        certificate, bits = self.certificate, self.bits
        holders = family.holders(name)
        ranks = dict(zip(holders, self.ranks, strict=True)) if self.ranks else {}
        some = len(holders) < family.n and self.method != "copy"
        return TensorRow(
            name,
            family.shape(name),
            ", ".join(dict.fromkeys(name_of(dtype) for dtype in family.dtypes(name))),
            self.status,
            self.method,
            self.reason + f"; {len(holders)} of {family.n} models have it" * some,
            tuple(ranks.get(i) for i in range(family.n)) if ranks else (),
            self.relative_residual,
            self.noise_ratio,
            certificate.undetermined if certificate else None,
            certificate.predicted_w_error if certificate else None,
            certificate.best_w_error if certificate else None,
            certificate.worst_w_error if certificate else None,
            certificate.agreement if certificate else None,
            name_of(bits.grid) if bits else None,
            bits.log10_false_positive if bits else None,
            bits.share if bits else None,
            seconds,
        )


def map_tensors(
    family: ModelSet,
    on_copied: Callable[[str], None],
    on_changed: Callable[[str, Held], Answer],
    on_tensor: OnTensor | None = None,
    names: Iterable[str] | None = None,
    device: torch.device | str | None = None,
    working_copies: int = Auto.working_copies,
) -> list[TensorRow]:
    """Visit tensors, several at a time where memory and threads allow it; the next one's stack is read meanwhile.

    Args:
        family: The models.
        on_copied: Called with the name of a tensor that is copied, as one that is identical in all models; it is not
            read whole.
        on_changed: Called with the name of one that differs, and what the models hold; says what became of it. Calls
            come from several threads.
        on_tensor: For progress: called with the name and None before, with the row after.
        names: The tensors to visit; None is all of them, in file order.
        device: Where `on_changed` computes; None is the CPU. A GPU takes one tensor at a time.
        working_copies: What it holds beside the stack of three models; see `Solver`.

    Returns:
        A row for each tensor, in the order of the names.

    Raises:
        InputError: A model holds NaN or Inf.
    """
    # Of all, whichever are visited: what a tensor is computed on does not depend on the others' turn.
    loads = {name: _load(family, name, working_copies) for name in family.names}
    names = list(loads if names is None else names)
    rows: dict[str, TensorRow] = {}

    def take(visited: Iterable[TensorRow]) -> None:
        for row in visited:
            if row.method == COPY:
                on_copied(row.name)
            logger.debug("%s: %s, %s", row.name, row.status, row.reason)
            rows[row.name] = row
            if on_tensor:
                on_tensor(row.name, row)

    most = None if torch.device(device or "cpu").type == "cpu" else 1
    with TensorScheduler[TensorRow](loads.values(), most) as scheduler:
        for name in names:
            load = loads[name]
            # Read here, while others are computed.
            while not scheduler.may_read(load):
                take(scheduler.finished())
            began = time.perf_counter()
            why = family.copied(name)
            held = None if why is not None else family.held(name)
            while held is not None and not scheduler.may_start(load):
                take(scheduler.finished())
            if on_tensor:
                on_tensor(name, None)
            if why is not None:
                take([Answer(COPIED[why], COPY, why).row(family, name, time.perf_counter() - began)])
            elif held is not None:
                scheduler.start(load, partial(_visit, family, name, [held], on_changed))
            # Not while the next is read.
            del held
        take(scheduler.rest())
    return [rows[name] for name in names]


def _load(family: ModelSet, name: str, working_copies: int) -> TensorLoad:
    entries = math.prod(family.shape(name))
    itemsizes = [dtype.itemsize for dtype in family.dtypes(name)]
    stack_bytes = entries * sum(itemsizes)
    copies = working_copies + MORE_COPIES * max(0, len(itemsizes) - 3)
    # Of models in float32 most is computed in float64.
    held = copies * (4 if max(itemsizes) <= 2 else 8)
    return TensorLoad(entries, stack_bytes, stack_bytes + round(held * entries))


def _visit(
    family: ModelSet,
    name: str,
    held: list[Held],
    on_changed: Callable[[str, Held], Answer],
) -> TensorRow:
    began = time.perf_counter()
    try:
        with full_precision():
            # Taken out, so that it is gone when this has returned: a pool keeps arguments a little longer.
            answer = on_changed(name, held.pop())
        return answer.row(family, name, time.perf_counter() - began)
    except NonFinite as error:
        raise damaged(name, family.models[family.holders(name)[error.model]].spec) from None
