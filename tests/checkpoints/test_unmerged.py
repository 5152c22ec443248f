"""Models that PEFT has put adapters into, saved without merging: the base is in the file."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from detune._runtime import quiet
from detune.checkpoints import CheckpointWriter, Unmerged, open_checkpoint

PLACE = "encoder.layer.0.attention.self.query"


def save_unmerged(path: Path, base: Any, config: Any) -> Path:
    torch.manual_seed(3)
    with quiet():
        model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter)
    save_file({name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}, path)
    return path


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=["query", "word_embeddings"], modules_to_save=["pooler"]),
        LoraConfig(r=4, target_modules=["query"], use_dora=True),
        IA3Config(target_modules=["query"], feedforward_modules=[]),
    ],
)
def test_it_is_read_as_the_base(tmp_path, bert, config):
    path = save_unmerged(tmp_path / "model.safetensors", bert(), config)
    base = bert().state_dict()
    with open_checkpoint(path) as model:
        assert isinstance(model, Unmerged)
        assert set(model.tensors) == set(base)
        assert all(torch.equal(model.read(name), tensor) for name, tensor in base.items())


def test_its_adapters_are_listed(tmp_path, bert):
    config = LoraConfig(r=4, target_modules=["query"], modules_to_save=["pooler"])
    with open_checkpoint(save_unmerged(tmp_path / "model.safetensors", bert(), config)) as model:
        assert isinstance(model, Unmerged)
        factors = model.adapters["default"]
        assert set(factors) == {(f"encoder.layer.{i}.attention.self.query", f"lora_{k}") for i in (0, 1) for k in "AB"}
        assert factors[PLACE, "lora_A"] == f"base_model.model.{PLACE}.lora_A.default.weight"
        assert {name.rpartition(".")[0] for name in model.others} == {
            "base_model.model.pooler.modules_to_save.default.dense"
        }


def test_an_older_peft_kept_the_names_of_its_layers(tmp_path, bert):
    base = bert().state_dict()
    factors = {f"{PLACE}.lora_A.default.weight": torch.ones(2, 32), f"{PLACE}.lora_B.default.weight": torch.ones(32, 2)}
    save_file(base | factors, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path / "model.safetensors") as model:
        assert isinstance(model, Unmerged)
        assert set(model.tensors) == set(base)
        assert set(model.adapters["default"]) == {(PLACE, "lora_A"), (PLACE, "lora_B")}


def test_the_output_has_no_adapter(tmp_path, bert):
    path = save_unmerged(tmp_path / "model.safetensors", bert(), LoraConfig(r=4, target_modules=["query"]))
    with open_checkpoint(path) as model, CheckpointWriter(model, tmp_path / "out") as writer:
        for name in model.tensors:
            writer.copy(name)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert set(written) == set(bert().state_dict())


def test_a_plain_model_is_none(bert_dir):
    with open_checkpoint(bert_dir) as model:
        assert not isinstance(model, Unmerged)
