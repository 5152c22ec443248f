from dataclasses import replace

import pytest
import torch

from detune.audit import trial as trial_module
from detune.audit.naming import Place
from detune.audit.trial import Trial, is_given_away
from detune.methods import Auto
from detune.recovery.report import Status

PLACE = Place("layer.0", 0, "query")


@pytest.mark.parametrize(
    ("status", "error", "change", "noise", "given_away"),
    [
        # Without the base the certificate is believed.
        (Status.EXACT, None, 1.0, 1e-8, True),
        (Status.FLOOR, None, 1.0, 1e-8, True),
        (Status.SHARED, None, 1.0, 1e-8, True),
        (Status.APPROXIMATE, None, 1.0, 1e-8, False),
        (Status.AVERAGED, None, 1.0, 1e-8, False),
        (Status.NOT_DETERMINED, None, None, 1e-8, False),
        # With it the error counts, whatever the certificate says.
        (Status.FLOOR, 0.02, 1.0, 1e-8, False),
        (Status.APPROXIMATE, 0.01, 1.0, 1e-8, True),
        (Status.NOT_DETERMINED, 0.0, 0.0, 1e-8, True),
        # In coarse storage the floor itself is a good part of the change.
        (Status.FLOOR, 0.02, 0.1, 0.011, True),
        (Status.FLOOR, 0.03, 0.1, 0.011, False),
    ],
)
def test_what_counts_as_given_away(status, error, change, noise, given_away):
    assert is_given_away(status, error, change, noise) is given_away


def test_integers_are_taken_as_the_first_release_has_them():
    tried = Trial(Auto()).run("steps", PLACE, [torch.tensor(3), torch.tensor(4), torch.tensor(5)], torch.tensor(3))
    assert not tried.entry.is_matrix
    assert tried.entry.outcomes[-1].verdict == "not determined"
    assert int(tried.weight) == 3


def test_a_release_that_stores_in_another_dtype_is_no_copy():
    W = torch.eye(80)
    tried = Trial(Auto()).run("layer.0.query", PLACE, [W, W.bfloat16(), W.clone()], None)
    assert tried.entry.outcomes[1].verdict != "shared"
    assert tried.entry.dtype == "float32, bfloat16"


def test_what_fewer_releases_give_away_stays_given_away(monkeypatch):
    """A certificate may doubt a later answer: nobody has to use all releases."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(96, 80, generator=generator)
    tensors = [W + torch.randn(96, 2, generator=generator) @ torch.randn(2, 80, generator=generator) for _ in range(4)]
    real = trial_module.solve_tensor

    def doubtful(tensors, *options):
        answer, weight = real(tensors, *options)
        return (replace(answer, status=Status.APPROXIMATE) if len(tensors) == 4 else answer), weight

    monkeypatch.setattr(trial_module, "solve_tensor", doubtful)
    outcomes = Trial(Auto()).run("layer.0.query", PLACE, tensors, None).entry.outcomes
    assert [outcome.verdict for outcome in outcomes[2:]] == ["to the storage floor", "approximate"]
    assert [outcome.given_away for outcome in outcomes] == [False, False, True, True]
