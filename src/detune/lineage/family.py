"""The report on a family: which models share a source, and their tree."""

from dataclasses import dataclass, fields

from detune.compatibility.check import FamilyCheck
from detune.lineage.tree import Lineage


@dataclass(frozen=True)
class Family(FamilyCheck):
    """A family: the content of `detune family --json`.

    Attributes:
        models: All, in the order given.
        tensors: Those that differ within the family, in file order.
        shared: Number of tensors that all of the family have in common.
        looked_at: Number of matrices that the groups are judged by.
        suffices: Whether at least three models share a source and every changed matrix can be recovered.
        verdict: One sentence.
        reading: How much of the models was read; None where it was all.
        lineage: Who descends from whom.
    """

    lineage: Lineage | None = None

    @classmethod
    def of(cls, check: FamilyCheck, lineage: Lineage) -> "Family":
        """Put both together."""
        return cls(**{each.name: getattr(check, each.name) for each in fields(FamilyCheck)}, lineage=lineage)
