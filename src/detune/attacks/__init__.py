"""Recoveries that know a defence, and undo it first. `ATTACKS` names them."""

from detune.attacks.align import Align
from detune.attacks.base import Attack
from detune.attacks.cells import Cells
from detune.attacks.denoise import Denoise
from detune.attacks.prior import Prior
from detune.attacks.recover import Average, Bits, Recover
from detune.attacks.snap import Snap
from detune.attacks.whiten import Whiten

ATTACKS: dict[str, type[Attack]] = {
    attack.name: attack for attack in (Average, Recover, Bits, Denoise, Cells, Whiten, Snap, Align, Prior)
}

__all__ = ["ATTACKS", "Align", "Attack", "Average", "Bits", "Cells", "Denoise", "Prior", "Recover", "Snap", "Whiten"]
