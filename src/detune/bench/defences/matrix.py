"""The matrix attack × defence: what each attack gets out of each defended family, and what the defence costs.

A defence counts only against the attack that knows it. So every defence meets the attacks that know none and those that
know one like it, and the best of them decides. Evaluation is against the truth; where a defence keeps the function and
changes the weights, the truth is the base with the change of the first release.
"""

import json
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from pathlib import Path
from statistics import fmean

import torch

from detune._runtime import OnPart, OnStart, telling
from detune.attacks import ATTACKS
from detune.bench.defences.families import Family, quality
from detune.checkpoints import open_checkpoint, temporary_directory
from detune.defences import (
    Bf16,
    Defence,
    Dither,
    Fp8,
    Fp16,
    Int8,
    Invertible,
    LoREnc,
    Nf4,
    Noise,
    Padding,
    Permutation,
    QuietNoise,
    Rearrangement,
    Rescaling,
    Rotation,
    defend,
)
from detune.demo.train import embeddings
from detune.errors import DetuneError, InputError
from detune.metrics import w_error
from detune.metrics.cosine import cosine_distances

__all__ = ["NO_ANSWER", "Cell", "Row", "RowResult", "outcome", "rows_of", "run_rows"]

MODELS = 5
"""Releases, where a row does not say otherwise."""

QUALITY_TEXTS = 64
"""Held-out passages of each task that task quality is measured on."""

SENTENCES = 4
"""Held-out passages of each task that models are compared on by their embeddings."""

BROKEN, PARTLY = 10.0, 2.0

NO_ANSWER = "no answer"

_DEFENDING, _JUDGING = "defending", "task quality"
_NOISE = ("average", "recover", "denoise")
_QUANTISED = (*_NOISE, "cells")
_ANISOTROPIC = (*_NOISE, "whiten")
_GRID = ("average", "recover", "denoise", "snap")
_SYMMETRIC = ("average", "recover", "align")


@dataclass(frozen=True)
class Row:
    """A defence as it is tried.

    Attributes:
        name: What the table calls it.
        attacks: Keys of `ATTACKS`.
        defence: What is done to each release; None does nothing.
        family: Of which fine-tunes; frozen A and a base on a grid have their own.
        models: Number of releases.
        public: What is done to the base, which then everybody has beside the releases; None publishes none.
    """

    name: str
    attacks: tuple[str, ...]
    defence: Defence | None = None
    family: str = "ordinary"
    models: int = MODELS
    public: Defence | None = None


@dataclass(frozen=True)
class Cell:
    """The result of one attack on one row.

    Attributes:
        attack: Its name.
        w_error: Mean of log10 of the mean squared error over the fine-tuned matrices; None where there was no answer.
        embeddings: Mean cosine distance of the recovered model's embeddings from the base's, over that of the first
            fine-tune, undefended.
        failure: Why there was no answer.
        seconds: How long it took.
    """

    attack: str
    w_error: float | None
    embeddings: float | None
    failure: str | None
    seconds: float


@dataclass(frozen=True)
class RowResult:
    """A row of the matrix.

    Attributes:
        name: As `Row.name`.
        defence: With its settings.
        models: Number of releases.
        accuracy: Task accuracy of the defended releases, on passages they were not trained on.
        undefended_accuracy: The same of ordinary fine-tunes without a defence.
        undefended_w_error: Of the average of as many ordinary releases without a defence: what anybody has.
        undefended_embeddings: The same average's distance by embeddings, as in `Cell`.
        cells: One for each attack.
    """

    name: str
    defence: str
    models: int
    accuracy: float
    undefended_accuracy: float
    undefended_w_error: float
    undefended_embeddings: float
    cells: tuple[Cell, ...] = field(default=())

    @property
    def cost(self) -> float:
        """The share of the task accuracy that is lost; negative where the defended models are better."""
        return 1 - self.accuracy / self.undefended_accuracy

    @property
    def answers(self) -> tuple[Cell, ...]:
        """The attacks that gave an answer."""
        return tuple(cell for cell in self.cells if cell.w_error is not None)

    @property
    def best(self) -> Cell | None:
        """The attack that came closest; None where none gave an answer."""
        return min(self.answers, key=lambda cell: cell.w_error or 0.0, default=None)

    @property
    def times_closer(self) -> float | None:
        """How many times closer to the base the best attack comes than averaging undefended releases does.

        In root mean square, and by the weights or by the embeddings, whichever shows more: noise can be all over the
        weights and do nothing, and where the model comes back its weights need not. None where no attack gave an
        answer.
        """
        if not self.answers:
            return None
        weights = max(10 ** ((self.undefended_w_error - (cell.w_error or 0.0)) / 2) for cell in self.answers)
        function = max(
            (self.undefended_embeddings / max(cell.embeddings or 0.0, 1e-30)) ** 0.5 for cell in self.answers
        )
        return float(max(weights, function))

    def to_json(self) -> str:
        """All of it as JSON."""
        return json.dumps(asdict(self) | {"verdict": outcome(self)}, indent=1) + "\n"


def outcome(row: RowResult) -> str:
    """Whether a defence survives: by how much closer its best attack comes than averaging undefended releases does.

    Returns:
        "survives" below 2 times, "broken" from 10 times on, "broken partly" between; "no answer" where no attack gave
        one, which says nothing for the defence.
    """
    if row.times_closer is None:
        return NO_ANSWER
    if row.times_closer >= BROKEN:
        return "broken"
    return "broken partly" if row.times_closer >= PARTLY else "survives"


def rows_of(families: Collection[str], base: Path, texts: Path, models: int = MODELS) -> tuple[Row, ...]:
    """The rows that some families allow.

    Args:
        families: Their names; "ordinary" or "given" is needed.
        base: Their base, for the defences that look at it.
        texts: A file with texts for the defences that look at activations.
        models: Number of releases.
    """
    plain = "given" if "given" in families else "ordinary"
    rows = [
        Row("none", ("average", "recover", "denoise"), None, plain, models),
        Row("release one", ("average",), None, plain, 1),
        Row("release two", ("average", "lattice"), None, plain, 2),
        Row("bf16", _NOISE, Bf16(), plain, models),
        Row("fp16", _NOISE, Fp16(), plain, models),
        Row("int8", _QUANTISED, Int8(), plain, models),
        Row("nf4", _QUANTISED, Nf4(), plain, models),
        Row("fp8", (*_NOISE, "known-dither"), Fp8(), plain, models),
        *(Row(f"noise {size:.1%}", _NOISE, Noise(size), plain, models) for size in (0.001, 0.01, 0.1)),
        Row("quiet noise 10.0%", _ANISOTROPIC, QuietNoise(texts, 0.1), plain, models),
        Row("padding 3.0%", _ANISOTROPIC, Padding(texts, 0.03), plain, models),
        Row("permutation", _SYMMETRIC, Permutation(), plain, models),
        Row("rotation", _SYMMETRIC, Rotation(), plain, models),
        Row("rescaling", _SYMMETRIC, Rescaling(), plain, models),
        Row("rearrangement", _SYMMETRIC, Rearrangement(), plain, models),
        Row("invertible", _SYMMETRIC, Invertible(), plain, models),
        Row("LoREnc, no adapter", ("average", "recover"), LoREnc(base), plain, models, LoREnc(base)),
        Row("LoREnc, one adapter", ("average", "complete"), LoREnc(base, adapter=True), plain, 1, LoREnc(base)),
    ]
    if "frozen-a" in families:
        rows.append(Row("frozen A", ("average", "recover", "prior"), None, "frozen-a", models))
    if "bf16-base" in families:
        rows.append(Row("none, bf16 base", _GRID, None, "bf16-base", models))
        rows.append(Row("release one, bf16 base", ("average", "lattice"), None, "bf16-base", 1))
        rows.append(Row("dither, bf16 base", _GRID, Dither(), "bf16-base", models))
        rows.append(Row("release one, dither, bf16 base", ("average", "lattice"), Dither(), "bf16-base", 1))
    return tuple(rows)


@dataclass(frozen=True)
class _Yardstick:
    """The references that rows of one family are measured by, computed once.

    Attributes:
        family: The fine-tunes.
        plain: The ordinary ones, without a defence: what is lost against them counts.
    """

    family: Family
    plain: Family

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The matrices that were fine-tuned.

        Raises:
            InputError: None was.
        """
        with open_checkpoint(self.family.base) as base, open_checkpoint(self.family.models[0]) as model:
            matrices = [name for name, info in model.tensors.items() if len(info.shape) > 1 and name in base.tensors]
            found = tuple(name for name in matrices if not torch.equal(base.read(name), model.read(name)))
        if not found:
            raise InputError(
                f"{self.family.models[0]} is no fine-tune of {self.family.base}",
                f"none of {len(matrices)} matrices of the same name differs",
                "give its own base, and models that were fine-tuned from it",
            )
        return found

    @cached_property
    def sentences(self) -> list[str]:
        """Passages of every task."""
        return list(dict.fromkeys(text for own in self.family.texts for text in own[:SENTENCES]))

    @cached_property
    def base_embeddings(self) -> torch.Tensor:
        """The base's embeddings."""
        return embeddings(self.family.base, self.sentences)

    @cached_property
    def fine_tune_distance(self) -> float:
        """How far the first fine-tune's embeddings are from the base's."""
        return self._distance(self.family.models[0])

    def away(self, model: Path) -> float:
        """A model's distance from the base by its embeddings, as a share of the first fine-tune's."""
        return self._distance(model) / self.fine_tune_distance

    def _distance(self, model: Path) -> float:
        return float(cosine_distances(embeddings(model, self.sentences), self.base_embeddings).mean())

    def error(self, recovered: Path, truth: Path) -> float:
        """Mean W-Error over the fine-tuned matrices."""
        with open_checkpoint(recovered) as ours, open_checkpoint(truth) as theirs:
            # Exact to the last bit is as good as a tenth of a float32 step.
            return fmean(max(w_error(ours.read(name), theirs.read(name)), -20.0) for name in self.names)

    def undefended(self, models: int, work: Path) -> tuple[float, float]:
        """W-Error of the average of some of the family's own releases, and its distance by embeddings."""
        out = work / f"average-{models}"
        if not out.exists():
            ATTACKS["average"]().run(self.plain.models[:models], out)
        return self.error(out, self.plain.base), self.away(out)


def run_rows(
    rows: Sequence[Row],
    families: Mapping[str, Family],
    out: Path,
    *,
    on_start: OnStart | None = None,
    on_part: OnPart | None = None,
) -> tuple[RowResult, ...]:
    """Defend, attack, evaluate; rows that `out` has are not run again.

    Args:
        rows: Of `rows_of`, or others.
        families: By name.
        out: The folder for one JSON file a row.
        on_start: For progress: called once with what is still to be done for each row.
        on_part: Called with the name of each of these when it is begun, and when it is done.

    Returns:
        The results, in the order of the rows.

    Raises:
        InputError: A family has fewer models than a row releases.
    """
    plain = families.get("given") or families["ordinary"]
    sticks = {name: _Yardstick(family, plain) for name, family in families.items()}
    (out / "rows").mkdir(parents=True, exist_ok=True)
    files = {
        row.name: out / "rows" / f"{row.name.replace(', ', '-').replace(' ', '-').replace('%', '')}.json"
        for row in rows
    }
    found = {row.name: _read(files[row.name], row) for row in rows}
    missing = [row for row in rows if found[row.name] is None]
    if on_start:
        on_start(dict.fromkeys((part for row in missing for part in _parts(row)), 1))
    with temporary_directory("defences") as folder:
        for row in missing:
            found[row.name] = result = _run_row(row, sticks[row.family], folder, on_part)
            files[row.name].write_text(result.to_json(), encoding="utf-8")
    return tuple(result for result in found.values() if result is not None)


def _parts(row: Row) -> tuple[str, ...]:
    """What is done for a row, in order."""
    defending = () if row.defence is None else (_DEFENDING,)
    return tuple(f"{row.name}: {what}" for what in (*defending, *row.attacks, _JUDGING))


def _read(file: Path, row: Row) -> RowResult | None:
    """A row's result, if it was run with these settings."""
    if not file.is_file():
        return None
    content = json.loads(file.read_text(encoding="utf-8"))
    content.pop("verdict")
    found = RowResult(**content | {"cells": tuple(Cell(**cell) for cell in content["cells"])})
    same = found.defence == _settings(row) and found.models == row.models
    return found if same and tuple(cell.attack for cell in found.cells) == row.attacks else None


@cache
def _undefended_accuracy(models: tuple[Path, ...], texts: tuple[tuple[str, ...], ...]) -> float:
    return quality(models, texts).accuracy


def _settings(row: Row) -> str:
    text = repr(row.defence) if row.defence else "nothing"
    # Where texts and base lie on this machine is nobody's concern.
    places = [place for place in vars(row.defence).values() if isinstance(place, Path)] if row.defence else []
    for place in places:
        text = text.replace(repr(place), repr(place.name))
    return text


def _run_row(row: Row, stick: _Yardstick, work: Path, on_part: OnPart | None) -> RowResult:
    family = stick.family
    if len(family.models) < row.models:
        raise InputError(f"{len(family.models)} {family.name} models", f"row {row.name!r} releases {row.models}")
    undefended = family.models[: row.models]
    releases, truth = undefended, family.base
    folder = work / "row"
    shutil.rmtree(folder, ignore_errors=True)
    if row.defence is not None:
        with telling(on_part, f"{row.name}: {_DEFENDING}"):
            releases = tuple(folder / f"release-{i}" for i in range(row.models))
            for i, model in enumerate(undefended):
                # Whether the function is preserved is looked at once.
                defend(row.defence, model, releases[i], seed=i, verify=i == 0)
            if row.defence.preserves_function:
                truth = folder / "truth"
                defend(row.defence, family.base, truth, seed=0, verify=False)
    shown = releases
    if row.public is not None:
        shown = (folder / "public", *releases)
        defend(row.public, family.base, shown[0], seed=0, verify=False)
    texts = tuple(own[:: max(1, len(own) // QUALITY_TEXTS)] for own in family.texts[: row.models])
    cells = []
    for name in row.attacks:
        with telling(on_part, f"{row.name}: {name}"):
            cells.append(_attack(name, shown, truth, folder, stick))
    with telling(on_part, f"{row.name}: {_JUDGING}"):
        result = RowResult(
            row.name,
            _settings(row),
            row.models,
            quality(releases, texts).accuracy,
            _undefended_accuracy(stick.plain.models[: row.models], texts),
            *stick.undefended(row.models, work),
            tuple(cells),
        )
    shutil.rmtree(folder, ignore_errors=True)
    return result


def _attack(name: str, releases: tuple[Path, ...], truth: Path, folder: Path, stick: _Yardstick) -> Cell:
    started = time.perf_counter()
    recovered = folder / name
    try:
        ATTACKS[name]().run(releases, recovered)
    except DetuneError as error:
        # Where the releases lay for a while is nobody's concern.
        reason = str(error).replace(f"{folder}/", "")
        return Cell(name, None, None, reason, time.perf_counter() - started)
    seconds = time.perf_counter() - started
    return Cell(name, stick.error(recovered, truth), stick.away(recovered), None, seconds)
