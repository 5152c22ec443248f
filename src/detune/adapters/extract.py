"""Each model's LoRA, as a PEFT adapter of a base that is known."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from detune._runtime import OnStart, command_line, versions
from detune.adapters.card import adapter_cards
from detune.adapters.changes import AdapterChange, AdapterRow, ChangeFitter, Kept, PlacesOf, adapter_names
from detune.checkpoints import (
    Checkpoint,
    Kind,
    PeftWriter,
    PrivatePaths,
    from_out,
    inside,
    new_directory,
    open_checkpoint,
    raw,
    resolved,
)
from detune.checkpoints.atomic import Same
from detune.checkpoints.cards import InputCard, read_card
from detune.compatibility.common_tensors import ModelTensors
from detune.compatibility.groups import STRANGER, group_by_base, why_foreign
from detune.compatibility.mismatch import Cause
from detune.compatibility.model_set import ModelSet
from detune.compatibility.shared import is_shared
from detune.documents import document, to_json
from detune.errors import InputError, OutputError


@dataclass(frozen=True)
class Extraction:
    """The outcome of `extract`.

    Attributes:
        base: What the adapters are loaded onto.
        models: The models as given, by the name of their adapter.
        rows: Each tensor of each model that differs from the base's, in file order.
        entries: Number of entries of one model, over all of its tensors.
        seconds: Wall time.
    """

    base: str
    models: dict[str, str]
    rows: tuple[AdapterRow, ...]
    entries: int
    seconds: float

    @property
    def summary(self) -> dict[str, dict[str, Any]]:
        """The ranks of each adapter, and how closely the merge gives the model back."""
        return {model: self._summary([row for row in self.rows if row.model == model]) for model in self.models}

    def _summary(self, rows: Sequence[AdapterRow]) -> dict[str, Any]:
        sizes = [math.prod(row.shape) for row in rows]
        deviating = sum((1 - row.identical) * size for row, size in zip(rows, sizes, strict=True))
        return {
            "changed": len(rows),
            **{str(kept): sum(row.kept is kept for row in rows) for kept in Kept},
            "ranks": sorted({row.rank for row in rows if row.rank}),
            "identical_of_changed": 1 - deviating / sum(sizes) if rows else 1.0,
            "identical": 1 - deviating / self.entries if self.entries else 1.0,
            "largest_ulps": max((row.largest_ulps for row in rows), default=0),
            "largest_deviation": max((row.largest_deviation for row in rows), default=0.0),
        }

    @property
    def content(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        return document("detune-extract/1", {"versions": versions(), **asdict(self), "summary": self.summary})

    def to_json(self) -> str:
        """All of it as JSON."""
        return to_json(self.content)


def extract(
    models: Sequence[str | Path],
    out: str | Path,
    *,
    base: str | Path,
    rank: int | None = None,
    denoise: bool = False,
    device: torch.device | str | None = None,
    card: bool = True,
    on_start: OnStart | None = None,
    on_tensor: Callable[[str, tuple[AdapterRow, ...] | None], None] | None = None,
) -> Extraction:
    """Write the LoRA of each model as a PEFT adapter of the base, `out/MODEL`.

    Base and adapter merged by PEFT (`merge_and_unload`) give the model back as closely as float32 factors of the
    adapter's rank can; the result says how closely. What changed at no low rank is kept whole in the adapter, where
    PEFT has a place for it. One tensor's stack is in memory at a time.

    Args:
        models: Merged checkpoints, as `detune.checkpoints.open_checkpoint` takes them.
        out: The directory to make.
        base: What they were fine-tuned from, or what `recover` made of them.
        rank: The most that an adapter's rank can be; None finds the rank of each.
        denoise: Whether models may be fine-tuned in full: of each change at full rank the part is kept that stands over
            its noise, by a hard threshold on its singular values. The merge is then near the model, and not it.
        device: Where to compute; None is the CPU.
        card: Whether to write README.md, one for all and one for each adapter, with metadata for the Hub.
        on_start: For progress: called once with the tensors, and what is read of each in bytes.
        on_tensor: Called with a tensor's name and None when it is begun, and with what it became when it is done.

    Returns:
        A row for each tensor that a model changed, also written to `out/detune.json`.

    Raises:
        InputError: A model cannot be read, does not fit the base, or was not fine-tuned from it by LoRA.
        OutputError: `out` exists, or cannot be written.

    Example:
        >>> extraction = extract(["ft-a", "ft-b"], "adapters", base="recovered")  # doctest: +SKIP
        >>> PeftModel.from_pretrained(model, "adapters/ft-a")  # doctest: +SKIP
    """
    with open_checkpoint(base) as opened, ModelSet(models, like=opened) as family:
        require_base(family.reference, family.models, full=denoise)
        fitter = ChangeFitter(family, _reference(base), rank, device, denoise=denoise)
        base_card = read_card(opened) if card else None
        with extracting(family, out, base=_reference(base), card=card, base_card=base_card) as extractor:
            if on_start:
                on_start({name: family.read_bytes(name) for name in family.names})
            for name in family.names:
                if on_tensor:
                    on_tensor(name, None)
                changes: tuple[AdapterChange, ...] = ()
                holders = [family.models[i] for i in family.holders(name)]
                if holders and not is_shared((family.reference, *holders), name):
                    held, noise = family.held(name), family.reference.noise(name)
                    changes = fitter.fit(name, family.reference.read(name), held, noise)
                changes += fitter.saved(name)
                extractor.add(name, changes)
                if on_tensor:
                    on_tensor(name, tuple(change.row for change in changes))
            for i, fit in enumerate(family.common.fits[: family.n]):
                extractor.leave_out(i, fit)
            extraction = extractor.finish()
            if not any(row.kept is Kept.LORA for row in extraction.rows):
                raise _no_lora(opened, extraction.rows)
    return extraction


def _no_lora(base: Checkpoint, rows: Sequence[AdapterRow]) -> InputError:
    """The error for models of which no adapter can be had."""
    what = f"no model has a LoRA of {base.spec}"
    hidden = [row for row in rows if row.kept is Kept.NOISE]
    if hidden:
        found = f"{len(hidden)} of {len(rows)} tensors that differ do so by {hidden[0].reason}"
        return InputError(what, found, "give models that were stored more finely")
    return InputError(
        what, f"none of {len(rows)} changed tensors differs at low rank", "give the base they were fine-tuned from"
    )


def require_base(base: Checkpoint, models: Sequence[Checkpoint], *, full: bool = False) -> None:
    """Refuse a base from which a model differs at full rank.

    Args:
        base: By the names of the models; it may have more tensors than they, or fewer.
        models: The models.
        full: Whether models may be fine-tuned in full.

    Raises:
        InputError: It is not the base of a model.
    """
    for model in models:
        pair = (base, model)
        found = group_by_base(pair, [name for name in model.tensors if name in base.tensors], based=True)
        if len(found.groups) == 1:
            continue
        foreign = found.foreign(1, (0,))
        resemblance = why_foreign(pair, 1, 0, foreign[len(foreign) // 2])
        if full and resemblance.cause is Cause.FULL:
            continue
        instead = "; extract --denoise keeps what stands over the noise" if resemblance.cause is Cause.FULL else ""
        raise InputError(
            f"{base.spec} is not the base of {model.spec}",
            f"they differ at full rank in {len(foreign)} of {len(found.splits)} matrices, first {foreign[0]!r}",
            f"{STRANGER[resemblance.cause]} (cosine {resemblance.cosine:.2f}): give the base that it was fine-tuned "
            f"from by LoRA{instead}",
        )


@contextmanager
def extracting(
    family: ModelSet,
    out: str | Path,
    *,
    base: str,
    card: bool,
    base_card: InputCard | None = None,
    same: Same | None = None,
) -> Iterator["Extractor"]:
    """Make `out` with an adapter for each model, when the block ends normally.

    Args:
        family: The fine-tuned models.
        out: The directory to make.
        base: What the adapters will be loaded onto.
        card: Whether each gets a card.
        base_card: What the base's own card says; None where the base is made in the same pass.
        same: See `new_directory`.

    Yields:
        What takes the tensors.

    Raises:
        OutputError: `out` exists, lies inside the base, or cannot be written.
    """
    target = resolved(out)
    if target.is_relative_to(base):
        raise OutputError(f"{out} lies inside the base", f"got {base}", "write the adapters beside it")
    with new_directory(out, same=same) as partial:
        yield Extractor(family, partial, base, target, card, base_card)


class Extractor:
    """Takes what a family's tensors become in adapters, and writes an adapter for each model. Made by `extracting`.

    Attributes:
        directory: What it fills.
    """

    def __init__(
        self, family: ModelSet, directory: Path, base: str, out: Path, card: bool, base_card: InputCard | None
    ) -> None:
        self._models = family.models
        self._reference = family.reference
        self._names = adapter_names([model.spec for model in family.models])
        self.directory = directory
        self._base = base
        self._out = out
        self._card = card
        self._base_card = base_card
        self._places = PlacesOf(family.reference)
        self._writers: dict[tuple[int, str], PeftWriter] = {}
        self._rows: list[AdapterRow] = []
        # Rows of tensors that are kept whole, for the case that PEFT cannot take them after all.
        self._as_base: dict[tuple[str, str], AdapterRow] = {}
        self._started = time.perf_counter()

    def kind(self, name: str) -> Kind | None:
        """The kind of a tensor's module, if PEFT takes a LoRA there."""
        return self._places.of(name).takes_low_rank(name)

    def add(self, name: str, changes: Sequence[AdapterChange]) -> None:
        """Add one tensor to every adapter whose model changed it.

        Args:
            name: Its qualified name.
            changes: What it becomes, as a `ChangeFitter` found it.
        """
        for change in changes:
            row = change.row
            writer = self._writer(change.model, name)
            if row.kept is Kept.LORA and change.layer is not None:
                writer.add_layer(name, change.layer)
            elif row.kept is Kept.WHOLE and change.as_base is not None:
                writer.keep(name)
                self._as_base[row.model, name] = change.as_base
            self._rows.append(row)

    def leave_out(self, model: int, fit: ModelTensors | None) -> None:
        """Report what a model has that the base has not, or has otherwise.

        Args:
            model: The model's place.
            fit: How it fits the base.
        """
        if fit is None:
            return
        reasons = dict.fromkeys(fit.extra, "the base has no such tensor")
        reasons |= {fit.names[name]: f"{why}, as the base has it" for name, why in fit.unlike.items()}
        whole = raw(self._models[model])
        for name, reason in reasons.items():
            shape = whole.tensors[name].shape
            self._rows.append(AdapterRow(self._names[model], name, shape, Kept.LEFT_OUT, 0, 0.0, 0, 0.0, reason))

    def finish(self) -> Extraction:
        """Complete the adapters, and report."""
        lost: set[tuple[str, str]] = set()
        for (i, _), writer in self._writers.items():
            lost |= {(self._names[i], name) for name in writer.finish(partial(self._read, i))}
        # The tensors of a lost module that did not change have no row.
        rows = tuple(self._lose(row) if (row.model, row.name) in lost else row for row in self._rows)
        models = dict(zip(self._names, (model.spec for model in self._models), strict=True))
        entries = sum(math.prod(info.shape) for info in self._reference.tensors.values())
        extraction = Extraction(self._base, models, rows, entries, time.perf_counter() - self._started)
        paths = [path for model in self._models for path in model.paths]
        places = PrivatePaths(self._out, [self._base, *models.values(), *paths, *command_line()])
        if self._card:
            self._write_cards(extraction, places)
        content = to_json(places.within(extraction.content))
        (self.directory / "detune.json").write_text(content, encoding="utf-8")
        return extraction

    def _write_cards(self, extraction: Extraction, places: PrivatePaths) -> None:
        # PEFT loads no adapter without a LoRA, and none is written.
        found = {self._names[i]: sorted(self._adapter(i).rglob("adapter_config.json")) for i, _ in self._writers}
        folders = {
            name: [config.parent.relative_to(self.directory).as_posix() for config in configs]
            for name, configs in found.items()
            if configs
        }
        cards = adapter_cards(
            {name: figures for name, figures in extraction.summary.items() if name in folders},
            folders,
            extraction.rows,
            dict(zip(self._names, map(read_card, self._models), strict=True)),
            self._base_card,
            Path(self._base).name if self._base_card is None else self._base_card.name,
            self._out.name,
            places,
        )
        for file, content in cards.items():
            inside(self.directory, file).write_bytes(content)

    def _adapter(self, model: int) -> Path:
        return inside(self.directory, self._names[model])

    def _read(self, model: int, name: str) -> Tensor:
        """A tensor of a model, or of the layout where the model does not have it."""
        return (self._models[model] if name in self._models[model].tensors else self._reference).read(name)

    def _lose(self, row: AdapterRow) -> AdapterRow:
        reason = "PEFT would mistake its module for one with a LoRA, or has no LoRA to load it with"
        return replace(self._as_base[row.model, row.name], reason=reason)

    def _writer(self, i: int, name: str) -> PeftWriter:
        component = self._reference.tensors[name].component
        if (i, component) not in self._writers:
            directory = inside(self.directory, PurePosixPath(self._names[i], component))
            base = f"{self._base}/{component}".rstrip("/")
            if Path(base).is_absolute():
                # With the adapter it may be given away, and what only looks like a Hub id could be somebody's.
                base = from_out(base, self._out / self._names[i] / component)
            self._writers[i, component] = PeftWriter(directory, self._places.of(name), base)
        return self._writers[i, component]


def _reference(base: str | Path) -> str:
    path = Path(base).expanduser()
    return str(path.resolve()) if path.exists() else str(base).partition("@")[0]
