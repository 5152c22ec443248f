"""The subset of a real sentence encoder: its base is the real one, its adapters trained for two steps."""

import json
from itertools import combinations
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from detune.bench.recipes.minilm import MiniLM
from detune.demo.train import base_model
from detune.errors import InputError

RECIPE = MiniLM.quick()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("minilm") / "base"
    RECIPE.make_base(folder)
    return folder


@pytest.fixture(scope="module")
def train(base, tmp_path_factory):
    """Train one adapter; give its folder and its factors A, B by stored name."""

    def run(task="language-1", *, rank=RECIPE.rank, seed=0, recipe=RECIPE):
        out = tmp_path_factory.mktemp("adapters") / task
        recipe.train_adapter(base, task, out, rank=rank, seed=seed)
        return out, load_file(out / "adapter_model.safetensors")

    return run


@pytest.fixture(scope="module")
def language(train):
    return train()


def test_the_base_is_a_copy_of_the_real_one(base):
    stored, real = load_file(base / "model.safetensors"), load_file(base_model() / "model.safetensors")
    assert stored.keys() == real.keys()
    assert all(torch.equal(stored[name], real[name]) for name in real)
    AutoModel.from_pretrained(base)
    assert (base / "tokenizer.json").exists()


def test_there_are_fifteen_tasks_with_texts_of_their_own():
    assert len(set(RECIPE.tasks)) == 15
    texts = {task: set(RECIPE.texts(task)) for task in RECIPE.tasks}
    assert min(map(len, texts.values())) >= 300
    for one, other in combinations(texts.values(), 2):
        assert len(one & other) <= 0.02 * min(len(one), len(other))


def test_query_and_value_of_six_layers_are_trained_at_the_rank(language):
    _, factors = language
    expected = {
        f"base_model.model.encoder.layer.{layer}.attention.self.{target}.lora_{factor}.weight": shape
        for layer in range(6)
        for target in ("query", "value")
        for factor, shape in (("A", (RECIPE.rank, 384)), ("B", (384, RECIPE.rank)))
    }
    assert {name: tuple(tensor.shape) for name, tensor in factors.items()} == expected


def test_another_rank_keeps_the_scale(train):
    out, factors = train(rank=8)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == RECIPE.alpha / RECIPE.rank
    assert {min(tensor.shape) for tensor in factors.values()} == {8}


def test_the_adapter_says_what_it_is_an_adapter_of_but_not_where_that_lay(language, base):
    out, _ = language
    assert {path.name for path in out.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "losses.json",
    }
    config = (out / "adapter_config.json").read_text()
    assert str(base.parent) not in config
    assert json.loads(config)["base_model_name_or_path"] == "minilm"


def test_adapters_of_one_seed_start_from_one_A(language, train):
    cosines = cosines_of_A(language[1], train("networking-2")[1])
    assert min(cosines) > 0.9


def test_another_seed_starts_from_another_A(language, train):
    cosines = cosines_of_A(language[1], train(seed=1)[1])
    assert max(map(abs, cosines)) < 0.2


def test_a_seed_gives_the_same_files(language, train):
    out, _ = train()
    for path in out.iterdir():
        assert path.read_bytes() == (language[0] / path.name).read_bytes(), path.name


def test_training_lowers_the_loss(train):
    class OneBatch(MiniLM):
        def texts(self, task):
            return super().texts(task)[:8]

    out, _ = train(recipe=OneBatch(steps=12, threads=1))
    losses = json.loads((out / "losses.json").read_text())
    assert len(losses) == 12
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_no_task_trains_on_the_inputs(tmp_path):
    RECIPE.write_inputs(tmp_path)
    prompts = pd.read_csv(tmp_path / "prompts.csv")["prompt"].tolist()
    assert len(set(prompts)) == 32
    assert not set(prompts) & {text for task in RECIPE.tasks for text in RECIPE.texts(task)}


def test_an_unknown_task_is_told_the_known_ones(tmp_path):
    with pytest.raises(InputError, match=r"minilm has no task 'poems-1'; expected one of language-1, language-2, "):
        RECIPE.train_adapter(tmp_path, "poems-1", tmp_path / "out", rank=4, seed=0)


def cosines_of_A(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[float]:
    return [
        float(torch.cosine_similarity(A.flatten(), other[name].flatten(), dim=0))
        for name, A in one.items()
        if "lora_A" in name
    ]
