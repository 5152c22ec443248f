"""The pipeline: tensors of a family, one at a time, through a solver into the writer and the report."""

import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from detune.checkpoints import CheckpointWriter
from detune.errors import InputError
from detune.family import Family
from detune.report import InputRow, Report, Status, TensorRow
from detune.solvers import SOLVERS, Mean, NotLowRank, NotRecoverable, Recovery, Single, Solver, Stack
from detune.solvers.auto import FLOOR_RATIO, unchanged
from detune.walk import Answer, OnTensor, matricise, walk


def recover_matrix(
    stack: Tensor | Sequence[Tensor],
    method: str | Solver = "auto",
    *,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Recovery:
    """Recover one weight matrix from several models' versions of it.

    Args:
        stack: `(models, out, in)`, or a sequence of `(out, in)`; any float dtypes, as stored.
        method: A name in `detune.solvers.SOLVERS`, or a solver with hyperparameters of your own.
        rank: The most that any adapter's rank can be; None finds each from the data.
        dtype: Compute dtype, float32 or float64; None decides by the storage noise.
        device: Where to compute; None is where the stack lies.

    Returns:
        The recovery; its `weight` is `(out, in)` in the compute dtype.

    Raises:
        InputError: Not a stack of finite float matrices, or no such method.
        NotRecoverable: The method does not apply.

    Example:
        >>> import torch
        >>> W = torch.randn(64, 48, dtype=torch.float64, generator=torch.manual_seed(0))
        >>> stack = [W + torch.randn(64, 2).double() @ torch.randn(2, 48).double() for _ in range(3)]
        >>> recovery = recover_matrix(stack)
        >>> recovery.ranks, bool(torch.allclose(recovery.weight, W, atol=1e-12))
        ((2, 2, 2), True)

    Reference:
        Horwitz, Kahana & Hoshen 2024, arXiv 2402.10208.
    """
    solver = make_solver(method)
    prepared = Stack.of(stack, dtype, device)
    _check_count(solver, prepared.n)
    _check_rank(rank)
    if min(prepared.shape) == 1 and not isinstance(solver, Mean | Single):
        raise NotRecoverable(
            f"a {prepared.shape[0]}x{prepared.shape[1]} matrix is a vector", "it cannot be low-rank", "use mean"
        )
    return solver.solve(prepared, rank)


def recover(
    models: Sequence[str | Path],
    out: str | Path,
    method: str | Solver = "auto",
    *,
    rank: int | None = None,
    device: torch.device | str | None = None,
    overwrite: bool = False,
    merge_dtype: torch.dtype | None = None,
    on_tensor: OnTensor | None = None,
) -> Report:
    """Recover the base checkpoint of several merged LoRA fine-tunes.

    One tensor's stack is in memory at a time. Tensors that are identical in all models are copied byte for byte. The
    output has the layout of the first model: its files, names, dtypes, metadata, config and tokenizer, and
    `detune.json` beside them. It appears in one step when it is whole.

    Args:
        models: Directories, files, Hub ids or `BASE+ADAPTER`; see `detune.checkpoints.open_checkpoint`.
        out: The directory to make.
        method: A name in `detune.solvers.SOLVERS`, or a solver with hyperparameters of your own.
        rank: The most that any adapter's rank can be; None finds each model's rank in each tensor.
        device: Where to compute; None is the CPU.
        overwrite: Whether an existing checkpoint in `out` may be replaced.
        merge_dtype: For `BASE+ADAPTER`: merge in this dtype instead of the base's.
        on_tensor: Called with the tensor's name and None when it is begun, and with its row when it is done.

    Returns:
        The report, as written to `detune.json`.

    Raises:
        InputError: The models cannot be read, do not fit together, or one does not belong.
        OutputError: `out` cannot be written.

    Example:
        >>> report = recover(["ft-a", "ft-b", "ft-c"], out="base")  # doctest: +SKIP
        >>> report.counts  # doctest: +SKIP
        {<Status.SHARED: 'shared'>: 91, <Status.RECOVERED: 'recovered'>: 12}
    """
    started = time.perf_counter()
    solver = make_solver(method)
    _check_count(solver, len(models))
    _check_rank(rank)
    with (
        Family(models, merge_dtype) as family,
        CheckpointWriter(
            family.models[0],
            out,
            overwrite=overwrite,
            inputs=[path for m in family.models for path in m.paths],
        ) as writer,
        ThreadPoolExecutor(1, thread_name_prefix="detune-hash") as background,
    ):

        def keep(name: str) -> None:
            writer.copy(name)

        def solve(name: str, tensors: tuple[Tensor, ...]) -> Answer:
            answer, weight = solve_tensor(tensors, solver, rank, device)
            writer.write(name, weight.reshape(tensors[0].shape))
            return answer

        hashes = [background.submit(model.hashes) for model in family.models]
        try:
            rows = walk(family, keep, solve, on_tensor)
            if not isinstance(solver, Mean | Single):
                _refuse_if_hopeless(rows)
            inputs = [InputRow(m.spec, h.result()) for m, h in zip(family.models, hashes, strict=True)]
        except BaseException:
            background.shutdown(wait=False, cancel_futures=True)
            raise
        command = {
            "name": "recover",
            "argv": sys.argv,
            "method": repr(solver),
            "rank": rank or "auto",
            "device": str(device or "cpu"),
            "merge_dtype": str(merge_dtype) if merge_dtype else None,
        }
        report = Report(command, tuple(inputs), tuple(rows), time.perf_counter() - started)
        writer.add_file("detune.json", report.to_json().encode())
    return report


def make_solver(method: str | Solver) -> Solver:
    """The solver of a name, with its defaults; a solver is returned as it is.

    Raises:
        InputError: No such method.
    """
    if not isinstance(method, str):
        return method
    if method not in SOLVERS:
        raise InputError(f"no method {method!r}: expected one of {', '.join(SOLVERS)}")
    return SOLVERS[method]()


def _refuse_if_hopeless(rows: Sequence[TensorRow]) -> None:
    """Nothing is written where nothing could be had."""
    # Integers that differ are no matrices, and stand as the first model has them.
    hopeless = [row for row in rows if row.status is Status.NOT_RECOVERABLE and row.method != "single"]
    if hopeless and not any(row.status in (Status.RECOVERED, Status.APPROXIMATE) for row in rows):
        raise InputError(
            f"none of {len(hopeless)} changed matrices can be recovered",
            f"{hopeless[0].name!r}: {hopeless[0].reason}",
        )


def solve_tensor(
    tensors: tuple[Tensor, ...], solver: Solver, rank: int | None, device: torch.device | str | None
) -> tuple[Answer, Tensor]:
    """The answer for one tensor that differs between the models, and its values in any shape."""
    if not all(tensor.is_floating_point() for tensor in tensors):
        reason = "not floating point, so there is no average; the first model's stand in"
        return Answer(Status.NOT_RECOVERABLE, "single", reason), tensors[0]
    stack = Stack.of([matricise(tensor) for tensor in tensors], device=device)
    if isinstance(solver, Mean | Single):
        return _answer(solver.solve(stack), Status.AVERAGED)
    if min(stack.shape) == 1:
        return _solve_vector(stack)
    try:
        recovery = solver.solve(stack, rank)
    except NotRecoverable as why:
        pairs = why.pairs if isinstance(why, NotLowRank) else ()
        answer, weight = _answer(Mean().solve(stack), Status.NOT_RECOVERABLE)
        return replace(answer, reason=str(why), full_rank_pairs=pairs), weight
    if recovery.noise_ratio is not None and recovery.noise_ratio <= FLOOR_RATIO:
        return _answer(recovery, Status.RECOVERED)
    answer, weight = _answer(recovery, Status.APPROXIMATE)
    left = (
        f"{recovery.noise_ratio:.2g} times the storage noise is left: adapters of these ranks do not explain the data"
    )
    return replace(answer, reason=f"{recovery.reason}; {left}"), weight


def _solve_vector(stack: Stack) -> tuple[Answer, Tensor]:
    """A vector has no low rank: only models that did not change it give it away."""
    untouched = unchanged(stack) if stack.n >= 3 else None
    if untouched is not None:
        return _answer(untouched, Status.RECOVERED)
    answer, weight = _answer(Mean().solve(stack), Status.AVERAGED)
    return replace(answer, reason=f"a vector cannot be low-rank: the average of {stack.n} models"), weight


def _answer(recovery: Recovery, status: Status) -> tuple[Answer, Tensor]:
    answer = Answer(
        status,
        recovery.method,
        recovery.reason,
        recovery.ranks,
        recovery.relative_residual,
        recovery.noise_ratio,
    )
    return answer, recovery.weight


def _check_count(solver: Solver, n: int) -> None:
    if n >= solver.min_models:
        return
    name = type(solver).__name__.lower()
    if solver.min_models == 3:
        raise InputError(
            f"{n} model{'s' * (n != 1)} given, {name} needs at least three",
            "the difference of two models splits into two adapters in infinitely many ways, and a third decides",
            "add a model, or average with --method mean",
        )
    raise InputError(f"{n} model{'s' * (n != 1)} given, {name} needs at least {solver.min_models}", "add a model")


def _check_rank(rank: int | None) -> None:
    if rank is not None and rank < 1:
        raise InputError(f"rank {rank}: expected a positive number, or none to find it")
