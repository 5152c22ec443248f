"""`detune recover` by workers: the options, and one line for what cannot be."""

import os
import re

import pytest

from detune.recovery.execution.executors import dask_cluster
from tests.families import Fine, plain_family, tree


@pytest.fixture
def family(tmp_path) -> Fine:
    return plain_family(tmp_path / "models")


def test_workers_write_what_one_process_writes(command, family, tmp_path):
    for name, options in (("alone", ()), ("workers", ("--workers", 2))):
        ran = command("recover", *family.specs, "--out", tmp_path / name, "--method", "intersect", *options)
        assert ran.code == 0, ran.err
    alone, workers = (tree(tmp_path / name) for name in ("alone", "workers"))
    assert workers.keys() == alone.keys()
    assert workers["model.safetensors"] == alone["model.safetensors"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--workers", 0), "Invalid value for '--workers': 0 is not in the range x>=1"),
        (("--slurm", 0), "Invalid value for '--slurm': 0 is not in the range x>=1"),
        (("--workers", 2, "--slurm", 2), "give one of --workers, --scheduler and --slurm"),
        (("--workers", 2, "--device", "cuda"), "--workers 2 and --device cuda do not go together; .*; leave --workers"),
        (("--scheduler", "nowhere"), "no Dask scheduler at 'nowhere'; missing port number .*; start one with"),
        (("--scheduler", "nowhere", "--device", "gpu"), "no Dask scheduler at 'nowhere'"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(command, family, tmp_path, monkeypatch, options, message):
    pytest.importorskip("distributed")
    monkeypatch.setattr(dask_cluster, "CONNECT_SECONDS", 0.2)
    ran = command("recover", *family.specs, "--out", tmp_path / "out", *options)
    assert ran.code == 2
    assert re.search(message, " ".join(ran.err.split()))
    assert ran.err.count("rror: ") == 1
    assert os.listdir(tmp_path) == ["models"]


def test_help_lists_options_under_headings(command):
    ran = command("recover", "--help")
    headings = [line for line in ran.out.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == ["Options:", "More results:", "Where to compute:"]
    assert ran.out.index("Where to compute:") < ran.out.index("--scheduler ADDRESS")
