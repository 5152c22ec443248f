"""The pipeline: tensors of a family, one at a time, through a solver into the writer and the report."""

import time
from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from detune._runtime import OnStart, command_line
from detune.certificate.verdict import Verdict
from detune.checkpoints import CheckpointFiles, PrivatePaths, Target, absolute, claim, identity, resolved
from detune.checkpoints.cards import read_card
from detune.compatibility.groups import Selection, select
from detune.compatibility.model_set import Models, ModelSet
from detune.errors import InputError
from detune.methods import SOLVERS, Mean, Single
from detune.numerics.device import full_precision
from detune.origin import Origin
from detune.problem import NotRecoverable, Recovery, Solver, Stack
from detune.problem.solving import solve
from detune.recovery.execution import (
    Job,
    Processes,
    complete,
    completed_before,
    hashing,
    kept_for_later,
    require_unchanged,
)
from detune.recovery.loop import OnTensor
from detune.recovery.report import InputRow, Report, TensorResult
from detune.recovery.results import Results


@full_precision()
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
        method: A name in `detune.methods.SOLVERS`, or a solver with hyperparameters of your own.
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
    require_enough(solver, prepared.n)
    check_rank(rank)
    if min(prepared.shape) == 1 and not isinstance(solver, Mean | Single):
        raise NotRecoverable(
            f"a {prepared.shape[0]}x{prepared.shape[1]} matrix is a vector", "it cannot be low-rank", "use mean"
        )
    return solver.solve(prepared, rank) if isinstance(solver, Single) else solve(solver, prepared, rank)


def recover(
    models: Sequence[str | Path],
    out: str | Path,
    method: str | Solver = "auto",
    *,
    rank: int | None = None,
    device: torch.device | str | None = None,
    overwrite: bool = False,
    merge_dtype: torch.dtype | None = None,
    like: str | Path | None = None,
    adapters: str | Path | None = None,
    dtype: torch.dtype | None = None,
    mask: str | Path | None = None,
    check: bool = False,
    card: bool = True,
    on_start: OnStart | None = None,
    on_tensor: OnTensor | None = None,
    executor: Executor | None = None,
) -> Report:
    """Recover the base checkpoint of several merged LoRA fine-tunes.

    Tensors are solved side by side, as many as memory and threads allow, while the next is read and the last is
    written. Tensors that are identical in all models are copied byte for byte. The output has the layout that most of
    the models have, of several the first one's: its files, names, dtypes, metadata, config and tokenizer, and
    `detune.json` and a card beside them. It appears in one step when it is whole. Until then completed tensors are kept
    in a hidden directory beside it; a run that is cut off is finished by calling it again.

    Models that do not share a source with most are left out, and the report says so. A tensor is recovered from the
    models that have it. `mean`, `single`, `lokr`, `dora`, `shira` and `vera` take the models as they are.

    Args:
        models: Directories, files, Hub ids or `BASE+ADAPTER`; see `detune.checkpoints.open_checkpoint`.
        out: The directory to make.
        method: A name in `detune.methods.SOLVERS`, or a solver with hyperparameters of your own.
        rank: The most that any adapter's rank can be; None finds each model's rank in each tensor.
        device: Where to compute; None is the CPU.
        overwrite: Whether what an earlier `recover` wrote to `out` may be replaced, if nothing was added or changed.
        merge_dtype: For `BASE+ADAPTER`: merge in this dtype instead of the base's.
        like: A model, one of these or another, whose files, names and tokens the output takes; None takes those that
            most models have.
        adapters: A directory to make with each model's LoRA as a PEFT adapter of the base, as `extract` does.
        dtype: Store every float tensor in this dtype instead of the first model's: bfloat16 for a bf16 base that
            float32 merges gave away.
        mask: A file to make, as `numpy.load` reads it: for each tensor on a grid, where its bits are certain, bool.
        check: Whether to recover from parts of more than three models too, and see whether they agree: with four or
            five models that many recoveries more, from six on two of half as many models.
        card: Whether to write README.md, with metadata for the Hub, and keep the models' own under other names.
        on_start: For progress: called once with the tensors that are to come, and what is read of each in bytes.
        on_tensor: Called with the tensor's name and None when it is begun, and with its row when it is done.
        executor: Whose workers compute: `detune.recovery.execution.Processes`, Dask's `Client.get_executor()`, or any
            other of `concurrent.futures`. They see the models and `out` by the same paths. None computes in this
            process.

    Returns:
        The report, as written to `detune.json`.

    Raises:
        InputError: The models cannot be read, or too few of them fit together and share a base.
        OutputError: `out` cannot be written, or another run is writing to it.
        DetuneError: Workers were lost.

    Example:
        >>> report = recover(["ft-a", "ft-b", "ft-c"], out="base")  # doctest: +SKIP
        >>> report.counts  # doctest: +SKIP
        {<Verdict.SHARED: 'shared'>: 91, <Verdict.FLOOR: 'to the storage floor'>: 12}
    """
    started = time.perf_counter()
    solver = make_solver(method)
    check_rank(rank)
    if not models:
        require_enough(solver, 0)
    with ExitStack() as opened:
        given = opened.enter_context(Models(models, merge_dtype, like=like))
        if not given.has_base:
            require_enough(solver, len(models))
        target = Target(resolved(out), overwrite, tuple(given.paths))
        results = Results(target, _resolved(adapters), _resolved(mask))
        results.check()
        hashes = opened.enter_context(hashing(given.models, merge_dtype, executor))
        selection = select_models(given, solver)
        layout = None if like is None else given.reference
        family = opened.enter_context(ModelSet([given.models[i] for i in selection.members], like=layout))
        job = Job(
            tuple(absolute(model.spec) for model in family.models),
            None if like is None else absolute(like),
            tuple(map(identity, family.models)),
            merge_dtype,
            Path(),
            solver,
            rank,
            device,
            dtype,
            check,
            mask is not None,
            str(target.out) if adapters else None,
            executor is not None and not isinstance(executor, Processes),
        )
        run_directory = opened.enter_context(claim(target.out, job.key))
        opened.enter_context(kept_for_later(run_directory))
        report = results.finished(run_directory)
        if report is not None:
            run_directory.remove()
            return report
        job = replace(job, run_directory=run_directory.directory)
        files = CheckpointFiles(family.layout, run_directory.checkpoint, dtype, parts=family.parts)
        before = completed_before(run_directory, files, target, family)
        completed = complete(job, family, run_directory, before, executor, on_tensor, on_start)
        rows = tuple(completed[name].row for name in family.names)
        if not isinstance(solver, Mean | Single) and not family.has_base:
            _refuse_if_hopeless(rows, family.n)
        inputs = tuple(
            InputRow(model.spec, hashed(), selection.reason(i), given.common.notes(i))
            for i, (model, hashed) in enumerate(zip(given.models, hashes, strict=True))
        )
        require_unchanged(job, family)
        command = {
            "name": "recover",
            "argv": command_line(),
            "method": repr(solver),
            "rank": rank or "auto",
            "device": str(device or "cpu"),
            "check": check,
            "merge_dtype": str(merge_dtype) if merge_dtype else None,
            "like": family.layout.spec,
        }
        report = Report(command, inputs, rows, time.perf_counter() - started)
        named = (target.out, like or "", adapters or "", mask or "")
        places = PrivatePaths(target.out, [*models, *given.paths, *named, *command_line()])
        cards = tuple(map(read_card, given.models)) if card else None
        report = results.write(run_directory, completed, files, report, family, places, cards)
        run_directory.remove()
    return report


def _resolved(path: str | Path | None) -> Path | None:
    return None if path is None else resolved(path)


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


def select_models(given: Models, solver: Solver) -> Selection:
    """The models that share a base; all, where the method asks for no low ranks to tell."""
    if len(given.models) < 2 or not solver.low_rank:
        return Selection(tuple(range(len(given.models))))
    return select(given, 1 if given.has_base else solver.min_models)


def _refuse_if_hopeless(rows: Sequence[TensorResult], n: int) -> None:
    """Nothing is written where nothing could be had."""
    if n < 3 and not any(row.grid for row in rows):
        # One checkpoint whose every entry lies on a grid may be the base, or was rounded when it was merged.
        lost = [row for row in rows if row.verdict is Verdict.NOT_DETERMINED]
        # A matrix says more than a counter does.
        reason = max(lost, key=lambda row: len(row.shape)).reason if lost else "every entry lies on it"
        raise InputError(f"{n} model{'s' * (n != 1)} show{'s' * (n == 1)} no delta against a grid of the base", reason)
    # Integers that differ are no matrices, and stand as the first model has them.
    hopeless = [row for row in rows if row.verdict is Verdict.NOT_DETERMINED and row.origin is Origin.MEAN]
    if hopeless and not any(row.is_solved for row in rows):
        raise InputError(
            f"none of {len(hopeless)} changed matrices can be recovered",
            f"{hopeless[0].name!r}: {hopeless[0].reason}",
        )


def require_enough(solver: Solver, n: int) -> None:
    """Refuse fewer models than a method needs.

    Raises:
        InputError: They are too few.
    """
    if n >= solver.min_models:
        return
    name = type(solver).__name__.lower()
    if solver.min_models == 3:
        raise InputError(
            f"{n} model{'s' * (n != 1)} given, {name} needs at least three",
            "the difference of two models splits into two adapters in infinitely many ways, and a third decides",
            "add a model; try --method lattice, if the base is coarser than the models; or average with --method mean",
        )
    raise InputError(f"{n} model{'s' * (n != 1)} given, {name} needs at least {solver.min_models}", "add a model")


def check_rank(rank: int | None) -> None:
    """Refuse a rank that is none.

    Raises:
        InputError: It is not positive.
    """
    if rank is not None and rank < 1:
        raise InputError(f"rank {rank}: expected a positive number, or none to find it")
