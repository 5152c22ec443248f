import json
import os

import pytest
import torch

from detune.checkpoints import open_checkpoint
from detune.errors import InputError
from detune.symmetries import Action, act, find_layers, read_layers
from detune.symmetries.base import prefixes
from tests.cases import normal, seeded
from tests.symmetries.models import KINDS, LAYERS, build


@pytest.fixture(params=KINDS)
def checkpoint(request, tmp_path):
    build(request.param).save_pretrained(tmp_path)
    return open_checkpoint(tmp_path)


def shapes(checkpoint):
    return {name: info.shape for name, info in checkpoint.tensors.items()}


def config(checkpoint):
    return json.loads((checkpoint.root / "config.json").read_text())


class TestFindLayers:
    def test_every_layer_with_names_that_exist(self, checkpoint):
        layers = read_layers(checkpoint.root, shapes(checkpoint))
        assert len(layers) == LAYERS
        for layer in layers:
            heads, neurons = layer.attention, layer.feed_forward
            modules = [heads.query, heads.key, heads.value, heads.output, neurons.up, neurons.down]
            modules += [part.norm for part in layer.norms]
            assert all(f"{module}.weight" in checkpoint.tensors for module in modules)

    def test_a_tensor_is_missing(self, checkpoint):
        rest = shapes(checkpoint)
        layer = read_layers(checkpoint.root, rest)[1]
        del rest[f"{layer.attention.value}.weight"]
        with pytest.raises(InputError, match=r"does not fit the config; it is missing, expected \d+ rows"):
            find_layers(config(checkpoint), rest)

    def test_another_config(self, checkpoint):
        wrong = config(checkpoint) | {"intermediate_size": 80}
        with pytest.raises(InputError, match=r"it has shape \[96, 64\], expected 80 rows; give a whole checkpoint"):
            find_layers(wrong, shapes(checkpoint))


def test_an_architecture_that_is_not_known():
    with pytest.raises(InputError, match="no symmetries are known of model_type 'gpt2'; known are bert, roberta, vit"):
        find_layers({"model_type": "gpt2"}, {})


def test_no_config(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*config\.json; FileNotFoundError, expected the config"):
        read_layers(tmp_path, {})


@pytest.mark.parametrize("content", ["[1]", "{", "3"])
def test_a_damaged_config(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"cannot read .*config\.json"):
        read_layers(tmp_path, {})


def test_a_config_that_is_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(InputError, match=r"config\.json is no regular file"):
        read_layers(tmp_path, {})


def test_a_config_without_numbers():
    names = {"encoder.layer.0.intermediate.dense.weight": (4, 4)}
    with pytest.raises(InputError, match="no usable 'num_attention_heads'; got None, expected a positive number"):
        find_layers({"model_type": "bert"}, names)


def test_relative_positions_are_refused():
    with pytest.raises(InputError, match="positions of kind 'relative_key'"):
        find_layers({"model_type": "bert", "position_embedding_type": "relative_key"}, {})


class TestPrefixes:
    def test_in_order_of_their_numbers(self):
        names = [f"bert.encoder.layer.{i}.x.weight" for i in (10, 2, 0)]
        assert prefixes(names, "encoder.layer", "x.weight")[1:] == ("bert.encoder.layer.2", "bert.encoder.layer.10")

    def test_none(self):
        with pytest.raises(InputError, match=r"0 lists of layers 'layers' in this checkpoint; expected one"):
            prefixes(["decoder.x.weight"], "layers", "x.weight")

    def test_two_models(self):
        names = ["a.layers.0.x.weight", "b.layers.0.x.weight"]
        with pytest.raises(InputError, match=r"2 lists of layers .* got a\.layers, b\.layers, expected one"):
            prefixes(names, "layers", "x.weight")


class TestAction:
    def test_order_blocks_and_scale_along_each_axis(self):
        generator = seeded(0)
        tensor, order = normal(generator, 6, 5), torch.tensor([2, 3, 0, 1, 5, 4])
        blocks, scale = normal(generator, 3, 2, 2), normal(generator, 6)
        expected = scale[:, None] * (torch.block_diag(*blocks) @ tensor[order])
        assert torch.allclose(Action(0, order, blocks, scale)(tensor), expected)
        assert torch.allclose(Action(1, order, blocks, scale)(tensor.mT), expected.mT)
        assert torch.allclose(Action(0, order, blocks, scale)(tensor[:, 0]), expected[:, 0])

    def test_moves_keep_dtype_and_bits(self):
        tensor = normal(seeded(1), 4, 3).bfloat16()
        order = torch.tensor([3, 1, 0, 2])
        moved = act([Action(0, order), Action(1, torch.tensor([2, 0, 1]))], tensor)
        assert moved.dtype is torch.bfloat16
        assert torch.equal(moved, tensor[order][:, [2, 0, 1]])

    @pytest.mark.parametrize(
        ("action", "is_exact", "is_identity"),
        [
            (Action(0, torch.arange(4)), True, True),
            (Action(0, torch.tensor([1, 0, 2, 3])), True, False),
            (Action(0, scale=torch.tensor([2.0, -0.5, 1.0, 4.0])), True, False),
            (Action(0, scale=torch.tensor([3.0, 1.0, 1.0, 1.0])), False, False),
            (Action(0, blocks=torch.eye(2).expand(2, 2, 2)), True, True),
            (Action(0, blocks=torch.tensor([[[0.0, 2.0], [1.0, 0.0]]]).expand(2, 2, 2)), True, False),
            (Action(0, blocks=torch.tensor([[[1.0, 2.0], [0.0, 1.0]]]).expand(2, 2, 2)), False, False),
        ],
    )
    def test_knows_what_it_does(self, action, is_exact, is_identity):
        assert (action.is_exact, action.is_identity) == (is_exact, is_identity)
