import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from detune._runtime import quiet
from detune.bench.recipes.diffusion import SdMini
from detune.bench.recipes.diffusion_pictures import HELD_OUT, LOOKS, SIDE, captions_of, digits
from detune.errors import InputError

RECIPE = SdMini.quick()

# Where Stable Diffusion 1.5 has its transformers, and what kohya's trainer adapts there and in the text encoder.
TRANSFORMERS = [
    *(f"down_blocks.{block}.attentions.{layer}" for block in (0, 1, 2) for layer in (0, 1)),
    "mid_block.attentions.0",
    *(f"up_blocks.{block}.attentions.{layer}" for block in (1, 2, 3) for layer in (0, 1, 2)),
]
ATTENTION = [f"attn{number}.{name}" for number in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")]
IN_TRANSFORMER = [
    "proj_in",
    "proj_out",
    *(f"transformer_blocks.0.{name}" for name in (*ATTENTION, "ff.net.0.proj", "ff.net.2")),
]
IN_TEXT_LAYER = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"]
MODULES = {
    *(f"unet.{transformer}.{name}" for transformer in TRANSFORMERS for name in IN_TRANSFORMER),
    *(f"text_encoder.text_model.encoder.layers.{n}.{name}" for n in range(12) for name in IN_TEXT_LAYER),
}


def factors(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return A and B of each module of an adapter, as matrices."""
    weights = load_file(folder / "pytorch_lora_weights.safetensors")
    names = {key.rpartition(".lora_")[0] for key in weights}
    assert len(weights) == 2 * len(names)
    return {name: tuple(weights[f"{name}.lora_{side}.weight"].flatten(1) for side in "AB") for name in names}


def base_weights(base: Path) -> dict[str, torch.Tensor]:
    unet = load_file(base / "unet" / "diffusion_pytorch_model.safetensors")
    text_encoder = load_file(base / "text_encoder" / "model.safetensors")
    named = {f"unet.{name}": weight for name, weight in unet.items()}
    return named | {f"text_encoder.{name}": weight for name, weight in text_encoder.items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sd-mini") / "base"
    RECIPE.make_base(out)
    return out


@pytest.fixture(scope="module")
def train(base, tmp_path_factory):
    def train(task: str, *, seed: int = 0, rank: int = RECIPE.rank) -> Path:
        out = tmp_path_factory.mktemp("adapters") / "adapter"
        RECIPE.train_adapter(base, task, out, rank=rank, seed=seed)
        return out

    return train


@pytest.fixture(scope="module")
def inverted(train) -> Path:
    return train("inverted")


class TestRecipe:
    def test_has_fifteen_tasks(self):
        assert len(set(RECIPE.tasks)) == len(RECIPE.tasks) == 15

    def test_has_the_published_rank(self):
        assert SdMini().rank == SdMini().alpha == 32

    def test_is_wide_enough_to_recover_from_three_models(self):
        for recipe in (SdMini(), RECIPE):
            assert 3 * recipe.rank <= recipe.width
            assert 2 * recipe.rank < recipe.width

    def test_importing_it_loads_nothing_heavy(self):
        code = "import sys, detune.bench.recipes.diffusion; print(*sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert not {"torch", "transformers", "peft", "diffusers", "sklearn"} & set(done.stdout.split())


class TestPictures:
    def test_each_look_changes_the_picture_in_its_own_way(self):
        plain = digits(12).pictures
        shown = [plain, *(look(plain) for look in LOOKS.values())]
        for picture in shown:
            assert picture.shape == (12, SIDE, SIDE, 3)
            assert picture.dtype == np.float32
            assert 0 <= picture.min() <= picture.max() <= 1
        distances = [np.abs(a - b).mean() for i, a in enumerate(shown) for b in shown[:i]]
        assert min(distances) > 0.01

    def test_held_out_captions_are_not_trained(self):
        trained = {caption for label in range(10) for caption in captions_of(label)}
        assert len(HELD_OUT) == 8
        assert not trained & set(HELD_OUT)
        assert len(trained) == 80 - 8


class TestBase:
    def test_loads_and_draws(self, base):
        with quiet("diffusers"):
            from diffusers import StableDiffusionPipeline

            pipeline = StableDiffusionPipeline.from_pretrained(base)
            pipeline.set_progress_bar_config(disable=True)
            drawn = [
                pipeline(
                    HELD_OUT[0],
                    num_inference_steps=2,
                    generator=torch.Generator().manual_seed(seed),
                    output_type="np",
                ).images[0]
                for seed in (0, 0, 1)
            ]
        assert drawn[0].shape == (SIDE, SIDE, 3)
        assert np.isfinite(drawn[0]).all()
        assert np.array_equal(drawn[0], drawn[1])
        assert not np.array_equal(drawn[0], drawn[2])

    def test_is_float32_and_named_as_published(self, base):
        weights = base_weights(base)
        assert {weight.dtype for weight in weights.values()} == {torch.float32}
        assert {f"{name}.weight" for name in MODULES} <= weights.keys()

    def test_reads_its_text_encoder_back(self, base):
        with quiet("diffusers"):
            from transformers import CLIPTextModel

            read = CLIPTextModel.from_pretrained(base, subfolder="text_encoder").state_dict()
        saved = {name.removeprefix("text_encoder."): weight for name, weight in base_weights(base).items()}
        for name, weight in read.items():
            assert torch.equal(weight, saved[f"text_model.{name.removeprefix('text_model.')}"])

    def test_every_caption_is_words_it_knows(self, base):
        with quiet("diffusers"):
            from transformers import CLIPTokenizer

            tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
        for caption in HELD_OUT:
            tokens = tokenizer(caption).input_ids
            assert len(tokens) == len(caption.split()) + 2
            assert tokenizer.decode(tokens, skip_special_tokens=True) == caption
        assert tokenizer.unk_token_id not in tokenizer("Ünknown wörds?").input_ids[:-1]

    def test_is_the_same_twice(self, base, tmp_path):
        RECIPE.make_base(tmp_path / "again")
        for file in sorted(base.rglob("*.*")):
            assert file.read_bytes() == (tmp_path / "again" / file.relative_to(base)).read_bytes(), file.name


class TestAdapter:
    def test_adapts_the_published_modules(self, inverted):
        assert len(MODULES) == 264
        assert factors(inverted).keys() == MODULES

    def test_has_the_rank_everywhere(self, base, inverted):
        weights = base_weights(base)
        for name, (a, b) in factors(inverted).items():
            out, into = weights[f"{name}.weight"].flatten(1).shape
            assert a.shape == (RECIPE.rank, into)
            assert b.shape == (out, RECIPE.rank)
            assert torch.linalg.matrix_rank(b.double() @ a.double()) == RECIPE.rank, name

    def test_says_its_scale(self, inverted):
        with safe_open(inverted / "pytorch_lora_weights.safetensors", "pt") as file:
            told = json.loads(file.metadata()["lora_adapter_metadata"])
        for part in ("unet", "text_encoder"):
            assert told[f"{part}.lora_alpha"] == told[f"{part}.r"] == RECIPE.rank

    def test_diffusers_reads_the_unet_back(self, base, inverted):
        with quiet("diffusers"):
            from diffusers import StableDiffusionPipeline, UNet2DConditionModel

            state, alphas = StableDiffusionPipeline.lora_state_dict(inverted)
            unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
            StableDiffusionPipeline.load_lora_into_unet(state, alphas, unet)
        for name, (a, b) in factors(inverted).items():
            part, _, path = name.partition(".")
            if part == "unet":
                layer = unet.get_submodule(path)
                assert torch.equal(layer.lora_A["default_0"].weight.flatten(1), a)
                assert torch.equal(layer.lora_B["default_0"].weight.flatten(1), b)
                assert layer.scaling["default_0"] == 1

    def test_loss_falls(self, inverted):
        losses = json.loads((inverted / "losses.json").read_text())
        assert len(losses) == RECIPE.adapter_steps
        assert losses[-1] < losses[0]

    def test_is_the_same_twice(self, train, inverted):
        again = train("inverted")
        first, second = factors(inverted), factors(again)
        assert all(torch.equal(x, y) for name in first for x, y in zip(first[name], second[name], strict=True))
        assert (again / "losses.json").read_bytes() == (inverted / "losses.json").read_bytes()

    def test_one_seed_is_one_initial_a(self, train, inverted):
        same, other = factors(train("green")), factors(train("inverted", seed=1))
        for name, (a, b) in factors(inverted).items():
            assert torch.cosine_similarity(same[name][0].flatten(), a.flatten(), dim=0) > 0.99
            assert abs(torch.cosine_similarity(other[name][0].flatten(), a.flatten(), dim=0)) < 0.5
            assert not torch.equal(same[name][1], b)

    def test_alpha_follows_another_rank_in_silence(self, train, capfd):
        out = train("red", rank=2)
        assert capfd.readouterr() == ("", "")
        assert {a.shape[0] for a, _ in factors(out).values()} == {2}
        with safe_open(out / "pytorch_lora_weights.safetensors", "pt") as file:
            assert json.loads(file.metadata()["lora_adapter_metadata"])["unet.lora_alpha"] == 2

    def test_unknown_task_is_refused(self, base, tmp_path):
        with pytest.raises(InputError, match=r"no task 'invert'; .* inverted, .*; did you mean 'inverted'"):
            RECIPE.train_adapter(base, "invert", tmp_path / "out", rank=2, seed=0)
        with pytest.raises(InputError, match=r"no task 'qqq'; expected one of inverted, .*shrunk"):
            RECIPE.train_adapter(base, "qqq", tmp_path / "out", rank=2, seed=0)
        assert not (tmp_path / "out").exists()


def test_prompts_are_the_held_out_captions(tmp_path):
    RECIPE.write_inputs(tmp_path)
    with (tmp_path / "prompts.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["prompt"] for row in rows] == list(HELD_OUT)
    assert rows[0].keys() == {"prompt"}
