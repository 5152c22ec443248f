import pytest
import torch

from detune.audit import trial as trial_module
from detune.audit.naming import Position
from detune.audit.trial import Trial, is_given_away
from detune.certificate.verdict import Verdict
from detune.compatibility.model_set import Held
from detune.methods import Auto

PLACE = Position("layer.0", 0, "query")


@pytest.mark.parametrize(
    ("verdict", "error", "change", "noise", "given_away"),
    [
        # Without the base the certificate is believed.
        (Verdict.EXACT, None, 1.0, 1e-8, True),
        (Verdict.FLOOR, None, 1.0, 1e-8, True),
        (Verdict.SHARED, None, 1.0, 1e-8, True),
        (Verdict.APPROXIMATE, None, 1.0, 1e-8, False),
        (Verdict.AVERAGED, None, 1.0, 1e-8, False),
        (Verdict.NOT_DETERMINED, None, None, 1e-8, False),
        # With it the error counts, whatever the certificate says.
        (Verdict.FLOOR, 0.02, 1.0, 1e-8, False),
        (Verdict.APPROXIMATE, 0.01, 1.0, 1e-8, True),
        (Verdict.NOT_DETERMINED, 0.0, 0.0, 1e-8, True),
        # In coarse storage the floor itself is a good part of the change.
        (Verdict.FLOOR, 0.02, 0.1, 0.011, True),
        (Verdict.FLOOR, 0.03, 0.1, 0.011, False),
    ],
)
def test_what_counts_as_given_away(verdict, error, change, noise, given_away):
    assert is_given_away(verdict, error, change, noise) is given_away


def test_integers_are_taken_as_the_first_release_has_them():
    steps = Held.of([torch.tensor(3), torch.tensor(4), torch.tensor(5)])
    tried = Trial(Auto()).run("steps", PLACE, steps, torch.tensor(3))
    assert not tried.entry.is_matrix
    assert tried.entry.outcomes[-1].verdict == "not determined"
    assert int(tried.weight) == 3


def test_a_release_that_stores_in_another_dtype_is_no_copy():
    W = torch.eye(80)
    tried = Trial(Auto()).run("layer.0.query", PLACE, Held.of([W, W.bfloat16(), W.clone()]), None)
    assert tried.entry.outcomes[1].verdict != "shared"
    assert tried.entry.dtype == "float32, bfloat16"


def test_what_fewer_releases_give_away_stays_given_away(monkeypatch):
    """A certificate may doubt a later answer: nobody has to use all releases."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(96, 80, generator=generator)
    tensors = [W + torch.randn(96, 2, generator=generator) @ torch.randn(2, 80, generator=generator) for _ in range(4)]
    real = trial_module.solve_tensor

    def doubtful(name, held, *options):
        found = real(name, held, *options)
        return found.but(verdict=Verdict.APPROXIMATE) if len(held.tensors) == 4 else found

    monkeypatch.setattr(trial_module, "solve_tensor", doubtful)
    outcomes = Trial(Auto()).run("layer.0.query", PLACE, Held.of(tensors), None).entry.outcomes
    assert [outcome.verdict for outcome in outcomes[2:]] == ["to the storage floor", "approximate"]
    assert [outcome.given_away for outcome in outcomes] == [False, False, True, True]
