"""The report on a family: which models share a source, and their tree."""

from dataclasses import dataclass, fields

from detune.compatibility.check import FamilyCheck
from detune.lineage.tree import Lineage


@dataclass(frozen=True)
class Family(FamilyCheck):
    """A family check with its lineage: the content of `detune family --json`.

    Attributes:
        lineage: Who descends from whom.
    """

    lineage: Lineage | None = None

    @classmethod
    def of(cls, check: FamilyCheck, lineage: Lineage) -> "Family":
        """Put both together."""
        return cls(**{each.name: getattr(check, each.name) for each in fields(FamilyCheck)}, lineage=lineage)
