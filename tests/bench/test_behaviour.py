import csv
import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from detune._runtime import quiet
from detune.bench.behaviour import Differences, DrawnImages, ImageStates, TextStates, WrittenTexts, behaviour_of
from detune.errors import DetuneError, InputError
from tests.bench.tiny_models import LAYERS, save_bert, save_diffusion, save_llama, save_vit

PROMPTS = ("the old house", "a river that runs to the sea under the old bridge", "two birds")
WORDS = sorted({word for prompt in PROMPTS for word in prompt.split()})


# --- tiny models of each kind, and their inputs -----------------------------------------------------------------


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    out = tmp_path_factory.mktemp("vit")
    save_vit(out)
    return out


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    out = tmp_path_factory.mktemp("bert")
    save_bert(out, WORDS)
    return out


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    out = tmp_path_factory.mktemp("llama")
    save_llama(out, WORDS)
    return out


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory):
    out = tmp_path_factory.mktemp("diffusion")
    save_diffusion(out, WORDS)
    return out


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """More than a batch of them, of a size that the processor must change."""
    out = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (18, 24, 24, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(out / f"{number:04}.png")
    return out


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    out = tmp_path_factory.mktemp("prompts")
    with (out / "prompts.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("id", "prompt"), *enumerate(PROMPTS)])
    return out


def copied(model, out, relative=0.0):
    """Copy a model, each weight changed by this much, relatively."""
    shutil.copytree(model, out)
    generator = torch.Generator().manual_seed(1)
    for file in sorted(out.rglob("*.safetensors")):
        weights = load_file(file)
        for name, weight in weights.items():
            if relative and weight.is_floating_point():
                noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
                weights[name] = (weight.double() * (1 + relative * noise)).to(weight.dtype)
        save_file(weights, file, {"format": "pt"})
    return out


KINDS = {
    "vit": ("images", ImageStates),
    "bert": ("prompts", TextStates),
    "llama": ("prompts", WrittenTexts),
    "diffusion": ("prompts", DrawnImages),
}


@pytest.fixture(params=KINDS)
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def behaviour(request, model):
    """The behaviour of the model, with few steps of denoising."""
    inputs, kind = next(KINDS[name] for name in KINDS if model.name.startswith(name))
    found = behaviour_of(model, request.getfixturevalue(inputs))
    assert type(found) is kind
    return replace(found, steps=2) if kind is DrawnImages else found


def same(first, second):
    if isinstance(first, np.ndarray):
        return np.array_equal(first, second)
    return len(first) == len(second) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(first, second, strict=True)
    )


# --- what holds for each kind -----------------------------------------------------------------------------------


class TestEveryKind:
    def test_twice_observed_is_the_same_and_the_generator_is_left_alone(self, model, behaviour):
        first = behaviour.observe(model)
        torch.manual_seed(12)
        state = torch.random.get_rng_state()
        second = behaviour.observe(model)
        assert same(first, second)
        assert torch.equal(state, torch.random.get_rng_state())

    def test_a_copy_does_the_same(self, model, behaviour, tmp_path):
        original, recovered = behaviour.observe(model), behaviour.observe(copied(model, tmp_path / "copy"))
        assert same(original, recovered)

    def test_a_model_without_weights(self, model, behaviour, tmp_path):
        broken = copied(model, tmp_path / "broken")
        for file in broken.rglob("*.safetensors"):
            file.unlink()
        with pytest.raises(InputError, match=r"broken\S* cannot be loaded; got: .*; check its files"):
            behaviour.observe(broken)

    def test_a_model_without_one_of_its_weights_is_not_filled_up_at_random(self, model, behaviour, tmp_path):
        broken = copied(model, tmp_path / "broken")
        file = max(broken.rglob("*.safetensors"), key=lambda file: file.stat().st_size)
        weights = load_file(file)
        name = max((name for name in weights if "attention" in name or "attn" in name), key=len)
        save_file({key: weight for key, weight in weights.items() if key != name}, file, {"format": "pt"})
        with pytest.raises(InputError, match=r"broken\S* is not complete; 1 weights are missing, \S+ the first; copy"):
            behaviour.observe(broken)


class TestStates:
    @pytest.mark.parametrize(("kind", "inputs"), [("vit", "images"), ("bert", "prompts")])
    def test_distance_grows_with_the_change(self, kind, inputs, request, tmp_path):
        base = request.getfixturevalue(kind)
        behaviour = behaviour_of(base, request.getfixturevalue(inputs))
        original = behaviour.observe(base)
        distances = {}
        for relative in (0.0, 1e-9, 0.1):
            recovered = behaviour.observe(copied(base, tmp_path / str(relative), relative))
            differences = behaviour.compare(original, recovered)
            assert differences.values.keys() == {"activation"}
            assert not differences.notes
            distances[relative] = differences.values["activation"]
        assert distances[0.0] < 1e-15
        assert distances[0.0] < distances[1e-9] < 1e-10
        assert distances[0.1] > 1e6 * distances[1e-9]

    def test_of_images_are_those_after_each_block_in_float64(self, vit, images):
        from transformers import ViTForImageClassification, ViTImageProcessorPil

        states = behaviour_of(vit, images).observe(vit)
        assert [(state.shape, state.dtype) for state in states] == [((18, 5, 16), torch.float64)] * LAYERS
        with quiet(), torch.no_grad():
            processor = ViTImageProcessorPil.from_pretrained(vit)
            pixels = processor([Image.open(images / "0017.png")], return_tensors="pt")["pixel_values"].double()
            model = ViTForImageClassification.from_pretrained(vit, dtype=torch.float64).eval()
            truth = model(pixels, output_hidden_states=True).hidden_states
        assert len(truth) == LAYERS + 1
        for state, expected in zip(states, truth[1:], strict=True):
            torch.testing.assert_close(state[17:], expected, rtol=1e-12, atol=1e-12)

    def test_of_grey_images_and_images_with_alpha(self, vit, tmp_path):
        Image.new("L", (16, 16), 90).save(tmp_path / "grey.png")
        Image.new("RGB", (16, 16), (90, 90, 90)).save(tmp_path / "rgb.png")
        Image.new("RGBA", (16, 16), (90, 90, 90, 255)).save(tmp_path / "rgba.png")
        for state in behaviour_of(vit, tmp_path).observe(vit):
            torch.testing.assert_close(state[0], state[1], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(state[2], state[1], rtol=1e-12, atol=1e-12)

    def test_of_padding_are_zero_and_of_a_prompt_do_not_depend_on_the_others(self, bert, prompts):
        behaviour = behaviour_of(bert, prompts)
        alone = replace(behaviour, prompts=PROMPTS[:1]).observe(bert)
        tokens = len(PROMPTS[0].split()) + 2
        longest = max(len(prompt.split()) for prompt in PROMPTS) + 2
        for state, expected in zip(behaviour.observe(bert), alone, strict=True):
            assert state.shape == (3, longest, 16)
            torch.testing.assert_close(state[0, :tokens], expected[0], rtol=1e-12, atol=1e-12)
            assert not state[0, tokens:].any()

    def test_of_long_prompts_end_at_128_tokens(self, bert, prompts):
        behaviour = replace(behaviour_of(bert, prompts), prompts=("house " * 500,))
        assert behaviour.observe(bert)[0].shape == (1, 128, 16)

    def test_of_an_unreadable_image(self, vit, tmp_path):
        (tmp_path / "0000.png").write_bytes(b"no image")
        with pytest.raises(InputError, match=r"0000\.png cannot be read.*; expected an image; replace or remove it"):
            behaviour_of(vit, tmp_path).observe(vit)


class TestTexts:
    def test_distance_of_equal_and_of_changed_models(self, llama, prompts, tmp_path):
        behaviour = behaviour_of(llama, prompts)
        original = behaviour.observe(llama)
        same_texts = behaviour.compare(original, behaviour.observe(copied(llama, tmp_path / "same")))
        values = same_texts.values
        assert values.keys() == {"sbert", "sbert_log10", "equal_texts"}
        assert not same_texts.notes
        assert abs(values["sbert"]) < 1e-6
        assert values["equal_texts"] == 1.0
        changed = behaviour.compare(original, behaviour.observe(copied(llama, tmp_path / "changed", 1.0))).values
        assert changed["sbert"] > 1e-3
        assert changed["sbert_log10"] > values["sbert_log10"]
        assert changed["equal_texts"] < 1.0

    def test_each_prompt_starts_from_the_seed_and_its_text(self, llama, prompts):
        behaviour = replace(behaviour_of(llama, prompts), prompts=(PROMPTS[0], PROMPTS[1], PROMPTS[0]))
        first, other, again = behaviour.observe(llama)
        assert first == again
        assert first != other
        assert first.startswith(PROMPTS[0])
        assert other.startswith(PROMPTS[1])
        assert 1 <= len(first.removeprefix(PROMPTS[0]).split()) <= 50

    def test_another_seed_writes_another_text(self, llama, prompts):
        behaviour = behaviour_of(llama, prompts)
        assert behaviour.observe(llama) != replace(behaviour, seed=1).observe(llama)

    def test_length(self, llama, prompts):
        texts = replace(behaviour_of(llama, prompts), new_tokens=1).observe(llama)
        written = [text.removeprefix(prompt) for text, prompt in zip(texts, PROMPTS, strict=True)]
        assert all(len(text.split()) <= 1 for text in written)

    def test_defaults_are_the_papers(self, llama, prompts):
        expected = WrittenTexts(llama, PROMPTS, new_tokens=50, temperature=0.7, top_k=50, top_p=0.95, seed=0)
        assert behaviour_of(llama, prompts) == expected

    def test_without_a_tokenizer(self, llama, tmp_path):
        behaviour = WrittenTexts(tmp_path, PROMPTS)
        with pytest.raises(InputError, match=r"the tokenizer in \S+ cannot be loaded; got: .*; check its files"):
            behaviour.observe(llama)

    def test_generation_settings_of_a_fine_tune_do_not_matter(self, llama, prompts, tmp_path):
        tuned = copied(llama, tmp_path / "tuned")
        settings = {"do_sample": False, "num_beams": 3, "repetition_penalty": 3.0, "max_new_tokens": 2}
        (tuned / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
        behaviour = behaviour_of(llama, prompts)
        assert behaviour.observe(tuned) == behaviour.observe(llama)


class TestImages:
    @pytest.fixture
    def behaviour(self, diffusion, prompts):
        return replace(behaviour_of(diffusion, prompts), steps=2)

    def test_are_of_8_bits_and_differ_between_prompts(self, behaviour, diffusion):
        drawn = behaviour.observe(diffusion)
        assert drawn.shape == (3, 16, 16, 3)
        assert drawn.dtype == np.uint8
        assert len(np.unique(drawn)) > 20
        assert not np.array_equal(drawn[0], drawn[1])

    def test_each_prompt_has_latents_of_its_own(self, behaviour, diffusion):
        first, second = replace(behaviour, prompts=PROMPTS[:1] * 2).observe(diffusion)
        assert not np.array_equal(first, second)

    def test_latents_are_drawn_at_once_from_the_seed(self, behaviour, diffusion):
        from diffusers import StableDiffusionPipeline

        with quiet("diffusers"):
            pipeline = StableDiffusionPipeline.from_pretrained(diffusion, safety_checker=None)
            pipeline.set_progress_bar_config(disable=True)
            side = pipeline.unet.config.sample_size
            latents = torch.randn((3, 4, side, side), generator=torch.Generator().manual_seed(7))
            truth = pipeline(PROMPTS[2], num_inference_steps=2, latents=latents[2:], output_type="np").images
        drawn = replace(behaviour, seed=7).observe(diffusion)
        np.testing.assert_array_equal(drawn[2:], (truth * 255).round().astype(np.uint8))

    def test_levels_of_equal_and_of_changed_models_and_why_there_is_no_lpips(
        self, behaviour, diffusion, tmp_path, monkeypatch
    ):
        monkeypatch.setitem(sys.modules, "lpips", None)
        original = behaviour.observe(diffusion)
        differences = behaviour.compare(original, original.copy())
        assert differences.values == {"levels": 0}
        assert differences.notes.keys() == {"lpips"}
        assert differences.notes["lpips"].endswith("is not installed; pip install 'detune[lpips]'")
        changed = behaviour.compare(original, behaviour.observe(copied(diffusion, tmp_path / "changed", 0.1)))
        assert changed.values["levels"] > 1

    def test_lpips_where_it_can_be_had(self, behaviour, monkeypatch):
        monkeypatch.setattr("detune.metrics.images.lpips_distance", lambda original, recovered: 0.25)
        black = np.zeros((1, 8, 8, 3), dtype=np.uint8)
        assert behaviour.compare(black, black) == Differences({"levels": 0, "lpips": 0.25})

    def test_that_cannot_be_compared_are_no_note(self, behaviour):
        black = np.zeros((2, 8, 8, 3), dtype=np.uint8)
        with pytest.raises(InputError, match="got shapes"):
            behaviour.compare(black, black[:1])

    def test_of_a_pipeline_without_scheduler(self, behaviour, diffusion, tmp_path):
        broken = copied(diffusion, tmp_path / "broken")
        shutil.rmtree(broken / "scheduler")
        with pytest.raises(InputError, match=r"the pipeline in \S*broken cannot be loaded; got: .*; check its files"):
            behaviour.observe(broken)

    def test_defaults_are_the_papers(self, diffusion, prompts):
        assert behaviour_of(diffusion, prompts) == DrawnImages(PROMPTS, steps=50, seed=0)


# --- which kind, and its inputs ---------------------------------------------------------------------------------


def described(folder, **config):
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


class TestWhichKind:
    @pytest.mark.parametrize(
        ("architecture", "more"),
        [
            ("T5ForConditionalGeneration", {"is_encoder_decoder": True, "vocab_size": 9}),
            ("CLIPModel", {"text_config": {}, "vision_config": {}}),
            ("Wav2Vec2Model", {}),
        ],
    )
    def test_unknown_architecture(self, architecture, more, tmp_path, prompts):
        (tmp_path / "tokenizer_config.json").write_text("{}", encoding="utf-8")
        (tmp_path / "preprocessor_config.json").write_text('{"sampling_rate": 16000}', encoding="utf-8")
        model = described(tmp_path, architectures=[architecture], **more)
        with pytest.raises(InputError, match=rf"its architecture is {architecture}; expected a causal .*; compare its"):
            behaviour_of(model, prompts)

    def test_unknown_pipeline(self, tmp_path, prompts):
        (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}', encoding="utf-8")
        with pytest.raises(InputError, match="its pipeline is 'FluxPipeline'; expected"):
            behaviour_of(tmp_path, prompts)

    def test_no_model(self, tmp_path, prompts):
        with pytest.raises(InputError, match=r"no model in .*; it has neither config\.json nor model_index\.json"):
            behaviour_of(tmp_path, prompts)

    @pytest.mark.parametrize(("text", "message"), [("{", "expected JSON"), ("[]", "got list, expected an object")])
    def test_damaged_configuration(self, text, message, tmp_path, prompts):
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=message):
            behaviour_of(tmp_path, prompts)


class TestPrompts:
    @pytest.fixture
    def model(self, tmp_path):
        return described(tmp_path, architectures=["LlamaForCausalLM"])

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
    def test_a_file_of_the_users(self, model, tmp_path, encoding):
        (tmp_path / "my.csv").write_text('prompt,note\n"one, ""two""",a\n,b\ndrei süße\n', encoding=encoding)
        assert behaviour_of(model, tmp_path / "my.csv").prompts == ('one, "two"', "drei süße")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"text,note\na,b\n", r"has no column 'prompt'; found 'text', 'note' in its first line; name the column"),
            (b"", r"has no column 'prompt'; found nothing in its first line"),
            (b"prompt\n\n", r"has no prompts; its column 'prompt' is empty; write one"),
            (b"prompt\n\xff\xfe\n", r"cannot be read: .*; expected CSV in UTF-8"),
            (b'prompt\n"open', r"cannot be read: .*; expected CSV in UTF-8"),
        ],
    )
    def test_a_file_without_prompts(self, model, tmp_path, content, message):
        (tmp_path / "prompts.csv").write_bytes(content)
        with pytest.raises(InputError, match=message):
            behaviour_of(model, tmp_path)

    @pytest.mark.parametrize("inputs", [None, "", "absent.csv"])
    def test_no_file(self, model, tmp_path, inputs):
        wanted = r"this model needs prompts: a CSV file with a column 'prompt', or a folder .*; give such a file"
        with pytest.raises(InputError, match=wanted):
            behaviour_of(model, None if inputs is None else tmp_path / inputs)


class TestImageFiles:
    def test_in_the_order_of_their_names(self, vit, tmp_path):
        for name in ("b.png", "a.JPG", "c.jpeg", "notes.txt"):
            (tmp_path / name).touch()
        assert [file.name for file in behaviour_of(vit, tmp_path).images] == ["a.JPG", "b.png", "c.jpeg"]

    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            (None, "no inputs were given; this model needs images: a folder"),
            ("", r"no images in .*; this model needs images: .*; found prompts\.csv; put some"),
            ("prompts.csv", r"prompts\.csv is not a folder; this model needs images"),
        ],
    )
    def test_none(self, vit, tmp_path, inputs, message):
        (tmp_path / "prompts.csv").write_text("prompt\na\n", encoding="utf-8")
        with pytest.raises(InputError, match=message):
            behaviour_of(vit, None if inputs is None else tmp_path / inputs)


def test_without_the_extra(monkeypatch, vit, images):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DetuneError, match=r"is not installed; pip install 'detune\[bench\]'"):
        behaviour_of(vit, images).observe(vit)
