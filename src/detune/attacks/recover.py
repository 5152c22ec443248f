"""Attacks that know no defence: what anybody would try first."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from detune.attacks.rebuild import rebuild
from detune.methods import Mean
from detune.recovery.api import recover

__all__ = ["Average", "Bits", "Recover"]


@dataclass(frozen=True)
class Average:
    """The mean of the releases: what every other attack has to beat."""

    name: ClassVar[str] = "average"
    about: ClassVar[str] = "the mean of the releases; knows no defence"
    min_models: ClassVar[int] = 1

    def run(self, models: Sequence[Path], out: Path) -> None:
        """Average; see `Attack.run`."""
        rebuild(models, out, self.min_models, lambda name, stack: Mean().solve(stack).weight)


@dataclass(frozen=True)
class Recover:
    """`detune recover` as it comes."""

    name: ClassVar[str] = "recover"
    about: ClassVar[str] = "detune recover as it comes; knows no defence"
    min_models: ClassVar[int] = 3

    def run(self, models: Sequence[Path], out: Path) -> None:
        """Recover; see `Attack.run`."""
        recover(models, out, card=False)


@dataclass(frozen=True)
class Bits:
    """`detune recover --method lattice`: a base on a coarser grid than the releases, from as few as one."""

    name: ClassVar[str] = "lattice"
    about: ClassVar[str] = "looks for a base on a coarser grid than the releases; one or two may do"
    min_models: ClassVar[int] = 1

    def run(self, models: Sequence[Path], out: Path) -> None:
        """Recover with `lattice`; see `Attack.run`."""
        recover(models, out, "lattice", card=False)
