"""The results of a run: a checkpoint, adapters and a mask, made of completed tensors and put in their places.

All three are finished before the first is renamed to its place, and the checkpoint comes last: where it is, the rest
is there too. What is about to be put in its place is written down before. So a run that is cut off in between is
finished by the same command, which knows its own results again by their hashes; where the notes of these are damaged,
by making them again.
"""

import hashlib
import json
import logging
import stat
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from detune.adapters.extract import extracting
from detune.checkpoints import (
    CheckpointFiles,
    Noted,
    PrivatePaths,
    RunDirectory,
    Target,
    check_new,
    new_file,
    noted_results,
    remove_abandoned,
    remove_spent,
    reported,
    require_apart,
    write_mark,
    write_masks,
)
from detune.checkpoints.blocks import file_hash
from detune.checkpoints.cards import InputCard, library_of
from detune.checkpoints.mark import MARK, find_foreign
from detune.compatibility.model_set import ModelSet
from detune.recovery.card import recovery_cards
from detune.recovery.execution import CompletedTensor, read_changes, read_masks
from detune.recovery.report import Report

__all__ = ["Results"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Results:
    """The places that the results of a run go to.

    Attributes:
        target: The checkpoint's place.
        adapters: A directory to make with each model's LoRA, resolved; None makes none.
        mask: A file to make with the entries that are certain, resolved; None makes none.
    """

    target: Target
    adapters: Path | None
    mask: Path | None

    def check(self, *, clean: bool = True) -> None:
        """Refuse what could not be written in the end, before anything is computed; clean up after runs that died.

        What such a run has put in its place is let pass: whether it was the same command is not known yet.

        Args:
            clean: Whether to remove what such runs have left; otherwise nothing on the disk changes.

        Raises:
            OutputError: There is something in the place of a result.
        """
        require_apart(self.target.out, self.adapters, self.mask)
        if clean:
            remove_spent(self.target.out)
            for path in (self.adapters, self.mask):
                if path is not None:
                    remove_abandoned(path)
        noted = noted_results(self.target.out)
        if not _is_known(self._mark, noted):
            self._check_target(noted)
        self._check_others(noted)

    def finished(self, run_directory: RunDirectory) -> Report | None:
        """Find out whether the run had all but ended when it was cut off.

        Args:
            run_directory: The run's.

        Returns:
            Its report; None where there is something left to do.

        Raises:
            OutputError: There is something in the place of a result that is not this run's.
        """
        noted = run_directory.noted
        if all(path is None or _is_known(path, noted) for path in (self._mark, self.adapters, self.mask)):
            return self._placed
        self._check_target(noted)
        self._check_others(noted)
        for path in (None if self.target.overwrite else self._mark, self.adapters, self.mask):
            if path is not None and path.exists() and noted.lost:
                logger.warning("%s is there, and no note says whose it is: it is computed again and compared", path)
        return None

    def write(
        self,
        run_directory: RunDirectory,
        completed: Mapping[str, CompletedTensor],
        files: CheckpointFiles,
        report: Report,
        family: ModelSet,
        places: PrivatePaths,
        cards: Sequence[InputCard] | None,
    ) -> Report:
        """Put what is complete together, and everything in its place.

        Args:
            run_directory: The run's.
            completed: What is complete, by tensor: all.
            files: The checkpoint in the run's directory.
            report: The report, but for adapters.
            family: The models.
            places: What paths become in the report.
            cards: The models given, and what their own cards say; None writes no card.

        Returns:
            The report, with what the adapters give back.

        Raises:
            OutputError: The disk refuses, or something has changed since it was written.
        """
        noted, results = run_directory.noted, dict[str, str]()
        with ExitStack() as made:
            if self.adapters:
                if _is_known(self.adapters, noted):
                    results[str(self.adapters)] = noted.hashes[str(self.adapters)]
                    summary = json.loads((self.adapters / MARK).read_bytes())["summary"]
                else:
                    base = str(self.target.out)
                    extractor = made.enter_context(
                        extracting(family, self.adapters, base=base, card=cards is not None, same=_same)
                    )
                    for name in family.names:
                        extractor.add(name, read_changes(run_directory, completed[name], extractor.kind(name)))
                    summary = extractor.finish().summary
                    results[str(self.adapters)] = _hash(extractor.directory)
                report = replace(report, adapters=summary)
            if self.mask:
                if _is_known(self.mask, noted):
                    results[str(self.mask)] = noted.hashes[str(self.mask)]
                else:
                    partial = made.enter_context(new_file(self.mask, same=_same))
                    write_masks(partial, read_masks(run_directory, completed, family.names))
                    results[str(self.mask)] = _hash(partial)
            content = places.within(report.content)
            shown, library, title = Report.of_json(content), library_of(family.layout), self.target.out.name
            files.finish({} if cards is None else recovery_cards(shown, cards, library, title, places))
            with reported(self.target.out, files.needed_bytes):
                write_mark(run_directory.checkpoint, content)
            # With --overwrite the target is replaced, whether it is the same or not.
            stands = (
                not self.target.overwrite and self._mark.is_file() and _same(run_directory.checkpoint, self.target.out)
            )
            results[str(self._mark)] = _hash(self._mark if stands else run_directory.checkpoint / MARK)
            run_directory.note.write(results)
        if stands:
            return self._placed
        run_directory.place(self.target.out, self.target.check)
        return report

    @property
    def _mark(self) -> Path:
        """The checkpoint stands for itself by the report in it, which no other run has."""
        return self.target.out / MARK

    @property
    def _placed(self) -> Report:
        return Report.of_json(json.loads(self._mark.read_bytes()))

    def _check_target(self, noted: Noted) -> None:
        if not (noted.lost and find_foreign(self.target.out) is None):
            self.target.check(self.target.out)

    def _check_others(self, noted: Noted) -> None:
        for path, directory in ((self.adapters, True), (self.mask, False)):
            if path and not _is_known(path, noted) and not (noted.lost and _is_like_a_result(path)):
                check_new(path, directory=directory)


def _is_known(path: Path, noted: Noted) -> bool:
    """Whether something stands in its place as it was written down."""
    return str(path) in noted.hashes and path.exists() and noted.hashes[str(path)] == _hash(path)


def _is_like_a_result(path: Path) -> bool:
    """Whether something could be adapters or a mask: when they are made again, it must be the same."""
    return (path / MARK).is_file() or (path.is_file() and is_zipfile(path))


def _same(one: Path, other: Path) -> bool:
    """Whether two results are the same, but for the times in their reports."""
    return _hash(one) == _hash(other)


def _hash(path: Path) -> str:
    """The SHA-256 of a file, or of all that is in a directory and its names, without the times in its report."""
    if not path.is_dir():
        return file_hash(path)
    digest = hashlib.sha256()
    for entry in sorted(entry for entry in path.rglob("*") if entry.is_symlink() or not entry.is_dir()):
        name = entry.relative_to(path).as_posix()
        if not stat.S_ISREG(entry.lstat().st_mode):
            found = "no file"
        else:
            found = _timeless(entry.read_bytes()) if name == MARK else file_hash(entry)
        digest.update(f"{name}\0{found}\n".encode())
    return digest.hexdigest()


def _timeless(report: bytes) -> str:
    """A report as text without times: what a run took, and when its files were written."""

    def drop(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key: value for key, value in pairs if key not in ("seconds", "files")}

    with suppress(ValueError, RecursionError):
        return json.dumps(json.loads(report, object_pairs_hook=drop))
    return report.hex()
