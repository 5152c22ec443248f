"""Every test runs on one thread: matrices this small gain nothing from two, and threads that queue up lose a lot."""

import os

import torch
from hypothesis import HealthCheck, settings

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
