"""The adapter that all fine-tunes start from, and what its frozen A hides."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel

from detune._runtime import quiet
from detune.attacks.prior import guessed
from detune.defences import FrozenA, freeze_a
from detune.demo.train import train_lora
from detune.errors import InputError, OutputError
from detune.problem import Stack
from tests.defences.conftest import TEXTS


def factors(adapter):
    return load_file(adapter / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def start(bert, tmp_path_factory):
    return FrozenA(rank=4, alpha=8).start(bert, tmp_path_factory.mktemp("start") / "adapter", seed=3)


def test_rows_of_A_are_orthonormal_and_B_is_zero(start):
    found = factors(start)
    assert len(found) == 8  # A and B of query and value of two layers
    for name, factor in found.items():
        if "lora_A" in name:
            torch.testing.assert_close(factor @ factor.mT, torch.eye(4), rtol=0, atol=1e-6)
        else:
            assert not factor.any()


def test_layers_have_different_A_and_a_seed_gives_the_same(bert, start, tmp_path):
    found = factors(start)
    As = [factor for name, factor in found.items() if "lora_A" in name]
    assert float((As[0] @ As[1].mT).norm()) < 2 * 0.9
    again = factors(FrozenA(rank=4, alpha=8).start(bert, tmp_path / "again", seed=3))
    assert all(torch.equal(again[name], factor) for name, factor in found.items())


def test_training_from_it_leaves_A_alone(bert, start, tmp_path):
    trained = factors(train_lora(bert, TEXTS, tmp_path / "trained", steps=3, lr=1e-2, start=start, threads=1))
    for name, factor in factors(start).items():
        assert torch.equal(trained[name], factor) == ("lora_A" in name), name


def test_only_B_is_left_to_train(bert, start):
    with quiet():
        model = freeze_a(PeftModel.from_pretrained(AutoModel.from_pretrained(bert), start, is_trainable=True))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 4
    assert all(".lora_B." in name for name in trained)


def test_a_model_without_a_lora_is_refused(bert):
    with quiet():
        model = AutoModel.from_pretrained(bert)
    with pytest.raises(InputError, match="has no A to freeze; got BertModel, expected a PeftModel"):
        freeze_a(model)


def test_no_such_layers(bert, tmp_path):
    with pytest.raises(InputError, match=r"no adapter of .* with the layers nothing"):
        FrozenA(targets=("nothing",)).start(bert, tmp_path / "out", 0)
    assert not list(tmp_path.iterdir())


def test_a_rank_beyond_the_layer_is_refused(bert, tmp_path):
    with pytest.raises(InputError, match=r"no 4000 orthonormal rows fit .*query.* expected at least the rank; give"):
        FrozenA(rank=4000).start(bert, tmp_path / "adapter", seed=0)
    assert not (tmp_path / "adapter").exists()


def test_it_overwrites_nothing(bert, start):
    with pytest.raises(OutputError, match="exists"):
        FrozenA().start(bert, start, 0)


@pytest.mark.parametrize("n", [3, 5, 8])
def test_another_base_explains_the_releases_as_well(n):
    """The proof, in numbers: W + X A with B_i - X gives the same bits, so nothing can tell them apart."""
    generator = torch.Generator().manual_seed(n)
    draw = lambda *shape: torch.randint(-8, 8, shape, generator=generator).double()  # noqa: E731
    W, A, X = draw(20, 16), draw(3, 16), draw(20, 3)
    B = [draw(20, 3) for _ in range(n)]
    ours, theirs = ([base + B_i @ A for B_i in Bs] for base, Bs in ((W, B), (W + X @ A, [B_i - X for B_i in B])))
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert torch.equal(guessed(Stack.of(ours)), guessed(Stack.of(theirs)))
