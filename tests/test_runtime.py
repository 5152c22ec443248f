"""What training runs leave behind: nothing."""

import random

import numpy as np
import pytest
import torch

from detune._runtime import global_seed, needs_extra, quiet, use_threads
from detune.errors import DetuneError


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_seeded_puts_every_global_generator_back():
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = draws()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    with global_seed(5):
        first = float(torch.rand(()))
        random.seed(9)  # as trainers do
        np.random.seed(9)
    assert draws() == expected
    with global_seed(5):
        assert float(torch.rand(())) == first


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with use_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_a_missing_package_is_named_with_its_extra():
    message = r"detune_nowhere is not installed; pip install 'detune\[bench\]'"
    with pytest.raises(DetuneError, match=message), needs_extra("bench"):
        import detune_nowhere  # noqa: F401


def test_quiet_silences_and_puts_back():
    from diffusers.utils import logging as diffusers
    from transformers.utils import logging as transformers

    before = [(chatter.get_verbosity(), chatter.is_progress_bar_enabled()) for chatter in (transformers, diffusers)]
    with quiet("diffusers"):
        assert not transformers.is_progress_bar_enabled()
        assert not diffusers.is_progress_bar_enabled()
        assert diffusers.get_verbosity() == diffusers.ERROR
    after = [(chatter.get_verbosity(), chatter.is_progress_bar_enabled()) for chatter in (transformers, diffusers)]
    assert after == before
