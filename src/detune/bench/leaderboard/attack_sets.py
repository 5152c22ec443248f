"""Frozen sets of attacks: a set's name stands for these attacks with these settings, for ever.

A better attack, or other settings, make a new set; entries of an old one stay as they are.
"""

__all__ = ["ATTACK_SETS", "LATEST"]

ATTACK_SETS: dict[str, dict[str, str]] = {}

LATEST = "detune-attacks-v1"
