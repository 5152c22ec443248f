"""Measure and verify entries: a row of the matrix becomes an entry, and an entry's figures are made again."""

from collections.abc import Sequence
from datetime import UTC, datetime
from math import log10
from pathlib import Path

from detune.attacks import ATTACKS
from detune.bench.defences import RowResult
from detune.bench.leaderboard.attack_sets import ATTACK_SETS, LATEST
from detune.bench.leaderboard.entry import Attacked, Entry, Making, Utility, file_name, read_entry, write_entry
from detune.bench.results import Environment
from detune.errors import InputError, OutputError

__all__ = ["add", "differences", "entry_of", "verify"]

W_ERROR_TOLERANCE = 0.1
"""Another machine adds in another order."""

EMBEDDINGS_FLOOR = 1e-4
"""The smallest distance that counts: between two smaller ones rounding decides."""

ACCURACY_TOLERANCE = 0.005
"""A few passages of some hundreds."""


def entry_of(result: RowResult, authors: Sequence[str], command: str, link: str | None = None) -> Entry:
    """A row's figures as a claimed entry of the latest set of attacks.

    Args:
        result: Result of `detune.bench.defences`.
        authors: Who answers for it.
        command: That made the row.
        link: A paper, or the code.

    Raises:
        InputError: No attack gave an answer, or one has other settings than the set's.
    """
    if not result.answers:
        raise InputError(
            f"no attack on {result.name!r} gave an answer",
            f"the first, {result.attacks[0].name}, says: {result.attacks[0].failure}"
            if result.attacks
            else "none was tried",
            "add an attack to the row that does: average, for one",
        )
    for attack in result.attacks:
        found, expected = repr(ATTACKS[attack.name]()), ATTACK_SETS[LATEST].attacks.get(attack.name)
        if found != expected:
            raise InputError(
                f"the attack {attack.name} is not that of {LATEST}",
                f"found {found}, expected {expected}",
                "a changed attack needs a new set in detune.bench.leaderboard.attack_sets",
            )
    return Entry(
        name=result.name,
        defence=result.defence,
        authors=tuple(authors),
        link=link,
        attack_set=LATEST,
        models=result.models,
        average=Attacked(w_error=result.undefended_w_error, embeddings=result.undefended_embeddings),
        utility=Utility(undefended=result.undefended_accuracy, defended=result.accuracy),
        attacks={
            attack.name: Attacked(w_error=attack.w_error, embeddings=attack.embeddings, failure=attack.failure)
            for attack in result.attacks
        },
        status="claimed",
        made=Making(date=datetime.now(UTC).date(), command=command, environment=Environment.now("cpu")),
    )


def add(
    results: Sequence[RowResult], entries: Path, authors: Sequence[str], command: str, link: str | None = None
) -> list[Path]:
    """Write rows as claimed entries.

    Args:
        results: Results of `detune.bench.defences`.
        entries: The folder of entries.
        authors: Who answers for them.
        command: That made the rows.
        link: A paper, or the code.

    Returns:
        The files.

    Raises:
        InputError: No attack on a row gave an answer, or one has other settings than the latest set's.
        OutputError: There is such an entry already.
    """
    made = {entries / file_name(result.name): entry_of(result, authors, command, link) for result in results}
    for file in made:
        if file.exists():
            raise OutputError(f"{file} exists", "expected no entry of that name", "remove it, or verify it")
    for file, entry in made.items():
        write_entry(entry, file)
    return list(made)


def verify(results: Sequence[RowResult], entries: Path, command: str) -> list[Path]:
    """Compare entries with rows that were computed here, and write them as verified, with the rows' figures.

    Args:
        results: Rows of the entries' names.
        entries: The folder of entries.
        command: That made the rows.

    Returns:
        The files.

    Raises:
        InputError: There is no such entry, or its figures do not come out again; none is written then.
    """
    confirmed = {}
    for result in results:
        file = entries / file_name(result.name)
        claimed = read_entry(file)
        fresh = entry_of(result, claimed.authors, command, claimed.link)
        if found := differences(claimed, fresh):
            raise InputError(
                f"{file} does not come out again", ", ".join(found), "give the code and settings that make its figures"
            )
        update = {"status": "verified", "made": claimed.made, "verified": fresh.made}
        confirmed[file] = Entry.model_validate(fresh.model_dump() | update)
    for file, entry in confirmed.items():
        write_entry(entry, file)
    return list(confirmed)


def differences(claimed: Entry, fresh: Entry) -> list[str]:
    """Say in words which figures of an entry do not come out again; an attack that comes less close counts too."""
    found = []
    for field in ("name", "defence", "attack_set", "models"):
        ours, theirs = getattr(fresh, field), getattr(claimed, field)
        if ours != theirs:
            found.append(f"{field} is {ours!r}, not {theirs!r}")
    for attack in {**claimed.attacks, **fresh.attacks}:
        found += _between(f"by {attack}", claimed.attacks.get(attack), fresh.attacks.get(attack))
    found += _between("of the average", claimed.average, fresh.average)
    for field in ("undefended", "defended"):
        ours, theirs = getattr(fresh.utility, field), getattr(claimed.utility, field)
        if abs(ours - theirs) > ACCURACY_TOLERANCE:
            found.append(f"accuracy {field} is {ours:.3f}, not {theirs:.3f}")
    return found


def _between(whose: str, claimed: Attacked | None, fresh: Attacked | None) -> list[str]:
    if claimed is None or fresh is None:
        there = "not tried" if fresh is None else "tried"
        return [f"the attack {whose.removeprefix('by ')} was {there}"]
    found = []
    if not _alike(claimed.w_error, fresh.w_error, W_ERROR_TOLERANCE):
        found.append(f"W-Error {whose} is {_figure(fresh.w_error)}, not {_figure(claimed.w_error)}")
    ours, theirs = (max(each.embeddings or 0.0, EMBEDDINGS_FLOOR) for each in (fresh, claimed))
    if not _alike(log10(theirs), log10(ours), W_ERROR_TOLERANCE):
        found.append(f"distance of embeddings {whose} is {ours:.1e}, not {theirs:.1e}")
    return found


def _alike(one: float | None, other: float | None, tolerance: float) -> bool:
    return one is other is None or (one is not None and other is not None and abs(one - other) <= tolerance)


def _figure(w_error: float | None) -> str:
    return "none" if w_error is None else f"{w_error:.2f}"
