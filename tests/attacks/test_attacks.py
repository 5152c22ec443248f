"""Every attack on a small family: its layout, its truth, its refusals."""

import pytest
import torch

from detune.attacks import ATTACKS
from detune.attacks.prior import guessed
from detune.checkpoints import open_checkpoint
from detune.errors import InputError
from detune.methods import Mean
from detune.metrics import w_error
from detune.problem import Stack
from detune.recovery.compare import compare
from tests.cases import normal, seeded
from tests.families import add, edit, plain_family, tree

# `align` needs an architecture that it knows, `cells` and `known-dither` releases that are quantised: they have tests
# of their own.
PLAIN = sorted(set(ATTACKS) - {"align", "cells", "known-dither"})


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return plain_family(tmp_path_factory.mktemp("family"), n=4)


@pytest.mark.parametrize("name", PLAIN)
class TestEveryAttack:
    def test_writes_the_first_releases_layout_and_changes_no_release(self, family, tmp_path, name):
        before = [tree(model) for model in family.models]
        ATTACKS[name]().run(family.models, tmp_path / "out")
        assert [tree(model) for model in family.models] == before
        with open_checkpoint(tmp_path / "out") as out, open_checkpoint(family.models[0]) as first:
            assert dict(out.tensors) == dict(first.tensors)

    def test_refuses_too_few(self, family, tmp_path, name):
        attack = ATTACKS[name]()
        if attack.min_models > 1:
            with pytest.raises(InputError, match="at least"):
                attack.run(family.models[: attack.min_models - 1], tmp_path / "out")
            assert not (tmp_path / "out").exists()

    def test_names_itself_as_the_table_does(self, name):
        assert ATTACKS[name].name == name
        assert ATTACKS[name].about


@pytest.mark.parametrize("name", sorted(set(PLAIN) - {"average", "complete", "snap"}))
def test_undefended_releases_are_undone(family, tmp_path, name):
    ATTACKS[name]().run(family.models, tmp_path / "out")
    assert compare(tmp_path / "out", family.base).summary["worst_w_error"] < -13


def test_the_average_is_the_average(family, tmp_path):
    ATTACKS["average"]().run(family.models, tmp_path / "out")
    with open_checkpoint(tmp_path / "out") as out:
        models = [open_checkpoint(path).read("layer.0.weight").double() for path in family.models]
        torch.testing.assert_close(out.read("layer.0.weight"), torch.stack(models).mean(dim=0).float())


def test_releases_of_other_shapes_are_refused(tmp_path):
    family = plain_family(tmp_path)
    edit(family.models[2], lambda state: state.update({"layer.1.weight": torch.zeros(3, 3)}))
    with pytest.raises(InputError, match=r"do not fit together: tensor 'layer.1.weight'"):
        ATTACKS["denoise"]().run(family.models, tmp_path / "out")


def frozen(seed: int, W: torch.Tensor, rank: int = 4, n: int = 5) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Float32 merges of one frozen A, with its orthonormal rows."""
    generator = seeded(seed)
    A = torch.linalg.qr(normal(generator, W.shape[1], rank))[0].mT
    return [add(W.float(), 0.1 * normal(generator, W.shape[0], rank) @ A) for _ in range(n)], A


@pytest.mark.parametrize("seed", range(3))
def test_against_a_frozen_A_a_prior_gets_no_closer_than_the_mean(seed):
    W = normal(seeded(50 + seed), 96, 80)
    models, A = frozen(seed, W)
    stack = Stack.of(models)
    guess, mean = ((answer.double() - W) for answer in (guessed(stack), Mean().solve(stack).weight))
    assert float((guess @ A.mT).norm()) > 0.97 * float((mean @ A.mT).norm())
    outside = torch.eye(80, dtype=torch.float64) - A.mT @ A
    assert float((guess @ outside).square().mean()) < 1e-13


def test_were_the_columns_alike_the_prior_would_tell():
    """The regression works: on a base of low rank, what is hidden follows from the rest."""
    generator = seeded(9)
    W = normal(generator, 96, 6) @ normal(generator, 6, 80)
    models, A = frozen(0, W)
    models = [add(model, 30 * normal(generator, 96, 4) @ A) for model in models]
    stack = Stack.of(models)
    guess, mean = (w_error(answer, W) for answer in (guessed(stack), Mean().solve(stack).weight))
    assert guess < mean - 1


def test_counters_that_only_some_releases_have_are_copied(tmp_path):
    family = plain_family(tmp_path)
    edit(family.models[0], lambda state: state.update({"positions": torch.arange(5)}))
    ATTACKS["denoise"]().run(family.models, tmp_path / "out")
    with open_checkpoint(tmp_path / "out") as out:
        assert torch.equal(out.read("positions"), torch.arange(5))
