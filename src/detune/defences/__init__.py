"""Defences: changes of fine-tunes before they are released, so that they do not give their base away.

`DEFENCES` names what is done to a merged model. One frozen A for all releases (`FrozenA`) comes before the training,
and releasing fewer than three models is no transform at all.
"""

from detune.defences.base import Change, Defence
from detune.defences.fp8 import Fp8
from detune.defences.frozen_a import FrozenA, freeze_a
from detune.defences.invertible import Invertible
from detune.defences.lorenc import LoREnc
from detune.defences.noise import Dither, Noise
from detune.defences.permutation import Permutation
from detune.defences.precision import Bf16, Fp16
from detune.defences.quantised import Int8, Nf4
from detune.defences.quiet_noise import Padding, QuietNoise
from detune.defences.rearrangement import Rearrangement
from detune.defences.release import Defended, Preservation, defend
from detune.defences.rescaling import Rescaling
from detune.defences.rotation import Rotation

DEFENCES: dict[str, type[Defence]] = {
    defence.name: defence
    for defence in (
        *(Bf16, Fp16, Int8, Nf4, Fp8),
        *(Noise, QuietNoise, Padding, Dither),
        *(Permutation, Rotation, Rescaling, Rearrangement, Invertible),
        LoREnc,
    )
}

__all__ = [
    "DEFENCES",
    "Bf16",
    "Change",
    "Defence",
    "Defended",
    "Dither",
    "Fp8",
    "Fp16",
    "FrozenA",
    "Int8",
    "Invertible",
    "LoREnc",
    "Nf4",
    "Noise",
    "Padding",
    "Permutation",
    "Preservation",
    "QuietNoise",
    "Rearrangement",
    "Rescaling",
    "Rotation",
    "defend",
    "freeze_a",
]
