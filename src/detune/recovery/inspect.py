"""Inspect models: what changed, at which rank, and whether it can be recovered. Writes nothing."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from detune._runtime import OnStart, command_line
from detune.certificate.verdict import Verdict
from detune.checkpoints import Checkpoint
from detune.compatibility.describe import describe
from detune.compatibility.groups import select
from detune.compatibility.light import BELOW_A_STEP, find_bit_change, some_of_each_pattern
from detune.compatibility.model_set import Held, Models, ModelSet, rows_to_read
from detune.compatibility.shared import surely_shared
from detune.compatibility.tensor_change import describe_change
from detune.errors import InputError
from detune.fitting.differences import find_differences
from detune.methods import Auto
from detune.origin import Origin
from detune.problem import NotLowRank, Stack
from detune.problem.solving import told_by_others
from detune.problem.stack import matricise
from detune.recovery.loop import OnTensor, map_tensors
from detune.recovery.report import InputRow, Report, TensorResult
from detune.recovery.tensor import result_of, solve_tensor


def inspect(
    models: Sequence[str | Path],
    *,
    rank: int | None = None,
    device: torch.device | str | None = None,
    merge_dtype: torch.dtype | None = None,
    rows: int | Literal["auto", "all"] = "auto",
    hashes: bool = True,
    on_start: OnStart | None = None,
    on_tensor: OnTensor | None = None,
) -> Report:
    """Look at what differs between models, without writing anything.

    Args:
        models: Two or more, as `detune.checkpoints.open_checkpoint` takes them, to compare; of one alone, the report
            says what it is and what recovering its base needs.
        rank: The most that any adapter's rank can be; None finds it.
        device: Where to compute; None is the CPU.
        merge_dtype: For `BASE+ADAPTER`: merge in this dtype instead of the base's.
        rows: Rows of each matrix to look at; what the report says is then of these. "auto" is 1024 if a model is on the
            Hub, of which no more is fetched, and all otherwise.
        hashes: Whether the report has the SHA-256 of the weight files, which takes longer than to read them.
        on_start: For progress: called once with the tensors, and what is read of each in bytes.
        on_tensor: Called with the tensor's name and None when it is begun, and with its row when it is done.

    Returns:
        A report whose rows have the ranks found, and the verdict on what `recover` would write.

    Raises:
        InputError: The models cannot be read, or too few of them fit together and share a base.
    """
    started = time.perf_counter()
    command = {"name": "inspect", "argv": command_line(), "rank": rank or "auto", "device": str(device or "cpu")}
    if not models:
        raise InputError("no model given", "inspect looks at one at least", "add models")
    shown = rows_to_read(models, rows)
    with Models(models, merge_dtype, shown) as given:
        if len(models) == 1:
            (model,) = given.models
            alone = InputRow(model.spec, _hashes(model, hashes), notes=describe(model))
            return Report(command, (alone,), (), time.perf_counter() - started)
        selection = select(given, min(3, len(models)))
        family = ModelSet([given.models[i] for i in selection.members])

        closer = some_of_each_pattern({name: family.shape(name) for name in family.names})

        def look(name: str, held: Held) -> tuple[TensorResult, None]:
            return _look(name, held, rank, device), None

        def glance(name: str) -> TensorResult | None:
            return _look_at_light(family, name, device, name in closer)

        found: dict[str, TensorResult] = {}
        for result, _ in map_tensors(family, look, on_tensor, device=device, on_start=on_start, glance=glance):
            found[result.name] = result
        looked_at = [found[name] for name in family.names]
        inputs = tuple(
            InputRow(model.spec, _hashes(model, hashes), selection.reason(i), given.common.notes(i))
            for i, model in enumerate(given.models)
        )
        if shown is not None:
            looked_at = [_hedged(row, family, shown) for row in looked_at]
        reading = given.reading
    return Report(command, inputs, tuple(looked_at), time.perf_counter() - started, reading=reading)


def _hashes(model: Checkpoint, wanted: bool) -> dict[str, str]:
    return model.hashes() if wanted else model.known_hashes()


def _hedged(row: TensorResult, family: ModelSet, rows: int) -> TensorResult:
    """Rows that were not looked at may differ."""
    if row.verdict is not Verdict.SHARED or len(row.shape) < 2 or row.shape[0] <= rows:
        return row
    sure = surely_shared([family.models[i] for i in family.holders(row.name)], row.name)
    return row if sure else replace(row, reason=f"identical in the {rows} rows that were looked at")


def _look_at_light(
    family: ModelSet, name: str, device: torch.device | str | None, look_closer: bool
) -> TensorResult | None:
    """The row of a tensor whose deltas are below a step; None of another.

    What `recover` does there takes long, and is left to it.
    """
    holders = family.holders(name)
    bits = find_bit_change([family.models[i] for i in holders], name)
    if not bits.light:
        return None
    row = describe_change(family.models, holders, holders, name, bits, device, look_closer).tensor
    verdict = Verdict.APPROXIMATE if row.enough else Verdict.NOT_DETERMINED
    reason = f"{BELOW_A_STEP}; " + ("recover looks for the base's bits" if row.enough else "a third model is needed")
    return TensorResult(name, row.shape, "", verdict, str(Origin.NONE), reason, Origin.NONE, row.ranks)


def _look(name: str, held: Held, rank: int | None, device: torch.device | str | None) -> TensorResult:
    if len(held.tensors) > 2:
        # The tensor is recovered to the end: a rank alone does not show whether the answer fits.
        return solve_tensor(name, held, Auto(), rank, device).result
    if not all(tensor.is_floating_point() for tensor in held.tensors):
        return result_of(name, held, Verdict.NOT_DETERMINED, Origin.NONE, "not floating point")
    stack = Stack.of([matricise(tensor) for tensor in held.tensors], device=device, noise=held.noise)
    seen = told_by_others(stack)
    if min(stack.shape) == 1:
        reason = "a vector cannot be low-rank: it can only be averaged"
        return result_of(name, held, Verdict.AVERAGED, Origin.MEAN, reason)
    difference = find_differences(seen, rank).of(0, 1)
    reason = f"the difference has rank {difference.rank}; a third model is needed to split it"
    if difference.full_rank:
        reason = str(NotLowRank((difference.pair,), stack.shape))
    return result_of(name, held, Verdict.NOT_DETERMINED, Origin.NONE, reason)
