"""What can be done to fine-tunes before they are released, so that they do not give their base away."""

from detune.defences.base import Change, Defence
from detune.defences.frozen_a import FrozenA, freeze_a

__all__ = ["Change", "Defence", "FrozenA", "freeze_a"]
