"""One pass over the tensors of a family: what `recover` and `inspect` have in common."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch

from detune._runtime import OnStart
from detune.certificate.verdict import Verdict
from detune.compatibility.model_set import Held, ModelSet, Why, damaged
from detune.methods import Auto
from detune.numerics.device import full_precision
from detune.numerics.float_grid import name_of
from detune.origin import Origin
from detune.problem import NonFinite
from detune.recovery.report import TensorResult
from detune.recovery.scheduler import TensorLoad, TensorScheduler
from detune.source_models.solve_from import renumbered

logger = logging.getLogger(__name__)

OnTensor = Callable[[str, TensorResult | None], None]
Found = TypeVar("Found")
Solved = tuple[TensorResult, Found | None]
# Memory of solvers for each model beyond three, in copies of a matrix: mostly its folded rows
# (derived: 1024 of 3072 rows and more).
MORE_COPIES = 1 / 3
# The verdict on a tensor that is copied.
COPIED = {
    Why.SHARED: Verdict.SHARED,
    Why.BASE: Verdict.EXACT,
    Why.ALONE: Verdict.NOT_DETERMINED,
    Why.NOBODY: Verdict.NOT_DETERMINED,
}


def map_tensors(
    family: ModelSet,
    solve: Callable[[str, Held], Solved[Found]],
    on_tensor: OnTensor | None = None,
    names: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    working_copies: int = Auto.working_copies,
    on_start: OnStart | None = None,
    glance: Callable[[str], TensorResult | None] | None = None,
) -> Iterator[Solved[Found]]:
    """Visit tensors, several at a time where memory and threads allow it; the next one's stack is read meanwhile.

    Args:
        family: The models.
        solve: Called with the name of a tensor that differs and what the models hold of it. Calls come from several
            threads.
        on_tensor: For progress: called with the name and None before, with the result after.
        names: The tensors to visit; None is all of them, in file order.
        device: Where `solve` computes; None is the CPU. A GPU takes one tensor at a time.
        working_copies: What it holds beside the stack of three models; see `Solver`.
        on_start: For progress: called once with the tensors to visit, and what is read of each in bytes.
        glance: Called with the name of a tensor that differs before it is read whole: its result where that need not
            be.

    Yields:
        The result of each tensor and what else `solve` found, in the order in which they are done; None for a tensor
        that is copied, as one that is identical in all models, or that a glance is enough for: it is not read whole.

    Raises:
        InputError: A model holds NaN or Inf.
    """
    # All tensors count, whichever are visited: what one is computed on does not depend on the others' turn.
    loads = {name: _load(family, name, working_copies) for name in family.names}
    visited = tuple(loads) if names is None else names
    if on_start:
        on_start({name: family.read_bytes(name) for name in visited})

    def told(done: Iterable[Solved[Found]]) -> Iterator[Solved[Found]]:
        for result, found in done:
            logger.debug("%s: %s, %s", result.name, result.verdict, result.reason)
            yield result, found
            if on_tensor:
                on_tensor(result.name, result)

    most = None if torch.device(device or "cpu").type == "cpu" else 1
    with TensorScheduler[Solved[Found]](loads.values(), most) as scheduler:
        for name in visited:
            load = loads[name]
            # Read here, while others are computed.
            while not scheduler.may_read(load):
                yield from told(scheduler.finished())
            began = time.perf_counter()
            why = family.copied(name)
            result = glance(name) if glance and why is None else None
            if why is not None:
                result = TensorResult(name, family.shape(name), "", COPIED[why], str(Origin.COPY), why, Origin.COPY)
            held = None if result is not None else family.held(name)
            while held is not None and not scheduler.may_start(load):
                yield from told(scheduler.finished())
            if on_tensor:
                on_tensor(name, None)
            if result is not None:
                yield from told([(_placed(result, family, began), None)])
            elif held is not None:
                scheduler.start(load, partial(_visit, family, name, [held], solve))
            # Memory is freed before the next tensor is read.
            del held
        yield from told(scheduler.rest())


def _load(family: ModelSet, name: str, working_copies: int) -> TensorLoad:
    entries = math.prod(family.shape(name))
    itemsizes = [dtype.itemsize for dtype in family.dtypes(name)]
    stack_bytes = entries * sum(itemsizes)
    copies = working_copies + MORE_COPIES * max(0, len(itemsizes) - 3)
    # Models in float32 are computed in float64 mostly.
    held = copies * (4 if max(itemsizes) <= 2 else 8)
    return TensorLoad(entries, stack_bytes, stack_bytes + round(held * entries))


def _visit(family: ModelSet, name: str, held: list[Held], solve: Callable[[str, Held], Solved[Found]]) -> Solved[Found]:
    began = time.perf_counter()
    try:
        with full_precision():
            # Taken out, so that it is gone when this has returned: a pool keeps arguments a little longer.
            result, found = solve(name, held.pop())
        return _placed(result, family, began), found
    except NonFinite as error:
        raise damaged(name, family.models[family.holders(name)[error.model]].spec) from None


def _placed(result: TensorResult, family: ModelSet, began: float) -> TensorResult:
    """The result as one of the family: with the ranks of all models, and its time."""
    name, holders = result.name, family.holders(result.name)
    ranks = dict(zip(holders, result.ranks, strict=True)) if result.ranks else {}
    some = len(holders) < family.n and result.origin is not Origin.COPY
    return replace(
        result,
        shape=family.shape(name),
        dtype=", ".join(dict.fromkeys(name_of(dtype) for dtype in family.dtypes(name))),
        reason=renumbered(result.reason, holders) + f"; {len(holders)} of {family.n} models have it" * some,
        trust=renumbered(result.trust, holders),
        ranks=tuple(ranks.get(i) for i in range(family.n)) if ranks else (),
        seconds=time.perf_counter() - began,
    )
