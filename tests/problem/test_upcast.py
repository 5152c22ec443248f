"""Half-precision merges in finer files are told from the base itself."""

import pytest
import torch

from detune.certificate.certify import certify
from detune.certificate.verdict import Verdict
from detune.methods import Auto
from detune.problem import Stack
from detune.problem.solving import solve
from detune.problem.upcast import as_merged
from tests.cases import normal, seeded

SHAPE = (96, 128)


def merges(dtype, seed=0):
    generator = seeded(seed)
    W = (0.05 * normal(generator, *SHAPE)).to(dtype).float()
    return W, [(W + 3e-4 * (normal(generator, SHAPE[0], 4) @ normal(generator, 4, SHAPE[1]))).float() for _ in range(3)]


@pytest.mark.parametrize(
    ("half", "stored"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.bfloat16, torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("places", [(0,), (2,), (0, 1)], ids=str)
def test_a_merge_in_half_precision_is_seen_in_a_finer_file(half, stored, places):
    _, models = merges(half)
    saved = [(W_i.to(half) if i in places else W_i).to(stored) for i, W_i in enumerate(models)]
    found = as_merged(Stack.of(saved))
    assert [W_i.dtype for W_i in found.matrices] == [half if i in places else stored for i in range(3)]
    assert all(torch.equal(after.to(stored), before) for after, before in zip(found.matrices, saved, strict=True))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_the_base_itself_stays_as_it_is_stored(half):
    W, models = merges(half)
    stack = Stack.of([models[0], W, models[1]])
    assert as_merged(stack) is stack
    found = solve(Auto(), stack)
    assert torch.equal(found.weight.float(), W)
    assert certify(stack, found).verdict is Verdict.EXACT


def test_such_a_merge_is_not_taken_for_the_base():
    W, models = merges(torch.bfloat16)
    stack = Stack.of([models[0].bfloat16().float(), *models[1:]])
    found = solve(Auto(), stack)
    assert not found.left_alone
    assert int((found.weight.float() != W).sum()) < 5
    assert certify(stack, found).verdict is not Verdict.EXACT


@pytest.mark.parametrize("told", [(), (1e-4, 1e-4, 1e-4)], ids=["one rounded alike", "told noise"])
def test_other_models_stay_as_they_are(told):
    _, models = merges(torch.bfloat16)
    stack = Stack.of(models if told else [W_i.bfloat16().float() for W_i in models], noise=told)
    assert as_merged(stack) is stack
