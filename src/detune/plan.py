"""What a command would read and write, and about how long it would take: `--dry-run`.

Models are opened and chosen as the command does it, by some rows of each matrix; one matrix is computed here, and the
time for all follows from the entries. Nothing is written.
"""

import hashlib
import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from detune._runtime import needs_extra
from detune.adapters.denoise import denoise_change
from detune.adapters.extract import require_base
from detune.adapters.fit import fit_adapter
from detune.checkpoints import (
    Checkpoint,
    CheckpointFiles,
    Target,
    check_new,
    check_repository,
    open_checkpoint,
    raw,
    require_outside,
    resolved,
    what_to_push,
)
from detune.checkpoints.cards import read_card
from detune.compatibility.model_set import ROWS_ON_HUB, Models, ModelSet
from detune.compatibility.shared import is_shared
from detune.documents import document, to_json
from detune.packing.archive import LEVEL
from detune.problem import NotLowRank, Solver
from detune.problem.stack import matricise
from detune.recovery.api import check_rank, make_solver, require_enough, select_models
from detune.recovery.results import Results
from detune.recovery.tensor import solve_tensor

__all__ = ["Made", "Plan", "Read", "Spent", "plan_extraction", "plan_pack", "plan_push", "plan_recovery"]

# The matrix that is computed to see how long it takes has so many entries at least, if there is one.
PROBE_ENTRIES = 2**17
# What is computed faster is computed again: the first time compiles and warms up.
WARM_SECONDS = 5.0
# What is hashed to see how long that takes.
HASHED_BYTES = 2**24
# Of connections nothing is known: 100 Mbit/s.
CONNECTION_BYTES_PER_SECOND = 12.5e6
# A LoRA's factors are stored in float32.
FACTOR_BYTES = 4


@dataclass(frozen=True)
class Read:
    """A model that would be read.

    Attributes:
        spec: As given.
        files: Number of weight files.
        tensors: Number of tensors.
        size_bytes: Their size.
        download_bytes: How much of it would come from the Hub.
        left_out: Why it would not be used; None where it would.
    """

    spec: str
    files: int
    tensors: int
    size_bytes: int
    download_bytes: int
    left_out: str | None = None


@dataclass(frozen=True)
class Made:
    """Something that would be written.

    Attributes:
        what: In one word: "checkpoint", "adapters", "mask", "pack", "upload".
        path: Where.
        files: Number of files.
        size_bytes: Its size.
        how_sure: "exactly", "about" or "at most".
    """

    what: str
    path: str
    files: int
    size_bytes: int
    how_sure: str


@dataclass(frozen=True)
class Spent:
    """A part of the time.

    Attributes:
        what: On what.
        seconds: How long.
        source: Where the figure comes from.
    """

    what: str
    seconds: float
    source: str


@dataclass(frozen=True)
class Plan:
    """What a command would do.

    Attributes:
        command: Its name.
        reads: The models.
        changed: Tensors that would be computed, as far as the rows that were looked at tell.
        copied: Tensors that would be copied.
        writes: What would be made.
        free_bytes: What the disk of the first of them has free; None where nothing is written to one.
        time: The parts of the estimate.
    """

    command: str
    reads: tuple[Read, ...]
    changed: int
    copied: int
    writes: tuple[Made, ...]
    free_bytes: int | None
    time: tuple[Spent, ...]

    @property
    def seconds(self) -> float:
        """The estimate."""
        return sum(part.seconds for part in self.time)

    def to_json(self) -> str:
        """The plan as JSON."""
        return to_json(document("detune-plan/1", asdict(self) | {"seconds": self.seconds}))


@dataclass(frozen=True)
class _Timed:
    """A part of a tensor that was computed."""

    name: str
    entries: int
    seconds: float
    ranks: tuple[int, ...]

    def spent(self, what: str, family: ModelSet, names: Sequence[str], times: int = 1) -> Spent:
        """The time for all tensors, each computed so many times."""
        entries = times * sum(math.prod(family.shape(name)) for name in names)
        source = (
            f"{self.entries} entries of {self.name} took {self.seconds:.2g} s here, and all are "
            f"{entries / self.entries:.3g} times as many"
        )
        return Spent(what, self.seconds * entries / self.entries, source)


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
        files = CheckpointFiles(family.layout, target.out, dtype, parts=family.parts)
        target.require_space(files.needed_bytes)
        changed = [name for name in family.names if family.copied(name) is None]

        def solve(name: str) -> Sequence[int | None]:
            return solve_tensor(name, family.held(name), solver, rank, device, None, check).result.ranks

        def fit(name: str) -> Sequence[int]:
            # One model for the base, which is not known yet.
            return _fit(family.held(name).tensors[0], family.held(name).tensors[1], rank, device)

        solved = _probe(family, changed, solve)
        spent = [] if solved is None else [solved.spent("recovering", family, changed)]
        layout_files = (family.layout.weight_files, family.layout.index_files, files.side_files)
        # With the report.
        made = sum(map(len, layout_files)) + 1 + _cards(family) * card
        writes = [Made("checkpoint", str(out), made, files.needed_bytes, "exactly")]
        if adapters is not None and solved is not None:
            fitted = _probe(family, changed, fit)
            spent += [] if fitted is None else [fitted.spent("fitting adapters", family, changed, family.n)]
            writes.append(_adapters(adapters, family, changed, rank or max(solved.ranks, default=0), card))
        if mask is not None:
            writes.append(Made("mask", str(mask), 1, sum(math.prod(family.shape(name)) for name in changed), "at most"))
        reads = tuple(_read(model, selection.reason(i)) for i, model in enumerate(given.models))
        copied = len(family.parts) - len(changed)
    return Plan("recover", reads, len(changed), copied, tuple(writes), _free(out), (*spent, *_moving(reads, 1)))


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
    check_new(resolved(out))
    with open_checkpoint(base, rows=ROWS_ON_HUB) as opened, ModelSet(models, rows=ROWS_ON_HUB, like=opened) as family:
        require_base(family.reference, family.models, full=denoise)
        changed = _changed_from(family.reference, family)
        fitted = _probe_fit(family.reference, family, changed, rank, device, denoise=denoise)
        spent = [] if fitted is None else [fitted.spent("fitting adapters", family, changed, family.n)]
        found = max(() if fitted is None else fitted.ranks, default=0)
        writes = (_adapters(out, family, changed, rank or found, card),)
        reads = tuple(_read(model) for model in (opened, *family.models))
        copied = len(family.parts) - len(changed)
    return Plan("extract", reads, len(changed), copied, writes, _free(out), (*spent, *_moving(reads, 1)))


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
    target = resolved(out)
    check_new(target, directory=False)
    spent: list[Spent] = []
    with ExitStack() as opened:
        family = opened.enter_context(ModelSet(models, rows=ROWS_ON_HUB))
        require_outside(target, [place for model in family.models for place in model.places])
        reads = [_read(model) for model in family.models]
        input_bytes = sum(read.size_bytes for read in reads)
        reference = family.reference
        if base is None:
            # As `recover` would, beside the pack.
            recovery = plan_recovery(models, target.with_name(f"{target.name}.base"), rank=rank, device=device)
            spent += [part for part in recovery.time if part.what == "recovering"]
        else:
            given = opened.enter_context(open_checkpoint(base, rows=ROWS_ON_HUB))
            reads.append(_read(given))
            reference = family.view(given)
            require_base(reference, family.models)
        changed = _changed_from(reference, family)
        fitted = _probe_fit(reference, family, changed, rank, device)
        spent += [] if fitted is None else [fitted.spent("fitting adapters", family, changed, family.n)]
        spent.append(_compressing(family, input_bytes))
        copied = len(family.parts) - len(changed)
    writes = (Made("pack", str(out), 1, input_bytes, "at most"),)
    return Plan("pack", tuple(reads), len(changed), copied, writes, _free(out), (*spent, *_moving(reads, 2)))


def plan_push(directory: str | Path, repository: str, *, public: bool = False) -> Plan:
    """Tell what `push` would do with the same arguments: the Hub is asked, and nothing is sent.

    Raises:
        InputError: The directory holds nothing that can be published.
        OutputError: The Hub refuses, or the repository has other files.
    """
    found = what_to_push(directory)
    check_repository(repository, public, found)
    upload = Made("upload", repository, len(found.files), found.total_bytes, "at most")
    return Plan("push", (), 0, 0, (upload,), None, (_carrying("uploading", found.total_bytes),))


def _read(model: Checkpoint, left_out: str | None = None) -> Read:
    whole = raw(model)
    # The Hub tells the hashes of what is read where it is.
    download_bytes = whole.total_bytes if whole.known_hashes() else 0
    return Read(model.spec, len(whole.weight_files), len(whole.tensors), whole.total_bytes, download_bytes, left_out)


def _changed_from(base: Checkpoint, family: ModelSet) -> list[str]:
    """The tensors in which a model differs from the base, in the rows that are shown."""
    holders = {name: [family.models[i] for i in family.holders(name)] for name in family.names if name in base.tensors}
    return [name for name, models in holders.items() if models and not is_shared((base, *models), name)]


def _probe(family: ModelSet, names: Sequence[str], compute: Callable[[str], Sequence[int | None]]) -> _Timed | None:
    """Compute the rows that are shown of one matrix, and see how long that takes.

    Args:
        family: The models.
        names: The tensors that would be computed.
        compute: Computes one of them; gives the ranks that it finds.

    Returns:
        What was seen; None where no matrix would be computed.
    """
    matrices = {
        name: family.reference.shown_bytes(name) // family.reference.tensors[name].dtype.itemsize
        for name in names
        if min(family.shape(name)[:2], default=1) > 1 and len(family.shape(name)) > 1
    }
    if not matrices:
        return None
    # The smallest that is large enough to tell, or the largest.
    name = min(matrices, key=lambda name: (matrices[name] < PROBE_ENTRIES, abs(matrices[name] - PROBE_ENTRIES)))
    ranks: Sequence[int | None] = ()
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        ranks = compute(name)
        seconds = time.perf_counter() - began
        if seconds > WARM_SECONDS:
            break
    return _Timed(name, matrices[name], seconds, tuple(rank for rank in ranks if rank is not None))


def _probe_fit(
    base: Checkpoint,
    family: ModelSet,
    changed: Sequence[str],
    rank: int | None,
    device: torch.device | str | None,
    *,
    denoise: bool = False,
) -> _Timed | None:
    """The time that one model's adapter takes in one tensor."""

    def fit(name: str) -> Sequence[int]:
        return _fit(base.read(name), family.held(name).tensors[-1], rank, device, denoise=denoise)

    return _probe(family, changed, fit)


def _fit(
    W: torch.Tensor,
    W_i: torch.Tensor,
    rank: int | None,
    device: torch.device | str | None,
    *,
    denoise: bool = False,
) -> Sequence[int]:
    W, W_i = matricise(W), matricise(W_i)
    try:
        return (fit_adapter(W, W_i, rank, device).rank,)
    except NotLowRank:
        return (denoise_change(W, W_i, rank, device).change.rank,) if denoise else ()


def _cards(family: ModelSet) -> int:
    """The models' own cards, which are kept, and a new one."""
    return 1 + sum(len(read_card(model).texts) for model in family.models)


def _adapters(out: str | Path, family: ModelSet, changed: Sequence[str], rank: int, card: bool) -> Made:
    """Adapters of one rank everywhere: configuration, weights and card each, with a report and a card for all."""
    files = 2 * family.n + 1 + (family.n + _cards(family)) * card
    shapes = [family.shape(name) for name in changed]
    sizes = [rank * (shape[0] + math.prod(shape[1:])) * FACTOR_BYTES for shape in shapes if len(shape) > 1]
    return Made("adapters", str(out), files, family.n * sum(sizes), "about")


def _moving(reads: Sequence[Read], times: int) -> list[Spent]:
    """Downloading what is on the Hub, and hashing all so many times."""
    block = bytes(HASHED_BYTES)
    began = time.perf_counter()
    hashlib.sha256(block).digest()
    rate = HASHED_BYTES / (time.perf_counter() - began)
    total_bytes = times * sum(read.size_bytes for read in reads)
    source = f"SHA-256 takes {rate / 1e6:.0f} MB/s here, from memory; a disk may be slower"
    downloads = sum(read.download_bytes for read in reads)
    downloading = [_carrying("downloading", downloads)] if downloads else []
    return [*downloading, Spent("reading and hashing", total_bytes / rate, source)]


def _carrying(what: str, size_bytes: int) -> Spent:
    source = "at 100 Mbit/s, an assumption; what is there already is not sent again"
    return Spent(what, size_bytes / CONNECTION_BYTES_PER_SECOND, source)


def _compressing(family: ModelSet, input_bytes: int) -> Spent:
    """Compressing all files twice: alone, to compare with, and as what base and factors leave."""
    with needs_extra("pack"):
        import zstandard
    largest = max(family.layout.tensors, key=lambda name: family.reference.shown_bytes(name))
    block = bytes(family.reference.read_bytes(largest, 0, HASHED_BYTES))
    began = time.perf_counter()
    zstandard.ZstdCompressor(level=LEVEL).compress(block)
    rate = len(block) / (time.perf_counter() - began)
    source = f"zstd takes {rate / 1e6:.0f} MB/s of {largest} here, and every file is compressed twice"
    return Spent("compressing", 2 * input_bytes / rate, source)


def _free(out: str | Path) -> int:
    return shutil.disk_usage(next(parent for parent in resolved(out).parents if parent.exists())).free
