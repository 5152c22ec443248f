"""The results of a run: a checkpoint, adapters and a mask, made of completed tensors and put in their places.

All three are finished before the first is renamed to its place, and the checkpoint comes last: where it is, the rest
is there too. What is about to be put in its place is written down before. So a run that is cut off in between is
finished by the same command, which knows its own results again by their hashes.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path

from detune.adapters.extract import extracting
from detune.checkpoints import (
    CheckpointFiles,
    Places,
    RunDirectory,
    Target,
    check_new,
    known_results,
    new_file,
    remove_abandoned,
    remove_spent,
    reported,
    write_mark,
    write_masks,
)
from detune.checkpoints.blocks import file_hash
from detune.checkpoints.cards import InputCard, library_of
from detune.checkpoints.mark import MARK
from detune.compatibility.model_set import ModelSet
from detune.errors import OutputError
from detune.recovery.card import recovery_cards
from detune.recovery.execution import CompletedTensor, read_changes, read_masks
from detune.recovery.report import Report

__all__ = ["Results"]


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
        places = [path for path in (self.target.out, self.adapters, self.mask) if path is not None]
        for one, other in permutations(places, 2):
            if one.is_relative_to(other):
                raise OutputError(f"{one} lies inside {other}", "each result needs its own place", "choose another")
        if clean:
            remove_spent(self.target.out)
            for path in (self.adapters, self.mask):
                if path is not None:
                    remove_abandoned(path)
        known = known_results(self.target.out)
        if not _is_known(self._mark, known):
            self.target.check(self.target.out)
        self._check_others(known)

    def finished(self, run_directory: RunDirectory) -> Report | None:
        """Find out whether the run had all but ended when it was cut off.

        Args:
            run_directory: The run's.

        Returns:
            Its report; None where there is something left to do.

        Raises:
            OutputError: There is something in the place of a result that is not this run's.
        """
        known = run_directory.results()
        if all(path is None or _is_known(path, known) for path in (self._mark, self.adapters, self.mask)):
            return Report.of_json(json.loads(self._mark.read_bytes()))
        self.target.check(self.target.out)
        self._check_others(known)
        return None

    def write(
        self,
        run_directory: RunDirectory,
        completed: Mapping[str, CompletedTensor],
        files: CheckpointFiles,
        report: Report,
        family: ModelSet,
        places: Places,
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
        known, results = run_directory.results(), dict[str, str]()
        with ExitStack() as made:
            if self.adapters:
                if _is_known(self.adapters, known):
                    results[str(self.adapters)] = known[str(self.adapters)]
                    summary = json.loads((self.adapters / MARK).read_bytes())["summary"]
                else:
                    base = str(self.target.out)
                    extractor = made.enter_context(extracting(family, self.adapters, base=base, card=cards is not None))
                    for name in family.names:
                        extractor.add(name, read_changes(run_directory, completed[name], extractor.kind(name)))
                    summary = extractor.finish().summary
                    results[str(self.adapters)] = _hash(extractor.directory)
                report = replace(report, adapters=summary)
            if self.mask:
                if _is_known(self.mask, known):
                    results[str(self.mask)] = known[str(self.mask)]
                else:
                    partial = made.enter_context(new_file(self.mask))
                    write_masks(partial, read_masks(run_directory, completed, family.names))
                    results[str(self.mask)] = _hash(partial)
            content = places.within(report.content)
            shown, library, title = Report.of_json(content), library_of(family.layout), self.target.out.name
            files.finish({} if cards is None else recovery_cards(shown, cards, library, title, places))
            with reported(self.target.out, files.needed_bytes):
                write_mark(run_directory.checkpoint, content)
            results[str(self._mark)] = _hash(run_directory.checkpoint / MARK)
            run_directory.note_results(results)
        run_directory.place(self.target.out, self.target.check)
        return report

    @property
    def _mark(self) -> Path:
        """The checkpoint stands for itself by the report in it, which no other run has."""
        return self.target.out / MARK

    def _check_others(self, known: Mapping[str, str]) -> None:
        if self.adapters and not _is_known(self.adapters, known):
            check_new(self.adapters)
        if self.mask and not _is_known(self.mask, known):
            check_new(self.mask, directory=False)


def _is_known(path: Path, known: Mapping[str, str]) -> bool:
    """Whether something stands in its place as it was written down."""
    return str(path) in known and path.exists() and known[str(path)] == _hash(path)


def _hash(path: Path) -> str:
    """The SHA-256 of a file, or of all files of a directory and their names."""
    if not path.is_dir():
        return file_hash(path)
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}\0{file_hash(file)}\n".encode())
    return digest.hexdigest()
