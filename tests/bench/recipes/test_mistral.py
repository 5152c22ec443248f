"""The two subsets of a small Mistral, in their quick form: narrow layers, trained for a few steps."""

import csv
import gc
import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from detune.bench.recipes import mistral_base
from detune.bench.recipes.instructions import (
    PREFERENCES,
    SUBJECTS,
    corpus,
    examples,
    pairs,
    prompts,
)
from detune.bench.recipes.mistral import MistralMiniDpo, MistralMiniSft
from detune.checkpoints import open_checkpoint
from detune.errors import InputError

SFT, DPO = RECIPES = MistralMiniSft.quick(), MistralMiniDpo.quick()
BOTH = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)


@pytest.fixture(scope="module", autouse=True)
def in_haste():
    """One thread, as in all tests. And every trainer collects garbage at its end: spare it torch and transformers."""
    import trl  # noqa: F401

    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mistral_base, "THREADS", 1)
        yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("mistral")


@pytest.fixture(scope="module")
def bases(folder):
    found = {}
    for recipe in RECIPES:
        found[recipe.name] = folder / recipe.name / "base"
        recipe.make_base(found[recipe.name])
    return found


@pytest.fixture(scope="module")
def train(bases, folder):
    """Train one adapter; give its folder."""
    count = iter(range(1000))

    def run(recipe, task, *, rank=None, seed=0):
        out = folder / recipe.name / f"{next(count)}-{task}"
        recipe.train_adapter(bases[recipe.name], task, out, rank=rank or recipe.rank, seed=seed)
        return out

    return run


@pytest.fixture(scope="module")
def adapters(train):
    """All fifteen of each recipe, trained from seed 0."""
    return {recipe.name: {task: train(recipe, task) for task in recipe.tasks} for recipe in RECIPES}


def factors(adapter: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The A and B of each module, by the module's name in the base."""
    stored = load_file(adapter / "adapter_model.safetensors")
    names = [name.removesuffix(".lora_A.weight") for name in stored if name.endswith(".lora_A.weight")]
    assert len(stored) == 2 * len(names)
    return {
        name.removeprefix("base_model.model."): (stored[f"{name}.lora_A.weight"], stored[f"{name}.lora_B.weight"])
        for name in names
    }


def losses_of(folder: Path) -> list[float]:
    return json.loads((folder / "losses.json").read_text())


def shapes(recipe) -> dict[str, tuple[int, int]]:
    """(out, in) of the modules that are fine-tuned."""
    base = recipe.pretraining
    queries, values = base.heads * base.head_dim, base.kv_heads * base.head_dim
    each = {
        "q_proj": (queries, base.hidden),
        "k_proj": (values, base.hidden),
        "v_proj": (values, base.hidden),
        "o_proj": (base.hidden, queries),
    }
    return {f"model.layers.{i}.self_attn.{name}": shape for i in range(base.layers) for name, shape in each.items()}


@BOTH
class TestRecipe:
    def test_has_fifteen_tasks_named_plainly(self, recipe):
        assert len(set(recipe.tasks)) == 15
        assert all(re.fullmatch(r"[a-z0-9-]+", task) for task in recipe.tasks)

    def test_full_form_has_the_published_rank_and_can_be_recovered(self, recipe):
        full = type(recipe)()
        assert (full.rank, full.alpha) == (64, 16)
        for form in (full, recipe):
            for shape in shapes(form).values():
                assert 2 * form.rank < min(shape)
                assert 3 * form.rank <= max(shape)

    def test_an_unknown_task_is_named_with_the_nearest(self, recipe, tmp_path):
        wrong = recipe.tasks[0] + "x"
        with pytest.raises(InputError, match=rf"no task '{wrong}'; expected one of .*; did you mean '{wrong[:-1]}'"):
            recipe.train_adapter(tmp_path, wrong, tmp_path / "out", rank=recipe.rank, seed=0)


@BOTH
class TestBase:
    def test_loads_as_people_load_it_and_writes_text(self, recipe, bases):
        model = AutoModelForCausalLM.from_pretrained(bases[recipe.name])
        tokenizer = AutoTokenizer.from_pretrained(bases[recipe.name])
        tokens = tokenizer("Return the name of the file.", return_tensors="pt")
        written = model.generate(**tokens, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        assert written.shape[1] == tokens["input_ids"].shape[1] + 8
        assert tokenizer.decode(written[0], skip_special_tokens=True).startswith("Return the name of the file.")

    def test_tokenizer_keeps_every_character(self, recipe, bases):
        tokenizer = AutoTokenizer.from_pretrained(bases[recipe.name])
        text = "  Größe: 3 µm →\n\tif x == 1: pass"
        tokens = tokenizer(text)["input_ids"]
        assert tokens[0] == tokenizer.bos_token_id
        assert tokenizer.decode(tokens, skip_special_tokens=True) == text
        assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.vocab_size}) == 4

    def test_stores_the_names_of_mistral_in_float32(self, recipe, bases):
        stored = load_file(bases[recipe.name] / "model.safetensors")
        for name, shape in shapes(recipe).items():
            assert stored[f"{name}.weight"].shape == shape
        assert "lm_head.weight" in stored
        assert {tensor.dtype for tensor in stored.values()} == {torch.float32}

    def test_learns(self, recipe, bases):
        losses = losses_of(bases[recipe.name])
        steps = recipe.pretraining.steps if recipe is SFT else recipe.tuning_steps
        assert len(losses) == steps
        assert sum(losses[-2:]) < sum(losses[:2])

    def test_is_the_same_each_time(self, recipe, bases, tmp_path):
        recipe.make_base(tmp_path / "again")
        for name in ("model.safetensors", "tokenizer.json", "config.json", "losses.json"):
            assert (tmp_path / "again" / name).read_bytes() == (bases[recipe.name] / name).read_bytes(), name


def test_the_base_of_one_is_the_other_s_after_fine_tuning_in_full(bases):
    sft, dpo = (load_file(bases[recipe.name] / "model.safetensors") for recipe in RECIPES)
    assert sft.keys() == dpo.keys()
    for name, tensor in sft.items():
        assert not torch.equal(tensor, dpo[name]), name
        assert F.cosine_similarity(tensor.flatten(), dpo[name].flatten(), dim=0) > 0.9


@BOTH
class TestAdapters:
    def test_have_the_rank_and_shapes_of_the_recipe(self, recipe, adapters):
        for task, adapter in adapters[recipe.name].items():
            found = {name: (B.shape[0], A.shape[1]) for name, (A, B) in factors(adapter).items()}
            assert found == shapes(recipe), task
            for A, B in factors(adapter).values():
                assert A.shape[0] == B.shape[1] == recipe.rank
                assert A.dtype == B.dtype == torch.float32

    def test_change_every_module_at_full_rank(self, recipe, adapters):
        for task, adapter in adapters[recipe.name].items():
            for name, (A, B) in factors(adapter).items():
                values = torch.linalg.svdvals(B.double() @ A.double())[: recipe.rank]
                assert values[-1] > 1e-4 * values[0], (task, name)

    def test_no_two_are_alike(self, recipe, adapters):
        trained = [factors(adapter) for adapter in adapters[recipe.name].values()]
        for i, one in enumerate(trained):
            for other in trained[:i]:
                assert not any(torch.equal(B, other[name][1]) for name, (_, B) in one.items())

    def test_start_from_one_A_if_of_one_seed(self, recipe, adapters, train):
        first, *others = (factors(adapter) for adapter in adapters[recipe.name].values())
        stranger = factors(train(recipe, recipe.tasks[0], seed=1))
        for name, (A, _) in first.items():
            assert all(F.cosine_similarity(A, other[name][0]).min() > 0.97 for other in others)
            assert F.cosine_similarity(A, stranger[name][0]).max() < 0.6

    def test_of_one_seed_and_task_are_the_same_to_the_bit(self, recipe, adapters, train):
        task = recipe.tasks[-1]
        torch.rand(3)  # the state of the global generator must not matter
        again = train(recipe, task)
        for path in adapters[recipe.name][task].iterdir():
            assert path.read_bytes() == (again / path.name).read_bytes(), path.name

    def test_name_no_place_on_this_machine(self, recipe, adapters, folder):
        for adapter in adapters[recipe.name].values():
            assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == recipe.name
            assert {path.name for path in adapter.iterdir()} == {
                "adapter_config.json",
                "adapter_model.safetensors",
                "losses.json",
            }

    def test_loss_falls_on_a_fixed_batch(self, recipe, train):
        longer = replace(recipe, examples=4, batch=4, steps=10, lr=5e-3)
        losses = losses_of(train(longer, "capitals"))
        assert len(losses) == 10
        assert losses[-1] < losses[0]
        assert sum(losses[-3:]) < sum(losses[:3])

    def test_another_rank_keeps_the_scale(self, recipe, train, bases):
        adapter = train(replace(recipe, steps=1), recipe.tasks[0], rank=3)
        config = json.loads((adapter / "adapter_config.json").read_text())
        assert config["r"] == 3
        assert config["lora_alpha"] / config["r"] == recipe.alpha / recipe.rank
        assert {A.shape[0] for A, _ in factors(adapter).values()} == {3}

    def test_merges_as_detune_reads_it(self, recipe, adapters, bases):
        base, adapter = bases[recipe.name], adapters[recipe.name][recipe.tasks[0]]
        merged = open_checkpoint(f"{base}+{adapter}")
        stored = load_file(base / "model.safetensors")
        for name, (A, B) in factors(adapter).items():
            weight = stored[f"{name}.weight"]
            assert torch.allclose(merged.read(f"{name}.weight") - weight, recipe.alpha / recipe.rank * B @ A, atol=1e-6)

    def test_prompts_are_one_column(self, recipe, tmp_path):
        recipe.write_inputs(tmp_path)
        with (tmp_path / "prompts.csv").open(encoding="utf-8", newline="") as file:
            assert [row["prompt"] for row in csv.DictReader(file)] == prompts()

    def test_training_is_silent(self, recipe, train, capfd):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(replace(recipe, steps=1), recipe.tasks[0])
        assert capfd.readouterr() == ("", "")


class TestTexts:
    def test_prompts_are_held_out(self):
        asked = prompts()
        assert len(set(asked)) == 32
        trained = corpus()
        trained += [row.prompt + row.completion for task in SUBJECTS for row in examples(task, 10_000)]
        trained += [row.prompt + row.chosen + row.rejected for task in PREFERENCES for row in pairs(task, 10_000)]
        everything = "\n\n".join(trained)
        for prompt in asked:
            question, _, beginning = prompt.strip().rpartition("\n")
            assert len(beginning.split()) == 12
            assert beginning not in everything
            assert not question or f"{question}\n" not in everything

    @pytest.mark.parametrize("task", SUBJECTS)
    def test_instructions_end_their_line_and_have_an_answer(self, task):
        rows = examples(task, 100)
        assert len(rows) == 100
        assert len({row.prompt for row in rows}) > 90  # some begin alike
        assert all(row.prompt.endswith("\n") and row.completion.strip() for row in rows)

    @pytest.mark.parametrize("task", PREFERENCES)
    def test_one_answer_is_preferred_to_another(self, task):
        rows = pairs(task, 100)
        assert 80 < len(rows) <= 100
        assert all(row.prompt.endswith("\n") and row.chosen.strip() and row.rejected.strip() for row in rows)
        assert all(row.chosen != row.rejected for row in rows)

    def test_tasks_are_what_they_are_called(self):
        assert all(row.completion.isupper() for row in examples("capitals", 20))
        assert all(row.chosen.islower() and row.rejected.isupper() for row in pairs("lower-case", 20))
        assert all(len(row.chosen) < len(row.rejected) for row in pairs("short", 20))
        assert all(row.chosen.count(". ") >= 3 for row in pairs("short-sentences", 20))
        assert all(sorted(row.chosen.split()) == sorted(row.rejected.split()) for row in pairs("in-order", 20))
