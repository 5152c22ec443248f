"""Generators for sketches, probes and simulated noise: the same numbers on every run, unlike anybody else's."""

import torch

# Any number does. Seed 0 is also what a user's test data are drawn with, and noise simulated from the very bits that a
# weight came from is not independent of it: largest where the weight is.
KEY = 0x5DEECE66D


def seeded(seed: int, device: torch.device | None = None) -> torch.Generator:
    """A generator whose stream is not that of `torch.manual_seed(seed)`.

    Args:
        seed: Any small integer.
        device: Where it draws; None is the CPU.
    """
    return torch.Generator(device=device or "cpu").manual_seed(seed ^ KEY)
