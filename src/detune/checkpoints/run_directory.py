"""The directory of a run that is not over: completed tensors are kept, and the same command does only the rest.

A hidden directory beside the target, named after the run's inputs and options:

    .OUT.recovering-KEY/
        lock          held while the run lives; the system releases it, however the run ends
        checkpoint/   the weight files, data at their final offsets, no headers yet
        parts/        what else tensors leave behind, one file each
        journal/      a file for each process that writes, a line for each tensor, behind its checksum
        results       what the run is about to put in its places, by its hash; and again in results.copy
        replaced/     what stood in the target's place, until the checkpoint does, where names cannot be exchanged

A line is written when the tensor's bytes are on the disk, so that what a line speaks of is there; and it carries the
checksums of all that it speaks of, so that the next run finds out what has changed since. They are CRC-32: against
accidents, as whoever may write here could as well write the checksums. Runs of other inputs or options have other
directories: a process that outlives its run has nowhere to write what another would take for its own.
"""

import hashlib
import logging
import os
import shutil
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from detune.checkpoints.blocks import file_hash
from detune.checkpoints.disk import discard, exchange, reported, sync, sync_tree, write_new
from detune.checkpoints.journal import Journal
from detune.checkpoints.mark import MARK, find_foreign
from detune.checkpoints.results_note import ResultsNote
from detune.checkpoints.staging import is_ours, locked, remove, siblings, taken
from detune.errors import OutputError

__all__ = ["Noted", "RunDirectory", "claim", "noted_results", "remove_spent"]

logger = logging.getLogger(__name__)

_FOLDERS = ("journal", "parts", "checkpoint")
_REPLACED = "replaced"
_KIND = "recovering"
_AGAIN = "run the same command again: it computes again what has changed"


@dataclass(frozen=True)
class Noted:
    """The results that runs have written down before they were cut off.

    Attributes:
        hashes: By the places that the results go to.
        lost: Whether a run has something complete and no note that verifies: what stands in its places may be its own.
    """

    hashes: Mapping[str, str] = field(default_factory=dict)
    lost: bool = False


class RunDirectory:
    """The hidden directory of one run. Processes on any machine that see it may add to it.

    Args:
        directory: Made by `claim`.

    Attributes:
        directory: As given.
        checkpoint: The directory that becomes the output.
        journal: The tensors that are complete.
        note: The results that are about to be put in their places.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.checkpoint = directory / "checkpoint"
        self.journal = Journal(directory / "journal")
        self.note = ResultsNote(directory)

    def save_part(self, name: str, suffix: str, data: bytes) -> int:
        """Write something that belongs to a tensor, and wait until it is on the disk.

        Args:
            name: The tensor.
            suffix: What it is.
            data: Its content.

        Returns:
            Its CRC-32.

        Raises:
            OutputError: The disk refuses.
        """
        path = self._part(name, suffix)
        with reported(path):
            write_new(path, data)
        return zlib.crc32(data)

    def read_part(self, name: str, suffix: str, checksum: int) -> bytes:
        """Read what `save_part` wrote.

        Args:
            name: The tensor.
            suffix: What it is.
            checksum: What `save_part` returned.

        Raises:
            OutputError: It is not there any more, or has changed.
        """
        path = self._part(name, suffix)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise OutputError(f"cannot read {path}", str(error.strerror or error), _AGAIN) from error
        if zlib.crc32(data) != checksum:
            found = f"its checksum is {zlib.crc32(data):08x}, expected {checksum:08x}"
            raise OutputError(f"{path} has changed since it was written", found, _AGAIN)
        return data

    def _part(self, name: str, suffix: str) -> Path:
        return self.directory / "parts" / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}{suffix}"

    @property
    def has_folders(self) -> bool:
        """Whether all of its directories are there."""
        folders = [self.directory / name for name in _FOLDERS]
        return all(folder.is_dir() and not folder.is_symlink() for folder in folders)

    def clear(self) -> None:
        """Forget all that is complete."""
        for name in _FOLDERS:
            discard(self.directory / name)
            (self.directory / name).mkdir()
        sync(self.directory)

    @property
    def is_spent(self) -> bool:
        """Whether nothing in it is of use: nothing is complete, or its removal was cut off."""
        return not (self.note.exists or self._replaced.exists()) and self.journal.is_empty

    @property
    def noted(self) -> Noted:
        """The results that this run was about to put in their places when it was cut off."""
        hashes = self.note.hashes()
        return Noted(hashes, lost=not hashes and not self.is_spent)

    def mend(self) -> None:
        """Remove what no run has made, and replace a copy of the note that has been damaged by the other one.

        Raises:
            OutputError: The disk refuses.
        """
        with reported(self.directory):
            for path in self._found():
                status = path.lstat()
                # Read or written to, it would be something elsewhere, or never end.
                if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
                    logger.warning("removing %s: it is no file of a run; what it stood for is computed again", path)
                    discard(path)
            self.note.mend()

    def _found(self) -> list[Path]:
        """All that is in the journal and the parts, and all of the checkpoint but its folders."""
        flat = [path for folder in ("journal", "parts") for path in (self.directory / folder).iterdir()]
        return flat + [path for path in self.checkpoint.rglob("*") if path.is_symlink() or not path.is_dir()]

    @property
    def _replaced(self) -> Path:
        return self.directory / _REPLACED

    def place(self, out: Path, check: Callable[[Path], None]) -> None:
        """Rename the checkpoint to its place once all of it is on the disk.

        What is there changes places with it, in one step. Where the file system has no such step, it is moved aside in
        between, and put back by whoever claims `out` next, where this is cut off.

        Args:
            out: Its place.
            check: Refuses a target by raising: somebody may have put something there in the meantime.

        Raises:
            OutputError: `check` refused, or the disk does.
        """
        with reported(out):
            sync_tree(self.checkpoint)
            check(out)
            try:
                if not _is_filled(out):
                    os.rename(self.checkpoint, out)
                elif not exchange(self.checkpoint, out):
                    discard(self._replaced)
                    os.rename(out, self._replaced)
                    os.rename(self.checkpoint, out)
            except BaseException:
                self.put_back(out)
                raise
            sync(out.parent)

    def put_back(self, out: Path) -> None:
        """Put back what was moved aside for a checkpoint that did not take its place.

        Args:
            out: Its place.

        Raises:
            OutputError: There is something else, or the disk refuses.
        """
        if not self._replaced.exists() or self.has_placed(out):
            return
        if _is_filled(out):
            if self.noted.lost and find_foreign(out) is None:
                # Maybe this run's checkpoint: that is found out by computing it again.
                return
            raise OutputError(
                f"{self._replaced} is what stood in {out} until a run was cut off that was to replace it",
                "something else stands there now",
                "move one of the two elsewhere",
            )
        with reported(out):
            os.rename(self._replaced, out)
            sync(out.parent)

    def has_placed(self, out: Path) -> bool:
        """Whether what is in `out` is this run's checkpoint."""
        mark = out / MARK
        return mark.is_file() and self.note.hashes().get(str(mark)) == file_hash(mark)

    def remove(self) -> None:
        """Remove the directory, once its checkpoint has been moved to its place, or is of no use."""
        # The results last: while anything else is there, they say what it was for.
        for name in (*_FOLDERS, _REPLACED):
            shutil.rmtree(self.directory / name, ignore_errors=True)
        remove(self.directory)


@contextmanager
def claim(out: Path, key: str) -> Iterator[RunDirectory]:
    """Make the hidden directory of a run, or find it again, and keep every other run out of `out` meanwhile.

    What runs of other inputs or options left behind is removed; a directory that no run made stays.

    Args:
        out: The directory that the run makes, resolved.
        key: Stands for the run's inputs and options.

    Yields:
        The run's directory. It stays when the block ends, unless it has been removed.

    Raises:
        OutputError: Another run is writing to `out`, its place is taken, or the disk refuses.
    """
    own = out.with_name(f".{out.name}.{_KIND}-{key}")
    with reported(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        for other in siblings(out, _KIND):
            if other != own and is_ours(other, _is_of_a_run):
                with locked(other, out):
                    RunDirectory(other).put_back(out)
                    logger.info("removing %s: its run had other inputs or options", other)
                    RunDirectory(other).remove()
        try:
            own.mkdir()
        except FileExistsError:
            if not is_ours(own, _is_of_a_run):
                raise taken(own) from None
    with locked(own, out):
        run_directory = RunDirectory(own)
        run_directory.put_back(out)
        with reported(out):
            if not run_directory.has_folders:
                run_directory.clear()
        run_directory.mend()
        yield run_directory


def noted_results(out: Path) -> Noted:
    """Notes of interrupted runs on what they were about to put in a directory's place.

    Args:
        out: The directory that they were to make.
    """
    found = [RunDirectory(place).noted for place in siblings(out, _KIND) if is_ours(place, _is_of_a_run)]
    hashes = {path: value for noted in found for path, value in noted.hashes.items()}
    return Noted(hashes, any(noted.lost for noted in found))


def remove_spent(out: Path) -> None:
    """Remove what runs into `out` left of which nothing is of use, unless they still live.

    Args:
        out: The directory that they were to make.
    """
    for directory in siblings(out, _KIND):
        if is_ours(directory, _is_of_a_run) and RunDirectory(directory).is_spent:
            with suppress(OutputError), locked(directory, out, needs_lock=True):
                if RunDirectory(directory).is_spent:
                    remove(directory)


def _is_of_a_run(name: str) -> bool:
    return name in (*_FOLDERS, *ResultsNote.NAMES, _REPLACED)


def _is_filled(out: Path) -> bool:
    return out.exists() and any(out.iterdir())
