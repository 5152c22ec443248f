"""The note of a run on the results that it is about to put in their places: what they are, by their hashes.

It is written twice. Without it nobody could tell a result that is in its place from what somebody else has put there.
"""

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from detune.checkpoints.disk import reported, sync, write_new
from detune.errors import InputError
from detune.files import open_regular, seal, unseal

__all__ = ["ResultsNote"]

logger = logging.getLogger(__name__)


class ResultsNote:
    """Both copies of a run's note.

    Args:
        directory: The run's directory.

    Attributes:
        NAMES: What the note may consist of.
    """

    NAMES = ("results", "results.copy", "results.new")

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        *copies, self._new = (directory / name for name in self.NAMES)
        self._copies = copies

    @property
    def exists(self) -> bool:
        """Whether there is a copy, in whatever state."""
        return any(path.exists() for path in self._copies)

    def hashes(self) -> Mapping[str, str]:
        """A hash of each result, by its path; none where no copy verifies."""
        return next((note for note in map(_read, self._copies) if note is not None), {})

    def write(self, hashes: Mapping[str, str]) -> None:
        """Write down what will be put in its place, so that the next run knows it where this one is cut off.

        Args:
            hashes: A hash of each result, by its path.

        Raises:
            OutputError: The disk refuses.
        """
        for path in self._copies:
            with reported(path):
                write_new(self._new, seal(hashes))
                os.replace(self._new, path)
                sync(self._directory)

    def mend(self) -> None:
        """Put the other copy in the place of one that was damaged.

        Raises:
            OSError: The disk refuses.
            OutputError: As above.
        """
        damaged = [path for path in self._copies if os.path.lexists(path) and _read(path) is None]
        if not damaged:
            return
        hashes = self.hashes()
        known = "its copy is used" if hashes else "what is in its place already is computed again and compared"
        logger.warning("%s has been damaged: %s", damaged[0], known)
        for path in damaged:
            # An empty one for the time being: that there was a note stays known.
            write_new(path, b"")
        if hashes:
            self.write(hashes)


def _read(path: Path) -> dict[str, str] | None:
    """The content of a copy; None where there is none, or it does not verify."""
    with suppress(OSError, InputError), open_regular(path) as file:
        note = unseal(file.read())
        return note if isinstance(note, dict) else None
    return None
