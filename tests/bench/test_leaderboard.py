"""Entries of the leaderboard, their order, the page made of them, and whether figures come out again."""

import json
import shutil
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest

from detune.attacks import ATTACKS
from detune.bench.defences import AttackResult, RowResult
from detune.bench.leaderboard import (
    ATTACK_SETS,
    LATEST,
    Entry,
    Making,
    add,
    build_page,
    entry_of,
    ranked,
    read_entries,
    read_entry,
    verify,
    write_entry,
)
from detune.bench.results import Environment
from detune.errors import InputError, OutputError

ROOT = Path(__file__).parents[2]
ENTRIES, PAGE = ROOT / "docs" / "leaderboard" / "entries", ROOT / "docs" / "leaderboard.md"

ENVIRONMENT = Environment(versions={"detune": "0.1.0"}, code_sha256="0" * 64, system="any", threads=1, device="cpu")
COMMAND = "detune bench defences --only noise"


def row(name: str = "noise", best: float = -6.0, loss: float = 0.0) -> RowResult:
    """A row of the matrix: `recover` comes closest, `denoise` gives no answer, and the others were not tried."""
    cells = (
        AttackResult("average", -5.5, 0.5, None, 1.0),
        AttackResult("recover", best, 0.4, None, 1.0),
        AttackResult("denoise", None, None, "the ranks leave no room", 1.0),
    )
    return RowResult(name, "Noise(size=0.03)", 5, 0.5 * (1 - loss), 0.5, -5.4, 0.6, cells)


def entry(name: str = "noise", best: float = -6.0, loss: float = 0.0, status: str = "verified") -> Entry:
    made = entry_of(row(name, best, loss), ["A. Author"], COMMAND, "https://example.org/paper")
    making = Making(date=date(2026, 1, 2), command=COMMAND, environment=ENVIRONMENT)
    return made.model_copy(
        update={"made": making, "status": status, "verified": making if status == "verified" else None}
    )


def in_files(folder: Path, *entries: Entry) -> dict[Path, Entry]:
    for each in entries:
        write_entry(each, folder / "entries" / f"{each.name}.json")
    return read_entries(folder / "entries")


def copied_page(folder: Path) -> Path:
    return Path(shutil.copy(PAGE, folder))


def test_a_set_of_attacks_never_changes():
    assert {name: repr(attack()) for name, attack in ATTACKS.items()} == ATTACK_SETS[LATEST].attacks, (
        "an attack came or changed: give it a new set, and make LATEST that one"
    )


def test_a_row_that_no_attack_answers_is_no_entry():
    silent = replace(row(), attacks=(AttackResult("denoise", None, None, "the ranks leave no room", 1.0),))
    with pytest.raises(InputError, match="no attack on 'noise' gave an answer; the first, denoise, says: the ranks"):
        entry_of(silent, ["A. Author"], COMMAND)


def test_an_entry_comes_back_from_its_file(tmp_path):
    write_entry(entry(), tmp_path / "noise.json")
    assert read_entry(tmp_path / "noise.json") == entry()


def test_the_attack_that_comes_closest_counts():
    assert entry(best=-9.4).worst_attack == "recover"
    assert entry(best=-9.4).times_closer == pytest.approx(100), "by the weights"
    assert entry(best=-5.0).times_closer == pytest.approx(1.5**0.5), "by what the model does"


def test_ranks_go_to_verified_entries_that_cost_little(tmp_path):
    entries = in_files(
        tmp_path,
        entry("leaky", best=-17),
        entry("good", best=-6),
        entry("claimed", best=-5.7, status="claimed"),
        entry("costly", best=-5, loss=0.02),
        entry("near the bound", best=-7, loss=0.0099),
    )
    order = [(rank, each.name) for rank, _, each in ranked(entries)]
    assert order == [(None, "claimed"), (1, "good"), (2, "near the bound"), (3, "leaky"), (None, "costly")]


def test_the_page_has_both_tables(tmp_path):
    page = copied_page(tmp_path)
    text = build_page(in_files(tmp_path, entry("good"), entry("leaky", best=-17.4, loss=0.005)), page)
    by = "[A. Author](https://example.org/paper)"
    assert f"| 1 | [good](entries/good.json) | 5 | recover | -6.00 | 0.4 | 2.0 | 0.0 % | verified | {by} |" in text
    assert (
        f"| 2 | [leaky](entries/leaky.json) | 5 | recover | -17.40 | 0.4 | 1,000,000 | 0.5 % | verified | {by} |"
        in text
    )
    assert "| leaky | -5.50 | **-17.40** | – | no answer | – | – | – | – |" in text
    assert "| over 10,000,000 |" in build_page(in_files(tmp_path, entry("exact", best=-20)), page)
    (tmp_path / "entries" / "exact.json").unlink()
    page.write_text(text, encoding="utf-8")
    assert build_page(read_entries(tmp_path / "entries"), page) == text, "building twice changes nothing"
    assert "There are no entries yet." in build_page({}, page)


def test_the_page_in_the_repository_is_what_its_entries_make():
    entries = read_entries(ENTRIES)
    assert entries
    assert build_page(entries, PAGE) == PAGE.read_text(encoding="utf-8"), "run `detune bench leaderboard build`"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"status": "proven"}, r"is no entry of the leaderboard; status: Input should be 'verified' or 'claimed'"),
        ({"status": "claimed"}, r'status "verified" and the field "verified" belong together'),
        ({"attack_set": "mine-v1"}, r"no attack set 'mine-v1'; there are detune-attacks-v1"),
        (
            {"attacks": {"guess": {"w_error": -5.0, "embeddings": 1}}},
            rf"'guess' is no attack of {LATEST}; it has av",
        ),
        (
            {"attacks": {"prior": {"w_error": None, "embeddings": None, "failure": "why"}}},
            r"no attack gave an answer, and the average",
        ),
        ({"name": "a | b"}, r"name: String should match pattern"),
        ({"link": "http://example.org"}, r"link: String should match pattern"),
        ({"link": "https://a b"}, r"link: String should match pattern"),
        ({"authors": []}, r"authors: Tuple should have at least 1 item"),
        ({"w_error": -20}, r"w_error: Extra inputs are not permitted"),
        ({"utility": {"undefended": 0, "defended": 0}}, r"utility.undefended: .* greater than 0"),
        ({"average": {"w_error": "nan", "embeddings": 1}}, r"average.w_error: Input should be a finite number"),
    ],
)
def test_what_is_wrong_with_an_entry_is_said(tmp_path, change, message):
    file = tmp_path / "entry.json"
    file.write_text(json.dumps(entry().model_dump(mode="json") | change), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_entry(file)


def test_an_attack_has_a_figure_or_a_reason(tmp_path):
    wrong = entry().model_dump(mode="json")
    wrong["attacks"]["align"] = {"w_error": -5.0, "embeddings": None}
    (tmp_path / "entry.json").write_text(json.dumps(wrong), encoding="utf-8")
    with pytest.raises(InputError, match=r"attacks.align: .*give both figures, or the reason why there are none"):
        read_entry(tmp_path / "entry.json")


def test_no_file_no_folder_no_marks(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*; No such file or directory; give an entry's name"):
        read_entry(tmp_path / "none.json")
    with pytest.raises(InputError, match=r"no folder .*; expected one with entries"):
        read_entries(tmp_path / "none")
    with pytest.raises(InputError, match=r"cannot read .*page.md"):
        build_page({}, tmp_path / "page.md")
    (tmp_path / "page.md").write_text("# Leaderboard\n", encoding="utf-8")
    with pytest.raises(InputError, match="has no place for entries"):
        build_page({}, tmp_path / "page.md")


def test_rows_become_claimed_and_then_verified_entries(tmp_path):
    (file,) = add([row("noise 1.0%")], tmp_path, ["A. Author"], COMMAND, "https://example.org/paper")
    claimed = read_entry(file)
    assert (file.name, claimed.status, claimed.verified) == ("noise-1.0.json", "claimed", None)
    assert claimed.attacks["denoise"].failure == "the ranks leave no room"
    # Elsewhere rounding adds up in another order.
    assert verify([row("noise 1.0%", best=-6.05)], tmp_path, COMMAND) == [file]
    verified = read_entry(file)
    assert (verified.status, verified.w_errors["recover"], verified.made) == ("verified", -6.05, claimed.made)
    with pytest.raises(OutputError, match=r"noise-1.0.json exists; expected no entry of that name"):
        add([row("noise 1.0%")], tmp_path, ["A. Author"], COMMAND)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (row(best=-6.2), "W-Error by recover is -6.20, not -6.00"),
        (row(best=-5.8), "W-Error by recover is -5.80, not -6.00"),
        (row(loss=0.02), "accuracy defended is 0.490, not 0.500"),
        (replace(row(), undefended_embeddings=0.2), "distance of embeddings of the average is 2.0e-01, not 6.0e-01"),
        (replace(row(), models=3), "models is 3, not 5"),
        (replace(row(), defence="Noise(size=0.1)"), r"defence is 'Noise\(size=0.1\)', not 'Noise\(size=0.03\)'"),
        (replace(row(), undefended_w_error=-6.0), "W-Error of the average is -6.00, not -5.40"),
        (
            replace(row(), attacks=(*row().attacks, AttackResult("align", -17.0, 0.0, None, 1.0))),
            "the attack align was tried",
        ),
        (replace(row(), attacks=row().attacks[:1]), "the attack recover was not tried"),
    ],
)
def test_an_entry_that_does_not_come_out_again_stays_claimed(tmp_path, found, message):
    (file,) = add([row()], tmp_path, ["A. Author"], COMMAND)
    before = file.read_bytes()
    with pytest.raises(InputError, match=rf"does not come out again; {message}"):
        verify([found], tmp_path, COMMAND)
    assert file.read_bytes() == before


def test_an_attack_with_other_settings_makes_no_entry(monkeypatch):
    monkeypatch.setitem(ATTACKS, "recover", ATTACKS["average"])
    with pytest.raises(InputError, match=rf"the attack recover is not that of {LATEST}; found Average\(\)"):
        entry_of(row(), ["A. Author"], COMMAND)


def test_the_command_adds_verifies_and_builds(command, monkeypatch, tmp_path):
    monkeypatch.setattr("detune.bench.defences.bench_defences", lambda out, only, **told: tuple(map(row, only)))
    page, entries = copied_page(tmp_path), tmp_path / "leaderboard" / "entries"
    words = ("--out", tmp_path / "out", "--entries", entries)
    ran = command("bench", "leaderboard", "add", "noise", "int8", *words, "--by", "A. Author")
    assert ran.code == 0
    assert ran.out.splitlines() == [f"wrote {entries / 'noise.json'}", f"wrote {entries / 'int8.json'}"]
    assert read_entry(entries / "int8.json").made.command == "detune bench defences --only noise --only int8"
    ran = command("bench", "leaderboard", "verify", "noise", *words)
    assert (ran.code, ran.out) == (0, f"verified {entries / 'noise.json'}\n")
    ran = command("bench", "leaderboard", "verify", "int4", *words)
    assert ran.code == 2
    assert "int4.json; No such file or directory" in ran.err
    ran = command("bench", "leaderboard", "build", "--entries", entries, "--page", page)
    assert (ran.code, ran.out) == (0, f"wrote 2 entries into {page}\n")
    assert "| 1 | [noise](leaderboard/entries/noise.json) |" in page.read_text(encoding="utf-8")
