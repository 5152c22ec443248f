"""Recoveries that know a defence, and undo it first. `ATTACKS` names them."""

from detune.attacks.align import Align
from detune.attacks.base import Attack
from detune.attacks.cells import Cells
from detune.attacks.complete import Complete
from detune.attacks.known_dither import KnownDither
from detune.attacks.measured_noise import Denoise
from detune.attacks.prior import Prior
from detune.attacks.recover import Average, Bits, Recover
from detune.attacks.snap import Snap
from detune.attacks.whiten import Whiten

ATTACKS: dict[str, type[Attack]] = {
    attack.name: attack
    for attack in (Average, Recover, Bits, Denoise, Cells, KnownDither, Whiten, Snap, Align, Complete, Prior)
}

__all__ = [
    "ATTACKS",
    "Align",
    "Attack",
    "Average",
    "Bits",
    "Cells",
    "Complete",
    "Denoise",
    "KnownDither",
    "Prior",
    "Recover",
    "Snap",
    "Whiten",
]
