"""The leaderboard of defences: entries as JSON, each against a frozen set of attacks, and a page made of them."""

from detune.bench.leaderboard.attack_sets import ATTACK_SETS, LATEST, AttackSet
from detune.bench.leaderboard.entry import (
    Attacked,
    Entry,
    Making,
    Utility,
    file_name,
    read_entries,
    read_entry,
    write_entry,
)
from detune.bench.leaderboard.measuring import add, differences, entry_of, verify
from detune.bench.leaderboard.page import LOSS_BOUND, build_page, ranked, write_page

__all__ = [
    "ATTACK_SETS",
    "LATEST",
    "LOSS_BOUND",
    "AttackSet",
    "Attacked",
    "Entry",
    "Making",
    "Utility",
    "add",
    "build_page",
    "differences",
    "entry_of",
    "file_name",
    "ranked",
    "read_entries",
    "read_entry",
    "verify",
    "write_entry",
    "write_page",
]
