"""The target of a checkpoint, and what may be lost there."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from detune.checkpoints.disk import require_space, require_writable
from detune.checkpoints.mark import find_foreign
from detune.errors import OutputError

__all__ = ["Target", "require_outside"]

_CURE = "choose another"


@dataclass(frozen=True)
class Target:
    """The place that a checkpoint will be in, and what may be there before.

    Attributes:
        out: The directory. A link to a directory stays a link: what it points to is replaced.
        overwrite: Whether an earlier recovery there may be replaced.
        inputs: Files and directories that must survive.
    """

    out: Path
    overwrite: bool = False
    inputs: tuple[Path, ...] = ()

    def check(self, out: Path) -> None:
        """Refuse a target that must stay as it is.

        Args:
            out: The target, resolved.

        Raises:
            OutputError: There is something in its place that may not be replaced, or nothing can be put there.
        """
        require_writable(out)
        if not out.exists():
            return
        if not out.is_dir():
            raise OutputError(f"{out} exists", "it is not a directory", "choose another output directory")
        if not any(out.iterdir()):
            return
        if not self.overwrite:
            raise OutputError(
                f"{out} exists and is not empty",
                "expected a new or empty directory",
                "choose another, or allow it with --overwrite",
            )
        for path in (path.resolve() for path in self.inputs):
            if path == out or path.is_relative_to(out) or out.is_relative_to(path):
                raise OutputError(
                    f"{out} cannot be overwritten", f"it is, contains or lies inside the input {path}", _CURE
                )
        foreign = find_foreign(out)
        if foreign is not None:
            raise OutputError(
                f"{out} cannot be overwritten",
                f"{foreign}, expected what recover wrote and nothing else",
                "move or remove it yourself, or choose another",
            )

    def require_space(self, needed_bytes: int) -> None:
        """Refuse to begin what the disk cannot hold.

        Args:
            needed_bytes: What is still to be written.

        Raises:
            OutputError: There is less space.
        """
        require_space(self.out, needed_bytes)


def require_outside(out: Path, places: Iterable[Path]) -> None:
    """Refuse to write into an input.

    Args:
        out: What is to be made, resolved.
        places: Files and directories that are read.

    Raises:
        OutputError: It is one of them, or lies inside.
    """
    for place in (place.resolve() for place in places):
        if out.is_relative_to(place):
            raise OutputError(f"{out} is the input {place}, or lies inside it", "expected a place elsewhere", _CURE)
