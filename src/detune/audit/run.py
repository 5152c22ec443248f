"""The audit: what an outsider gets from the releases, one more at a time."""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from detune._runtime import OnStart, command_line, versions
from detune.audit.adapters import ADAPTERS, ChangeSpectra, changes_are_known, find_in_adapters, read_references
from detune.audit.assumptions import ASSUMPTIONS, Evidence, check_assumptions
from detune.audit.behaviour import Judge
from detune.audit.findings import FINDINGS, curve_of, find, verdict_of
from detune.audit.members import base_in_frame, find_members
from detune.audit.naming import Position, positions
from detune.audit.record import AuditReport, Behaviour, Invocation, ModelEntry, TensorEntry, Tool, Unchanged
from detune.audit.spectra import spectrum
from detune.audit.trial import Trial, Tried
from detune.certificate.verdict import Verdict
from detune.checkpoints import Checkpoint, CheckpointWriter, Unmerged, open_checkpoint, raw, temporary_directory
from detune.compatibility.model_set import Held, Models, ModelSet, damaged
from detune.compatibility.shared import is_shared
from detune.errors import InputError
from detune.origin import Origin
from detune.problem import Solver
from detune.recovery.api import make_solver
from detune.recovery.loop import OnTensor, map_tensors
from detune.recovery.report import TensorResult
from detune.recovery.tensor import result_of

__all__ = ["audit"]

# The number of matrices whose spectra are shown.
SPECTRA = 6


def audit(
    models: Sequence[str | Path],
    base: str | Path | None = None,
    *,
    method: str | Solver = "auto",
    rank: int | None = None,
    inputs: str | Path | None = None,
    weights_only: bool = False,
    device: torch.device | str | None = None,
    merge_dtype: torch.dtype | None = None,
    trained: str | Path | None = None,
    on_start: OnStart | None = None,
    on_tensor: OnTensor | None = None,
) -> AuditReport:
    """Recover the base as an outsider would, from the first release, from the first two, and so on.

    Few tensors' stacks are in memory at a time. The models are not changed; where they are run, the recovered one is
    written to a temporary directory.

    Args:
        models: The releases, in the order in which they go out; see `detune.checkpoints.open_checkpoint`.
        base: What they were fine-tuned from, to measure against; None goes by the certificate's prediction.
        method: The recovery with three releases and more: a name in `detune.methods.SOLVERS`, or a solver. With fewer,
            and no matter which, the base's grid is tried (`lattice`), because nothing else can work.
        rank: The most that any adapter's rank can be; None finds it.
        inputs: What the models are run on, as `detune.bench.behaviour` takes it; None takes some English sentences.
        weights_only: Whether not to run the models.
        device: Where to compute; None is the CPU.
        merge_dtype: For `BASE+ADAPTER`: merge in this dtype instead of the base's.
        trained: A CSV file of adapters whose training is known, with the columns adapter, examples and group: then the
            size of each release's training set is estimated by them, see `detune.audit.dataset_size`.
        on_start: For progress: called once with the tensors, and what is read of each in bytes.
        on_tensor: Called with the name of each tensor and None when it is begun, with its row when it is done.

    Returns:
        The report; `detune.audit.page.render` makes a page of it.

    Raises:
        InputError: A model cannot be read, or has another architecture; nothing was changed; the base is another's.

    Example:
        >>> audit(["ft-a", "ft-b", "ft-c"], base="base").verdict.headline  # doctest: +SKIP
        'These 3 releases give the base away.'
    """
    started = time.perf_counter()
    if not models:
        raise InputError("no model given", "an audit is of one release at least", "add models")
    solver = make_solver(method)
    with ExitStack() as opened:
        folder = opened.enter_context(temporary_directory("audit"))
        given = opened.enter_context(Models(models, merge_dtype))
        given_base = opened.enter_context(open_checkpoint(base)) if base is not None else None
        _require_merged(given)
        members = find_members(given.models, folder, opened)
        family = opened.enter_context(ModelSet(members.used))
        trial = Trial(solver, rank, device, members.turned, members.noisy)
        viewed = None if given_base is None else family.view(given_base)
        truth = None if viewed is None else base_in_frame(viewed, family.models[0], folder, opened)
        judge = None if weights_only else Judge(family.models[0], truth, Path(inputs) if inputs is not None else None)
        references = () if trained is None else read_references(Path(trained), family.models[0])
        spectra = ChangeSpectra(family.n)
        recovered = folder / "recovered" if judge is not None and judge.is_ready else None
        kept = spectra if references else None
        attempt = _Attempt(family, truth, trial, kept, positions(family.names))
        tensors, unchanged = _try_all(attempt, recovered, on_start, on_tensor)
        if not tensors:
            raise InputError(
                f"{family.models[0].spec} is the base", "no tensor differs from it", "give fine-tunes of the base"
            )
        entries = tuple(
            ModelEntry(spec=model.spec, sha256=model.hashes(), left_out=members.why(i), realigned=i in members.moved)
            for i, model in enumerate(given.models)
        )
        base_entry = None
        if given_base is not None:
            moved = truth is not viewed
            base_entry = ModelEntry(spec=given_base.spec, sha256=given_base.hashes(), realigned=moved)
        behaviour = Behaviour(note="not run: the weights alone were asked for" if judge is None else judge.note)
        if judge is not None and recovered is not None:
            behaviour = judge.judge(recovered)
    curve = curve_of([entry for entry in tensors if entry.is_matrix], family.n)
    used = [entry for entry in entries if entry.left_out is None]
    evidence = Evidence(entries, members.groups, [entry for entry in tensors if entry.is_matrix])
    return AuditReport(
        tool=Tool(versions=versions()),
        invocation=Invocation(
            argv=command_line(),
            method=method if isinstance(method, str) else repr(method),
            rank=rank,
            device=str(device or "cpu"),
            seconds=time.perf_counter() - started,
        ),
        base=base_entry,
        models=entries,
        verdict=verdict_of(tensors, curve, unchanged, behaviour, None if truth is None else truth.tensors),
        rules=(*ASSUMPTIONS, *FINDINGS, *ADAPTERS),
        results=(
            *check_assumptions(evidence),
            *find(tensors, curve, unchanged, entries, behaviour),
            *find_in_adapters(tensors, used, truth is not None, spectra, references),
        ),
        curve=curve,
        unchanged=unchanged,
        tensors=tensors,
        behaviour=behaviour,
    )


def _require_merged(releases: Models) -> None:
    """Refuse a release that needs no recovery.

    Raises:
        InputError: One holds the base itself.
    """
    for model in releases.models:
        if isinstance(raw(model), Unmerged):
            raise InputError(
                f"{model.spec} gives the whole base away",
                "it holds the base's own weights, beside an adapter that was not merged",
                "release the adapter alone, or merge it with PEFT's merge_and_unload and audit that",
            )


@dataclass(frozen=True)
class _Attempt:
    """An attempt at each tensor with one release, with two, and so on.

    Attributes:
        family: The releases.
        base: What they were fine-tuned from; None where it was not given.
        trial: How a matrix is recovered.
        spectra: Takes the spectra of the changes; None where nothing asks for them.
        position_of: Where each tensor is in the model.
    """

    family: ModelSet
    base: Checkpoint | None
    trial: Trial
    spectra: ChangeSpectra | None
    position_of: Mapping[str, Position]

    def __call__(self, name: str, held: Held) -> tuple[TensorResult, Tried | None]:
        """Try one tensor; None where it is copied."""
        family = self.family
        if len(held.tensors) < family.n:
            # A tensor that some releases lack cannot tell which release was the one too many.
            return result_of(name, held, Verdict.NOT_DETERMINED, Origin.SINGLE, "not in all releases"), None
        truth, first = self._truth(name), held.tensors[0]
        if truth is not None and family.n == 1 and first.dtype == truth.dtype and torch.equal(first, truth):
            return result_of(name, held, Verdict.SHARED, Origin.COPY, "as the base has it"), None
        tried = self.trial.run(name, self.position_of[name], held, truth)
        if self.spectra is not None and changes_are_known(tried.entry, truth is not None):
            weight = tried.weight if truth is None else truth
            self.spectra.add(name, held.tensors, weight, tried.entry.outcomes[-1].ranks)
        files = tuple(model.tensors[name].file for model in family.models)
        return tried.result, replace(tried, entry=tried.entry.model_copy(update={"files": files}))

    def _truth(self, name: str) -> Tensor | None:
        if self.base is None or name not in self.base.tensors:
            return None
        truth = self.base.read(name)
        if truth.is_floating_point() and not bool(torch.isfinite(truth).all()):
            raise damaged(name, self.base.spec)
        return truth


def _try_all(
    attempt: _Attempt, recovered: Path | None, on_start: OnStart | None, on_tensor: OnTensor | None
) -> tuple[tuple[TensorEntry, ...], Unchanged]:
    """Every tensor; the recovered model is written to a directory where one is named."""
    family, device = attempt.family, attempt.trial.device
    found: dict[str, TensorEntry] = {}
    same: set[str] = set()
    with ExitStack() as opened:
        writer = None
        if recovered is not None:
            writer = opened.enter_context(CheckpointWriter(family.layout, recovered, parts=family.parts))
        for result, tried in map_tensors(family, attempt, on_tensor, device=device, on_start=on_start):
            if tried is not None:
                found[result.name] = tried.entry
            elif result.origin is Origin.COPY:
                same.add(result.name)
            if writer is not None:
                _write(writer, family, result.name, tried)
    entries = [found[name] for name in family.names if name in found]
    tensors = _with_spectra(entries, family) if family.n > 1 else tuple(entries)
    unchanged = Unchanged(
        tensors=len(same),
        entries=sum(math.prod(family.shape(name)) for name in same),
        differing=tuple(name for name in family.names if name in same and _differs(family, attempt.base, name)),
    )
    return tensors, unchanged


def _write(writer: CheckpointWriter, family: ModelSet, name: str, tried: Tried | None) -> None:
    original = family.original(name)
    if tried is not None:
        writer.write(name, tried.weight)
    elif original is None:
        writer.copy(name)
    else:
        writer.write(name, original.read(name))


def _differs(family: ModelSet, base: Checkpoint | None, name: str) -> bool:
    """Whether the base has another tensor than the releases, which all have one."""
    models = [family.models[i] for i in family.holders(name)[:1]]
    return base is not None and name in base.tensors and bool(models) and not is_shared((base, *models), name)


def _with_spectra(entries: Sequence[TensorEntry], family: ModelSet) -> tuple[TensorEntry, ...]:
    """The entries, some matrices over the depth of the model with the spectrum of a difference."""
    matrices = [entry.name for entry in entries if entry.is_matrix]
    count = min(SPECTRA, len(matrices))
    chosen = {matrices[round(k * (len(matrices) - 1) / max(1, count - 1))] for k in range(count)}
    return tuple(
        entry.model_copy(
            update={"spectrum": spectrum([m.read(entry.name) for m in family.models[:2]], entry.outcomes[-1].ranks)}
        )
        if entry.name in chosen
        else entry
        for entry in entries
    )
