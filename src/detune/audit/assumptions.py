"""The assumptions that a recovery rests on, and whether they hold for these releases."""

from collections.abc import Sequence
from dataclasses import dataclass

from detune.audit.members import ENOUGH
from detune.audit.record import ModelEntry, Outcome, Result, Rule, TensorEntry
from detune.certificate.verdict import Verdict
from detune.compatibility.groups import STRANGER, BaseGroups
from detune.compatibility.mismatch import Cause
from detune.origin import Origin

__all__ = ["ASSUMPTIONS", "Evidence", "check_assumptions"]

# Changes that stand less than twice over the rounding are half hidden by it.
CLEAR = 2.0
# Adapters above this share of the full rank are not low-rank.
LOW = 1 / 4

ASSUMPTIONS = (
    Rule(
        id="same-source",
        title="The releases share one base",
        help="A difference of two releases is then one of two adapters. A release of another base is left out.",
    ),
    Rule(
        id="alignment",
        title="Neurons and heads are in the same order",
        help="Permuted or rotated releases differ at full rank, until somebody matches them again: tried here.",
    ),
    Rule(
        id="count",
        title="There are at least three releases",
        help="A difference of two splits into two adapters in infinitely many ways. A third decides.",
    ),
    Rule(
        id="low-rank",
        title="Each change has a low rank",
        help="LoRA and most of its kin change a matrix so. Full fine-tuning does not, and is safe from this.",
    ),
    Rule(
        id="rank-sums",
        title="The ranks leave room",
        help="The closed form needs r1 + r2 + r3 ≤ max(out, in) and ri + rj ≤ min(out, in).",
    ),
    Rule(
        id="uniqueness",
        title="The adapters' spaces are not shared",
        help="What all adapters have in common, one frozen A for instance, hides the base inside it for good.",
    ),
    Rule(
        id="precision",
        title="The changes stand out from the rounding",
        help="Rounding is all that is left between the recovered weights and the base's: coarse storage hides more.",
    ),
    Rule(
        id="coarse-base",
        title="The base was stored more coarsely than the releases",
        help="Its weights then lie on a grid, and snapping to it gives their very bits. Small changes show on it even "
        "with one or two releases.",
    ),
)


@dataclass(frozen=True)
class Evidence:
    """The evidence that the assumptions are judged by.

    Attributes:
        models: The releases given.
        groups: How they were grouped; None for a single one.
        matrices: Changed matrices.
    """

    models: Sequence[ModelEntry]
    groups: BaseGroups | None
    matrices: Sequence[TensorEntry]

    @property
    def given(self) -> int:
        """Number of releases."""
        return len(self.models)

    @property
    def used(self) -> int:
        """Number of them that share a base."""
        return sum(model.left_out is None for model in self.models)

    @property
    def outcomes(self) -> list[tuple[TensorEntry, Outcome]]:
        """The outcome of all releases for each matrix."""
        return [(entry, entry.outcomes[-1]) for entry in self.matrices]

    @property
    def ranked(self) -> list[tuple[TensorEntry, Outcome]]:
        """The matrices whose ranks were found."""
        return [(entry, outcome) for entry, outcome in self.outcomes if outcome.ranks]


def check_assumptions(evidence: Evidence) -> tuple[Result, ...]:
    """Judge every assumption, in the order of the table.

    Args:
        evidence: Evidence of an audit.

    Returns:
        A result each. What helps whoever wants the base is a warning.
    """
    checks = (
        _same_source,
        _alignment,
        _count,
        _low_rank,
        _rank_sums,
        _uniqueness,
        _precision,
        _coarse_base,
    )
    return tuple(_result(rule, *check(evidence)) for rule, check in zip(ASSUMPTIONS, checks, strict=True))


def _result(rule: Rule, holds: bool | None, message: str) -> Result:
    return Result(rule_id=rule.id, level="warning" if holds else "note", message=message, holds=holds)


Checked = tuple[bool | None, str]


def _same_source(evidence: Evidence) -> Checked:
    if evidence.groups is None:
        return None, "one release alone does not tell"
    judged = len(evidence.groups.splits)
    return evidence.used > 1, f"{evidence.used} of {evidence.given} releases do, judged by {_matrices(judged)}"


def _alignment(evidence: Evidence) -> Checked:
    if evidence.groups is None:
        return None, "one release alone does not tell"
    matched = sum(model.realigned for model in evidence.models)
    if matched:
        return False, f"{matched} of {evidence.given} releases had to be matched to the first one, and could be"
    permuted = sum(STRANGER[Cause.ROWS] in (model.left_out or "") for model in evidence.models)
    if permuted:
        return False, f"{permuted} of {evidence.given} releases have them in another order"
    return evidence.used > 1, f"nothing is out of place in {evidence.used} of {evidence.given} releases"


def _count(evidence: Evidence) -> Checked:
    return evidence.used >= ENOUGH, f"{evidence.used} of one base, and {ENOUGH} are enough"


def _low_rank(evidence: Evidence) -> Checked:
    if not evidence.matrices or evidence.used < ENOUGH:
        return None, "fewer than three releases do not tell the ranks"
    low = [(entry, max(outcome.ranks)) for entry, outcome in evidence.ranked if _is_low(entry, max(outcome.ranks))]
    # A model that left a matrix alone gives it away: the others' ranks are known all the same.
    asked = sum(outcome.origin is not Origin.UNCHANGED or bool(outcome.ranks) for _, outcome in evidence.outcomes)
    noisy = sum(outcome.origin is Origin.DENOISED for _, outcome in evidence.outcomes)
    if noisy and not low:
        return (
            False,
            f"{_matrices(noisy)} changed at full rank, by noise; adapters were split off as far as they stand over it",
        )
    if not low:
        return (
            (False, f"none of {_matrices(asked)} changed by a low rank")
            if asked
            else (None, "two releases left each matrix as it was")
        )
    rank = max(rank for _, rank in low)
    side = min(_side(entry)[0] for entry, found in low if found == rank)
    message = f"{len(low)} of {_matrices(asked)} do: rank {rank} of {side} at most"
    return len(low) == asked, message


def _rank_sums(evidence: Evidence) -> Checked:
    if not evidence.ranked or evidence.used < ENOUGH:
        return None, "no ranks were found"
    fitting, most = 0, (0.0, "")
    for entry, outcome in evidence.ranked:
        short, long = _side(entry)
        largest = sorted(outcome.ranks, reverse=True)
        three, two = sum(largest[:3]), sum(largest[:2])
        fitting += three <= long and two <= short
        most = max(most, (three / long, f"three ranks add up to {three} of {long}"))
    return fitting == len(evidence.ranked), f"in {fitting} of {_matrices(len(evidence.ranked))}; {most[1]} at most"


def _uniqueness(evidence: Evidence) -> Checked:
    known = [outcome.undetermined for _, outcome in evidence.outcomes if outcome.undetermined is not None]
    if not known or evidence.used < ENOUGH:
        return None, "not looked at: there is no answer with adapters split off"
    lost = [dimension for dimension in known if dimension]
    if lost:
        return False, (
            f"{len(lost)} of {_matrices(len(known))} hold directions that the releases cannot tell, {max(lost)} at most"
        )
    doubtful = sum(
        outcome.verdict is Verdict.APPROXIMATE and not outcome.given_away for _, outcome in evidence.outcomes
    )
    if doubtful:
        return None, f"{doubtful} of {_matrices(len(known))} came out approximate, so directions may hide"
    return True, f"no direction is undetermined in {_matrices(len(known))}"


def _precision(evidence: Evidence) -> Checked:
    ratios = [entry.change / entry.noise for entry in evidence.matrices if entry.change and entry.noise]
    if not ratios:
        return None, "the size of the changes is not known"
    dtypes = ", ".join(dict.fromkeys(entry.dtype for entry in evidence.matrices))
    return min(ratios) >= CLEAR, f"they are {_digits(min(ratios))} times the rounding of {dtypes}, and more"


def _coarse_base(evidence: Evidence) -> Checked:
    found = [outcome.grid for _, outcome in evidence.outcomes if outcome.grid]
    if not evidence.matrices:
        return None, "no changed matrix to tell by"
    if not found:
        sure = evidence.used >= ENOUGH and all(outcome.given_away for _, outcome in evidence.outcomes)
        return False if sure else None, "no grid shows" + ("" if sure else ", which says little without a recovery")
    return True, f"{', '.join(dict.fromkeys(found))} shows in {len(found)} of {_matrices(len(evidence.matrices))}"


def _is_low(entry: TensorEntry, rank: int) -> bool:
    return 0 < rank <= LOW * _side(entry)[0]


def _side(entry: TensorEntry) -> tuple[int, int]:
    """The shorter and the longer side of the matrix."""
    rows = entry.shape[0]
    columns = 1
    for size in entry.shape[1:]:
        columns *= size
    return min(rows, columns), max(rows, columns)


def _digits(times: float) -> str:
    """A ratio to two digits."""
    return f"{float(f'{times:.2g}'):,.0f}" if times >= 10 else f"{times:.2g}"


def _matrices(count: int) -> str:
    return f"{count} {'matrix' if count == 1 else 'matrices'}"
