"""Defends, attacks and evaluates, row by row.

Evaluation is against the truth; where a defence keeps the function and changes the weights, the truth is the base with
the change of the first release.
"""

import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from statistics import fmean

import torch

from detune._runtime import OnPart, OnStart, telling
from detune.attacks import ATTACKS
from detune.bench.defences.families import FineTuneFamily, quality
from detune.bench.defences.result import AttackResult, RowResult
from detune.bench.defences.rows import Row
from detune.checkpoints import open_checkpoint, temporary_directory
from detune.defences import defend
from detune.demo.train import embeddings
from detune.errors import DetuneError, InputError
from detune.metrics import w_error
from detune.metrics.cosine import cosine_distances

__all__ = ["run_rows"]

logger = logging.getLogger(__name__)

QUALITY_TEXTS = 64
"""Held-out passages of each task that task quality is measured on."""

SENTENCES = 4
"""Held-out passages of each task that models are compared on by their embeddings."""

_DEFENDING, _JUDGING = "defending", "task quality"


def run_rows(
    rows: Sequence[Row],
    families: Mapping[str, FineTuneFamily],
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
    yardsticks = {name: _Yardstick(family, plain) for name, family in families.items()}
    folder = out / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    found = {row.name: _stored(folder / row.file_name, row) for row in rows}
    missing = [row for row in rows if found[row.name] is None]
    if on_start:
        on_start(dict.fromkeys((part for row in missing for part in _parts(row)), 1))
    with temporary_directory("defences") as work:
        for row in missing:
            found[row.name] = result = _run_row(row, yardsticks[row.family], work, on_part)
            (folder / row.file_name).write_text(result.to_json(), encoding="utf-8")
    return tuple(result for result in found.values() if result is not None)


def _parts(row: Row) -> tuple[str, ...]:
    """The parts of the work on a row, in order."""
    defending = () if row.defence is None else (_DEFENDING,)
    return tuple(f"{row.name}: {what}" for what in (*defending, *row.attacks, _JUDGING))


def _stored(file: Path, row: Row) -> RowResult | None:
    """A row's result, if it was run with these settings."""
    if not file.is_file():
        return None
    try:
        found = RowResult.of_json(file.read_text(encoding="utf-8"))
    except (KeyError, TypeError, ValueError):
        logger.warning("%s holds no result of this version: the row is run again", file)
        return None
    same = found.defence == row.settings and found.models == row.models
    return found if same and tuple(attack.name for attack in found.attacks) == row.attacks else None


@dataclass(frozen=True)
class _Yardstick:
    """The references that rows of one family are measured by, computed once.

    Attributes:
        family: The fine-tunes.
        plain: The ordinary ones, without a defence: what is lost against them counts.
    """

    family: FineTuneFamily
    plain: FineTuneFamily

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
        """The distance of the first fine-tune's embeddings from the base's."""
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


@dataclass(frozen=True)
class _Released:
    """A row's releases.

    Attributes:
        models: The defended fine-tunes.
        public: What attackers see: these, and the base where the defence publishes one.
        truth: What an attack is measured against.
    """

    models: tuple[Path, ...]
    public: tuple[Path, ...]
    truth: Path


def _run_row(row: Row, yardstick: _Yardstick, work: Path, on_part: OnPart | None) -> RowResult:
    family = yardstick.family
    if len(family.models) < row.models:
        raise InputError(f"{len(family.models)} {family.name} models", f"row {row.name!r} releases {row.models}")
    folder = work / "row"
    shutil.rmtree(folder, ignore_errors=True)
    released = _release(row, family, folder, on_part)
    attacks = []
    for name in row.attacks:
        with telling(on_part, f"{row.name}: {name}"):
            attacks.append(_attack(name, released, folder, yardstick))
    texts = tuple(own[:: max(1, len(own) // QUALITY_TEXTS)] for own in family.texts[: row.models])
    with telling(on_part, f"{row.name}: {_JUDGING}"):
        result = RowResult(
            row.name,
            row.settings,
            row.models,
            quality(released.models, texts).accuracy,
            _undefended_accuracy(yardstick.plain.models[: row.models], texts),
            *yardstick.undefended(row.models, work),
            tuple(attacks),
        )
    shutil.rmtree(folder, ignore_errors=True)
    return result


@cache
def _undefended_accuracy(models: tuple[Path, ...], texts: tuple[tuple[str, ...], ...]) -> float:
    return quality(models, texts).accuracy


def _release(row: Row, family: FineTuneFamily, folder: Path, on_part: OnPart | None) -> _Released:
    """Defend the models, and the base where that is published or changes with them."""
    models, truth = family.models[: row.models], family.base
    if row.defence is not None:
        with telling(on_part, f"{row.name}: {_DEFENDING}"):
            undefended, models = models, tuple(folder / f"release-{i}" for i in range(row.models))
            for i, model in enumerate(undefended):
                # One release is enough to verify that the function is preserved.
                defend(row.defence, model, models[i], seed=i, verify=i == 0)
            if row.defence.preserves_function:
                truth = folder / "truth"
                defend(row.defence, family.base, truth, seed=0, verify=False)
    if row.public is None:
        return _Released(models, models, truth)
    base = folder / "public"
    defend(row.public, family.base, base, seed=0, verify=False)
    return _Released(models, (base, *models), truth)


def _attack(name: str, released: _Released, folder: Path, yardstick: _Yardstick) -> AttackResult:
    started = time.perf_counter()
    recovered = folder / name
    try:
        ATTACKS[name]().run(released.public, recovered)
    except DetuneError as error:
        # Paths of temporary releases are nobody's concern.
        reason = str(error).replace(f"{folder}/", "")
        return AttackResult(name, None, None, reason, time.perf_counter() - started)
    seconds = time.perf_counter() - started
    return AttackResult(name, yardstick.error(recovered, released.truth), yardstick.away(recovered), None, seconds)
