"""The leaderboard's page: `docs/leaderboard.md`, where the part between two marks is made of the entries."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from detune.bench.leaderboard.attack_sets import ATTACK_SETS
from detune.bench.leaderboard.entry import Entry
from detune.errors import InputError, OutputError, parsing
from detune.markdown import link, text

__all__ = ["BEGIN", "END", "LOSS_BOUND", "build_page", "ranked", "write_page"]

LOSS_BOUND = 0.01
"""The share of task quality that a defence may cost and still have a rank."""

BEGIN, END = "<!-- entries: made by `detune bench leaderboard build` -->", "<!-- end of entries -->"


def ranked(entries: Mapping[Path, Entry]) -> list[tuple[int | None, Path, Entry]]:
    """The entries of one set of attacks, best hidden first, with their ranks.

    Verified entries within `LOSS_BOUND` have a rank, by how close the best attack comes. The others stand where
    they would, without one; those that cost too much stand last.
    """
    order = sorted(
        entries.items(), key=lambda item: (item[1].utility.loss > LOSS_BOUND, item[1].times_closer, item[1].name)
    )
    rows: list[tuple[int | None, Path, Entry]] = []
    rank = 0
    for file, entry in order:
        counts = entry.status == "verified" and entry.utility.loss <= LOSS_BOUND
        rank += counts
        rows.append((rank if counts else None, file, entry))
    return rows


def build_page(entries: Mapping[Path, Entry], page: Path) -> str:
    """The page's text with the entries between its marks; the file is left as it is.

    Args:
        entries: By file; links lead there.
        page: The page as it is.

    Raises:
        InputError: It cannot be read, or lacks the marks.
    """
    with parsing(page, "run this in a checkout, or give --page"):
        before = page.read_text(encoding="utf-8")
    before, begin, rest = before.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise InputError(f"{page} has no place for entries", f"expected the lines {BEGIN} and {END}", "add them")
    made = "\n".join(_sections(entries, page.parent)) if entries else "There are no entries yet.\n"
    return f"{before}{BEGIN}\n\n{made}\n{END}{after}"


def write_page(entries: Mapping[Path, Entry], page: Path) -> None:
    """Write it.

    Raises:
        InputError: It cannot be read, or lacks the marks.
        OutputError: It cannot be written.
    """
    made = build_page(entries, page)
    try:
        page.write_text(made, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {page}", str(error.strerror), "choose another place") from None


def _sections(entries: Mapping[Path, Entry], folder: Path) -> Iterator[str]:
    for attack_set in sorted({entry.attack_set for entry in entries.values()}, reverse=True):
        frozen = ATTACK_SETS[attack_set]
        rows = ranked({file: entry for file, entry in entries.items() if entry.attack_set == attack_set})
        yield f"### {attack_set}\n"
        yield f"On {frozen.task}.\n"
        yield from _table(
            (
                "rank",
                "defence",
                "n",
                "worst attack",
                "W-Error",
                "embeddings",
                "times closer",
                "quality lost",
                "status",
                "by",
            ),
            [
                (
                    str(rank or "–"),
                    link(entry.name, Path(os.path.relpath(file, folder)).as_posix()),
                    str(entry.models),
                    entry.worst_attack,
                    f"{entry.w_errors[entry.worst_attack]:.2f}",
                    f"{entry.attacks[entry.worst_attack].embeddings:.2g}",
                    _times(entry.times_closer),
                    f"{round(100 * entry.utility.loss, 1) + 0.0:.1f} %",
                    entry.status,
                    _by(entry),
                )
                for rank, file, entry in rows
            ],
        )
        yield "What each attack gets, as W-Error; – is one that the defence did not meet, because it knows another:\n"
        yield from _table(
            ("defence", *frozen.attacks),
            [(text(entry.name), *(_figure(entry, attack) for attack in frozen.attacks)) for _, _, entry in rows],
        )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{' --- |' * len(head)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def _figure(entry: Entry, attack: str) -> str:
    if attack not in entry.attacks:
        return "–"
    if attack not in entry.w_errors:
        return "no answer"
    figure = f"{entry.w_errors[attack]:.2f}"
    return f"**{figure}**" if attack == entry.worst_attack else figure


def _times(factor: float) -> str:
    if factor >= 1e7:
        return "over 10,000,000"
    return f"{factor:.1f}" if factor < 100 else f"{float(f'{factor:.1e}'):,.0f}"


def _by(entry: Entry) -> str:
    names = ", ".join(entry.authors)
    return link(names, entry.link) if entry.link else text(names)
