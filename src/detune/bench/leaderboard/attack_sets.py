"""Frozen sets of attacks: a set's name stands for these attacks with these settings, in this version of detune.

A better attack, or other settings, make a new set; entries of an old one stay as they are.
"""

from dataclasses import dataclass

__all__ = ["ATTACK_SETS", "LATEST", "AttackSet"]


@dataclass(frozen=True)
class AttackSet:
    """A frozen set of attacks that defences are tried with.

    Attributes:
        detune: The version that brought the set.
        task: What is defended.
        attacks: Their settings, by their names in `detune.attacks.ATTACKS`. Which of them a defence meets, its row in
            `detune.bench.defences` says: those that know no defence, and those that know one like it.
    """

    detune: str
    task: str
    attacks: dict[str, str]


_TASK = "all-MiniLM-L6-v2, LoRAs of rank 16 on query and value from one seed, merged in float32"
_V1 = {
    "average": "Average()",
    "recover": "Recover()",
    "lattice": "Bits()",
    "denoise": "Denoise()",
    "whiten": "Whiten(rounds=3)",
    "snap": "Snap()",
    "align": "Align()",
    "prior": "Prior()",
}

_V2 = _V1 | {"cells": "Cells(sweeps=4)"}

ATTACK_SETS = {
    "detune-attacks-v1": AttackSet("0.1.0", _TASK, _V1),
    "detune-attacks-v2": AttackSet("0.1.0", _TASK, _V2),
    "detune-attacks-v3": AttackSet(
        "0.1.0", _TASK, _V2 | {"known-dither": "KnownDither(sweeps=4)", "complete": "Complete()"}
    ),
}

LATEST = "detune-attacks-v3"
