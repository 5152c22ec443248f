"""Generators of one's own."""

import torch

from detune.numerics.random import seeded


def test_the_same_seed_draws_the_same_numbers_and_another_others():
    first, again, other = (torch.randn(4, generator=seeded(seed)) for seed in (0, 0, 1))
    assert first.equal(again)
    assert not first.equal(other)


def test_a_seed_does_not_draw_what_torchs_own_does():
    ours, theirs = (torch.randn(4, generator=generator) for generator in (seeded(0), torch.Generator().manual_seed(0)))
    assert not ours.equal(theirs)
