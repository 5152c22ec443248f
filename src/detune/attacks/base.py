"""The protocol of attacks: recoveries as an outsider would run them who knows which defence was used."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Protocol

__all__ = ["Attack"]


class Attack(Protocol):
    """An attack with its settings, a frozen dataclass: it turns releases into a base.

    An attack sees the releases and nothing else: no base, no adapter, no seed.

    Attributes:
        name: What tables call it.
        about: One line: what it does, and which defence it knows.
        min_models: The fewest releases it needs.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    min_models: ClassVar[int]

    def run(self, models: Sequence[Path], out: Path) -> None:
        """Write the recovered base to `out`, in the layout, and in the frame, of the first release.

        The frame: where releases are permuted or rotated, the base comes back as the first release has it.

        Args:
            models: The releases.
            out: The directory to make.

        Raises:
            InputError: The attack does not apply to these models, or they are too few.
        """
        ...
