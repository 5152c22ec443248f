"""Releases in hidden bases of their own, brought together again and recovered."""

import pytest
import torch

import detune
from detune.attacks.align import Align, align
from detune.defences.base import Defence
from detune.defences.permutation import Permutation
from detune.defences.rescaling import Rescaling
from detune.defences.rotation import Rotation
from detune.errors import InputError
from tests.families import fine_tune, plain_family, same_bits, stored
from tests.symmetries.models import KINDS, build, defended

ALL: tuple[Defence, ...] = (Permutation(), Rotation(), Rescaling())


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """Fine-tunes of a tiny model of each kind, LoRAs on every linear layer; made when asked for."""
    made = {}

    def family(kind):
        if kind not in made:
            made[kind] = fine_tune(build(kind), KINDS[kind].targets, tmp_path_factory.mktemp("family"))
        return made[kind]

    return family


def released(models, folder, seeds, *defences):
    """The releases, each with its seed."""
    return [
        defended(model, folder / f"{seed}-{i}", seed, *defences)
        for i, (model, seed) in enumerate(zip(models, seeds, strict=True))
    ]


def worst(recovered, truth):
    return max(row.w_error for row in detune.compare(recovered, truth).rows if len(row.shape) == 2)


@pytest.mark.parametrize("kind", KINDS)
class TestEveryKind:
    def test_moved_numbers_are_moved_back_bit_for_bit(self, families, tmp_path, kind):
        models = families(kind).models
        defences = Permutation(), Rescaling(exact=True)
        copies = align(released(models, tmp_path, (0, 1, 2), *defences), tmp_path / "aligned")
        for copy, expected in zip(copies, released(models, tmp_path, (0, 0, 0), *defences), strict=False):
            assert copy.is_exact
            mine, theirs = stored(copy.path), stored(expected)
            assert all(same_bits(mine[name], theirs[name]) for name in theirs)

    def test_all_at_once_are_undone(self, families, tmp_path, kind):
        """Twice the rounding of weights that were turned, and the base's own: 1.5 in log10 is a factor of 6 in size."""
        family = families(kind)
        Align().run(released(family.models, tmp_path, (0, 1, 2), *ALL), tmp_path / "out")
        truth = defended(family.base, tmp_path / "truth", 0, *ALL)
        assert worst(tmp_path / "out", truth) < -14.5
        assert worst(released(family.models[:1], tmp_path, (0,), *ALL)[0], truth) > -4


def test_permuted_releases_are_recovered_like_others(families, tmp_path):
    family = families("bert")
    models = released(family.models, tmp_path, (4, 5, 6), Permutation())
    with pytest.raises(InputError, match=r"share a base|neurons or heads in another order|full rank"):
        detune.recover(models, tmp_path / "naive")
    Align().run(models, tmp_path / "out")
    detune.recover(family.models, tmp_path / "floor")
    truth = defended(family.base, tmp_path / "truth", 4, Permutation())
    assert abs(worst(tmp_path / "out", truth) - worst(tmp_path / "floor", family.base)) < 0.01
    assert not list(tmp_path.glob(".out*"))


def test_rotations_alone(families, tmp_path):
    family = families("bert")
    Align().run(released(family.models, tmp_path, (0, 1, 2), Rotation()), tmp_path / "out")
    assert worst(tmp_path / "out", defended(family.base, tmp_path / "truth", 0, Rotation())) < -15.5


def test_releases_without_a_defence_stay_as_they_are(families, tmp_path):
    models = families("vit").models
    assert [copy.path for copy in align(models, tmp_path)] == list(models)


def test_bf16(tmp_path):
    kind = KINDS["bert"]
    family = fine_tune(build("bert").to(torch.bfloat16), kind.targets, tmp_path)
    copies = align(released(family.models, tmp_path, (0, 1, 2), Permutation()), tmp_path / "aligned")
    assert all(copy.is_exact for copy in copies)


class TestBadInput:
    def test_two_releases(self, families, tmp_path):
        with pytest.raises(InputError, match="2 releases; expected at least 3; add models"):
            Align().run(families("bert").models[:2], tmp_path / "out")

    def test_an_architecture_that_is_not_known(self, tmp_path):
        with pytest.raises(InputError, match="no symmetries are known of model_type None; known are bert"):
            Align().run(plain_family(tmp_path).models, tmp_path / "out")

    def test_of_two_architectures(self, families, tmp_path):
        models = (*families("bert").models[:2], families("vit").models[0])
        with pytest.raises(InputError, match="does not fit"):
            Align().run(models, tmp_path / "out")
        assert not (tmp_path / "out").exists()
