"""Frozen sets of attacks: a set's name stands for these attacks with these settings, in this version of detune.

A better attack, or other settings, make a new set; entries of an old one stay as they are.
"""

from dataclasses import dataclass

__all__ = ["ATTACK_SETS", "LATEST", "AttackSet"]


@dataclass(frozen=True)
class AttackSet:
    """Attacks that a defence meets, all of them.

    Attributes:
        detune: The version that brought the set.
        attacks: Their settings, by their names in `detune.attacks.ATTACKS`.
    """

    detune: str
    attacks: dict[str, str]


ATTACK_SETS = {
    "detune-attacks-v1": AttackSet(
        "0.1.0",
        {
            "average": "Average()",
            "recover": "Recover()",
            "lattice": "Bits()",
            "denoise": "Denoise()",
            "whiten": "Whiten(rounds=2)",
            "snap": "Snap()",
            "align": "Align()",
            "prior": "Prior()",
        },
    ),
}

LATEST = "detune-attacks-v1"
