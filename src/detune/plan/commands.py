"""The plan of each command: models are opened and chosen as it does, by some rows of each matrix."""

import math
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from detune.adapters.changes import ChangeFitter
from detune.adapters.extract import require_base
from detune.checkpoints import (
    Checkpoint,
    CheckpointFiles,
    Target,
    check_new,
    check_repository,
    identity,
    open_checkpoint,
    raw,
    require_outside,
    resolved,
    what_to_push,
)
from detune.checkpoints.cards import read_card
from detune.compatibility.model_set import ROWS_ON_HUB, Models, ModelSet
from detune.compatibility.shared import is_shared
from detune.packing.packer import require_alike
from detune.plan.report import Made, Plan, Read, Spent
from detune.plan.timing import carrying, compressing, moving, opening, time_fits, time_recovery
from detune.problem import Solver
from detune.recovery.api import check_rank, make_solver, require_enough, select_models
from detune.recovery.results import Results

__all__ = ["plan_extraction", "plan_pack", "plan_push", "plan_recovery"]

# A LoRA's factors are stored in float32.
FACTOR_BYTES = 4


def plan_recovery(
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
) -> Plan:
    """Tell what `recover` would do with the same arguments.

    Raises:
        InputError: The models cannot be read, or too few of them fit together and share a base.
        OutputError: `out` cannot be written, or the disk has no space.
    """
    began = time.perf_counter()
    solver = make_solver(method)
    check_rank(rank)
    with ExitStack() as opened:
        given = opened.enter_context(Models(models, merge_dtype, ROWS_ON_HUB, like))
        if not given.has_base:
            require_enough(solver, len(models))
        target = Target(resolved(out), overwrite, tuple(given.paths))
        places = (None if path is None else resolved(path) for path in (adapters, mask))
        Results(target, *places).check(clean=False)
        selection = select_models(given, solver)
        layout = None if like is None else given.reference
        family = opened.enter_context(ModelSet([given.models[i] for i in selection.members], like=layout))
        for model in family.models:
            # The run knows its models again by this: what cannot be read is refused here as it is there.
            identity(model)
        files = CheckpointFiles(family.layout, target.out, dtype, parts=family.parts)
        target.require_space(files.needed_bytes)
        changed = [name for name in family.names if family.copied(name) is None]
        opened_seconds = time.perf_counter() - began

        fitter = None if adapters is None else ChangeFitter(family, str(target.out), rank, device)
        solved = time_recovery(family, changed, files, solver, rank, device, check, fitter)
        what = "recovering" if fitter is None else "recovering and fitting adapters"
        spent = [opening(opened_seconds, solved)]
        spent += [] if solved is None else [solved.spent(what, family, changed)]
        layout_files = (family.layout.weight_files, family.layout.index_files, files.side_files)
        # One more file is the report.
        made = sum(map(len, layout_files)) + 1 + _cards(family) * card
        writes = [Made("checkpoint", str(out), made, files.needed_bytes, "exactly")]
        if adapters is not None and solved is not None:
            writes.append(_adapters(adapters, family, changed, rank or max(solved.ranks, default=0), card))
        if mask is not None:
            writes.append(Made("mask", str(mask), 1, sum(math.prod(family.shape(name)) for name in changed), "at most"))
        reads = tuple(_read(model, selection.reason(i)) for i, model in enumerate(given.models))
        copied = len(family.parts) - len(changed)
    return Plan("recover", reads, len(changed), copied, tuple(writes), _free(out), (*spent, *moving(reads, 1)))


def plan_extraction(
    models: Sequence[str | Path],
    out: str | Path,
    *,
    base: str | Path,
    rank: int | None = None,
    denoise: bool = False,
    device: torch.device | str | None = None,
    card: bool = True,
) -> Plan:
    """Tell what `extract` would do with the same arguments.

    Raises:
        InputError: A model cannot be read, does not fit the base, or was not fine-tuned from it by LoRA.
        OutputError: `out` exists.
    """
    began = time.perf_counter()
    check_new(resolved(out))
    with open_checkpoint(base, rows=ROWS_ON_HUB) as opened, ModelSet(models, rows=ROWS_ON_HUB, like=opened) as family:
        require_base(family.reference, family.models, full=denoise)
        changed = _changed_from(family.reference, family)
        opened_seconds = time.perf_counter() - began
        fitter = ChangeFitter(family, opened.spec, rank, device, denoise=denoise)
        fitted = time_fits(family.reference, family, changed, fitter)
        spent = [opening(opened_seconds, fitted)]
        spent += [] if fitted is None else [fitted.spent("fitting adapters", family, changed)]
        found = max(() if fitted is None else fitted.ranks, default=0)
        writes = (_adapters(out, family, changed, rank or found, card),)
        reads = tuple(_read(model) for model in (opened, *family.models))
        copied = len(family.parts) - len(changed)
    return Plan("extract", reads, len(changed), copied, writes, _free(out), (*spent, *moving(reads, 1)))


def plan_pack(
    models: Sequence[str | Path],
    out: str | Path,
    *,
    base: str | Path | None = None,
    rank: int | None = None,
    device: torch.device | str | None = None,
) -> Plan:
    """Tell what `pack` would do with the same arguments.

    Raises:
        InputError: A model cannot be read, does not fit the others, or was not fine-tuned from the base by LoRA.
        OutputError: `out` exists.
        DetuneError: The extra `pack` is not installed.
    """
    began = time.perf_counter()
    target = resolved(out)
    check_new(target, directory=False)
    spent: list[Spent] = []
    with ExitStack() as opened:
        family = opened.enter_context(ModelSet(models, rows=ROWS_ON_HUB))
        require_alike(family)
        require_outside(target, [place for model in family.models for place in model.places])
        reads = [_read(model) for model in family.models]
        input_bytes = sum(read.size_bytes for read in reads)
        reference = family.reference
        if base is None:
            # A pack without a base recovers one beside it.
            before = time.perf_counter()
            recovery = plan_recovery(models, target.with_name(f"{target.name}.base"), rank=rank, device=device)
            spent += [part for part in recovery.time if part.what == "recovering"]
            opened_again = sum(part.seconds for part in recovery.time if part.what == "opening")
            began += time.perf_counter() - before - opened_again
        else:
            given = opened.enter_context(open_checkpoint(base, rows=ROWS_ON_HUB))
            reads.append(_read(given))
            reference = family.view(given)
            require_base(reference, family.models)
        changed = _changed_from(reference, family)
        opened_seconds = time.perf_counter() - began
        fitted = time_fits(reference, family, changed, ChangeFitter(family, reference.spec, rank, device))
        spent.insert(0, opening(opened_seconds, fitted))
        spent += [] if fitted is None else [fitted.spent("fitting adapters", family, changed)]
        spent.append(compressing(family, input_bytes))
        copied = len(family.parts) - len(changed)
    writes = (Made("pack", str(out), 1, input_bytes, "at most"),)
    return Plan("pack", tuple(reads), len(changed), copied, writes, _free(out), (*spent, *moving(reads, 2)))


def plan_push(directory: str | Path, repository: str, *, public: bool = False) -> Plan:
    """Tell what `push` would do with the same arguments: the Hub is asked, and nothing is sent.

    Raises:
        InputError: The directory holds nothing that can be published.
        OutputError: The Hub refuses, or the repository has other files.
    """
    found = what_to_push(directory)
    check_repository(repository, public, found)
    upload = Made("upload", repository, len(found.files), found.total_bytes, "at most")
    return Plan("push", (), 0, 0, (upload,), None, (carrying("uploading", found.total_bytes),))


def _read(model: Checkpoint, left_out: str | None = None) -> Read:
    whole = raw(model)
    # The Hub tells the hashes of what is read where it is.
    download_bytes = whole.total_bytes if whole.known_hashes() else 0
    return Read(model.spec, len(whole.weight_files), len(whole.tensors), whole.total_bytes, download_bytes, left_out)


def _changed_from(base: Checkpoint, family: ModelSet) -> list[str]:
    """The tensors in which a model differs from the base, in the rows that are shown."""
    holders = {name: [family.models[i] for i in family.holders(name)] for name in family.names if name in base.tensors}
    return [name for name, models in holders.items() if models and not is_shared((base, *models), name)]


def _cards(family: ModelSet) -> int:
    """The models' own cards, which are kept, and a new one."""
    return 1 + sum(len(read_card(model).texts) for model in family.models)


def _adapters(out: str | Path, family: ModelSet, changed: Sequence[str], rank: int, card: bool) -> Made:
    """Adapters of one rank everywhere: configuration, weights and card each, with a report and a card for all."""
    files = 2 * family.n + 1 + (family.n + _cards(family)) * card
    shapes = [family.shape(name) for name in changed]
    sizes = [rank * (shape[0] + math.prod(shape[1:])) * FACTOR_BYTES for shape in shapes if len(shape) > 1]
    return Made("adapters", str(out), files, family.n * sum(sizes), "about")


def _free(out: str | Path) -> int:
    return shutil.disk_usage(next(parent for parent in resolved(out).parents if parent.exists())).free
