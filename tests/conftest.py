"""Every test runs on one thread: matrices this small gain nothing from two, and threads that queue up lose a lot."""

import os
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.command import Ran, run_command

torch.set_num_threads(1)
# For commands that tests start.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "COLUMNS": "160"}

settings.register_profile(
    "offline",
    deadline=None,
    derandomize=True,
    max_examples=25,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("offline")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run `detune` in this process."""
    return partial(run_command, monkeypatch, capsys)
