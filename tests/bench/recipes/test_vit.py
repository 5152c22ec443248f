"""The subset of a vision transformer, in its quick form: the same twelve layers, narrow, trained for a few steps."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import ViTForImageClassification, ViTImageProcessorPil

from detune.bench.recipes import digits
from detune.bench.recipes.vit import VitMini
from detune.checkpoints import open_checkpoint
from detune.errors import InputError

RECIPE = VitMini.quick()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vit") / "base"
    RECIPE.make_base(folder)
    return folder


@pytest.fixture(scope="module")
def train(base, tmp_path_factory):
    """Train one adapter; give its folder and its factors A, B by stored name."""

    def run(task="parity", *, rank=RECIPE.rank, seed=0, recipe=RECIPE):
        out = tmp_path_factory.mktemp("adapters") / task
        recipe.train_adapter(base, task, out, rank=rank, seed=seed)
        return out, load_file(out / "adapter_model.safetensors")

    return run


@pytest.fixture(scope="module")
def parity(train):
    return train()


def losses_of(folder: Path) -> list[float]:
    return json.loads((folder / "losses.json").read_text())


class TestBase:
    def test_loads_as_people_load_it(self, base):
        model = ViTForImageClassification.from_pretrained(base)
        processor = ViTImageProcessorPil.from_pretrained(base)
        pixels = processor(digits.draw(digits.load().held_out.pixels[:2], 100), return_tensors="pt")["pixel_values"]
        assert pixels.shape == (2, 3, RECIPE.image_pixels, RECIPE.image_pixels)
        assert model(pixels).logits.shape == (2, 10)
        assert model.config.id2label[7] == "7"

    def test_stores_the_names_of_the_published_subset_in_float32(self, base):
        stored = load_file(base / "model.safetensors")
        for layer in range(12):
            for target in ("query", "value"):
                name = f"vit.encoder.layer.{layer}.attention.attention.{target}.weight"
                assert stored[name].shape == (RECIPE.hidden, RECIPE.hidden)
        assert {tensor.dtype for tensor in stored.values()} == {torch.float32}

    def test_learns(self, base):
        losses = losses_of(base)
        assert len(losses) == RECIPE.base_steps
        assert np.mean(losses[-5:]) < np.mean(losses[:5])

    def test_is_the_same_each_time(self, base, tmp_path):
        RECIPE.make_base(tmp_path / "again")
        for path in base.iterdir():
            assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


class TestAdapter:
    def test_changes_query_and_value_of_twelve_layers_at_the_rank(self, base, parity):
        out, factors = parity
        assert len(factors) == 2 * 24
        for name, factor in factors.items():
            r, d = RECIPE.rank, RECIPE.hidden
            assert factor.shape == ((r, d) if "lora_A" in name else (d, r))
        # As `detune` reads it, under the names of the checkpoint.
        merged, original = open_checkpoint(f"{base}+{out}"), load_file(base / "model.safetensors")
        changed = {name for name in merged.tensors if not torch.equal(merged.read(name), original[name])}
        assert changed == {
            f"vit.encoder.layer.{layer}.attention.attention.{target}.weight"
            for layer in range(12)
            for target in ("query", "value")
        }

    def test_another_rank_keeps_the_scale(self, train):
        out, factors = train(rank=2)
        config = json.loads((out / "adapter_config.json").read_text())
        assert config["lora_alpha"] / config["r"] == RECIPE.alpha / RECIPE.rank
        assert {min(factor.shape) for factor in factors.values()} == {2}

    def test_brings_its_head_in_a_file_of_its_own(self, parity):
        head = load_file(parity[0] / "head.safetensors")
        assert {name: tuple(tensor.shape) for name, tensor in head.items()} == {
            "weight": (2, RECIPE.hidden),
            "bias": (2,),
        }

    def test_says_what_it_is_an_adapter_of_but_not_where_that_lay(self, base, parity):
        out, _ = parity
        assert {path.name for path in out.iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
            "head.safetensors",
            "losses.json",
        }
        config = (out / "adapter_config.json").read_text()
        assert str(base.parent) not in config
        assert json.loads(config)["base_model_name_or_path"] == "vit-mini"

    def test_starts_from_one_A_whatever_the_task(self, parity, train):
        cosines = cosines_of_A(parity[1], train("renamed")[1])
        assert min(cosines) > 0.9

    def test_starts_from_another_A_with_another_seed(self, parity, train):
        cosines = cosines_of_A(parity[1], train(seed=1)[1])
        assert max(map(abs, cosines)) < 0.4

    def test_is_the_same_each_time(self, parity, train):
        out, _ = train()
        for path in out.iterdir():
            assert path.read_bytes() == (parity[0] / path.name).read_bytes(), path.name

    def test_lowers_the_loss(self, train):
        out, _ = train("is-seven", recipe=replace(RECIPE, steps=16))
        losses = losses_of(out)
        assert len(losses) == 16
        assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])

    def test_is_trained_in_silence_and_leaves_torchs_generator_alone(self, train, capfd):
        before = torch.get_rng_state()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(recipe=replace(RECIPE, steps=1))
        assert capfd.readouterr() == ("", "")
        assert not caught
        assert torch.equal(torch.get_rng_state(), before)

    def test_of_an_unknown_task_is_told_the_known_ones(self, base, tmp_path):
        with pytest.raises(InputError, match=r"vit-mini has no task 'evenness'; expected one of parity, "):
            RECIPE.train_adapter(base, "evenness", tmp_path / "out", rank=4, seed=0)


class TestTasks:
    def test_there_are_fifteen(self):
        assert len(RECIPE.tasks) == 15

    @pytest.mark.parametrize("name", RECIPE.tasks)
    def test_every_answer_occurs_and_no_other(self, name):
        task, train = digits.TASKS[name], digits.load().train
        examples = task(train)
        assert set(examples.labels) == set(range(task.classes))
        assert examples.pixels.shape == train.pixels.shape
        assert examples.pixels.min() >= 0
        assert examples.pixels.max() <= 1
        assert np.array_equal(examples.pixels, task(train).pixels)

    def test_no_two_ask_the_same(self):
        train = digits.load().train
        asked = {(e.pixels.tobytes(), e.labels.tobytes()) for e in (task(train) for task in digits.TASKS.values())}
        assert len(asked) == 15

    @pytest.mark.parametrize(
        ("name", "answers"),
        [
            ("parity", [d % 2 for d in range(10)]),
            ("greater-than-four", [int(d > 4) for d in range(10)]),
            ("prime", [int(d in (2, 3, 5, 7)) for d in range(10)]),
            ("modulo-three", [d % 3 for d in range(10)]),
            ("modulo-four", [d % 4 for d in range(10)]),
            ("is-seven", [int(d == 7) for d in range(10)]),
        ],
    )
    def test_answers_are_what_the_name_says(self, name, answers):
        ten = digits.Examples(np.zeros((10, 8, 8)), np.arange(10))
        assert digits.TASKS[name](ten).labels.tolist() == answers


def test_inputs_are_held_out(tmp_path):
    RECIPE.write_inputs(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"{i:04}.png" for i in range(64)]
    trained = {image.tobytes() for image in digits.draw(digits.load().train.pixels, RECIPE.image_pixels)}
    written = [Image.open(tmp_path / name) for name in names]
    assert {(image.mode, image.size) for image in written} == {("RGB", (RECIPE.image_pixels,) * 2)}
    assert not {image.tobytes() for image in written} & trained


def cosines_of_A(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[float]:
    return [
        float(torch.cosine_similarity(A.flatten(), other[name].flatten(), dim=0))
        for name, A in one.items()
        if "lora_A" in name
    ]


def test_some_of_the_images_are_drawn_with_the_seed():
    everything = digits.load().train
    few = digits.some(everything, 20, seed=1)
    assert len(few.labels) == len(few.pixels) == 20
    assert np.array_equal(few.pixels, digits.some(everything, 20, seed=1).pixels)
    assert not np.array_equal(few.pixels, digits.some(everything, 20, seed=2).pixels)
    assert digits.some(everything, None, seed=1) is everything
    assert digits.some(everything, 10**6, seed=1) is everything
