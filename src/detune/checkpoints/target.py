"""Where a checkpoint goes, and what may be lost there."""

from dataclasses import dataclass
from pathlib import Path

from detune.checkpoints.atomic import require_space
from detune.checkpoints.headers import PICKLE_SUFFIXES
from detune.errors import OutputError

__all__ = ["Target"]

_CHECKPOINT_SIGNS = ("detune.json", "model_index.json")


@dataclass(frozen=True)
class Target:
    """Where a checkpoint will be, and what may be there before.

    Attributes:
        out: The directory. A link to a directory stays a link: what it points to is replaced.
        overwrite: Whether a checkpoint there may be replaced.
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
            OutputError: There is something in its place that may not be replaced.
        """
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
                    f"{out} cannot be overwritten",
                    f"it is, contains or lies inside the input {path}",
                    "choose another",
                )
        _require_checkpoint(out)

    def require_space(self, needed_bytes: int) -> None:
        """Refuse to begin what the disk cannot hold.

        Args:
            needed_bytes: What is still to be written.

        Raises:
            OutputError: There is less space.
        """
        require_space(self.out, needed_bytes)


def _require_checkpoint(out: Path) -> None:
    children = list(out.iterdir())
    # A config.json alone may be anybody's: it needs weights beside it.
    has_weights = any(child.suffix in (".safetensors", *PICKLE_SUFFIXES) for child in children)
    only_weights = all(child.suffix in (".safetensors", *PICKLE_SUFFIXES) for child in children)
    is_model = only_weights or (has_weights and (out / "config.json").is_file())
    if not is_model and not any((out / sign).is_file() for sign in _CHECKPOINT_SIGNS):
        raise OutputError(
            f"{out} does not look like a checkpoint",
            f"found {children[0].name} and none of {', '.join(_CHECKPOINT_SIGNS)}",
            "remove it yourself or choose another output directory",
        )
