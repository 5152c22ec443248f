"""Models that PEFT has put adapters into, saved without merging: the base is in the file."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from detune._runtime import quiet
from detune.checkpoints import CheckpointWriter, Unmerged, open_checkpoint
from detune.errors import InputError

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


class TestDamaged:
    """One layer, its factors, and what says how they are scaled."""

    A, B, BASE = (f"base_model.model.a.{name}.weight" for name in ("lora_A.default", "lora_B.default", "base_layer"))
    CONFIG = '{"r": 2, "lora_alpha": 6}'

    def write(self, path: Path, changes: dict[str, Tensor], config: str = CONFIG) -> Path:
        path.mkdir()
        tensors = {self.A: torch.ones(2, 5), self.B: torch.ones(7, 2), self.BASE: torch.ones(7, 5)}
        save_file(tensors | changes, path / "model.safetensors")
        (path / "adapter_config.json").write_text(config)
        return path

    @pytest.mark.parametrize(
        ("config", "scaling"),
        [
            (CONFIG, 3.0),
            ('{"lora_alpha": 6}', 3.0),
            ('{"r": 8, "lora_alpha": 6, "rank_pattern": {"a": 2}, "alpha_pattern": {"^a$": 4}}', 2.0),
        ],
    )
    def test_what_is_sound_is_read(self, tmp_path, config, scaling):
        with open_checkpoint(self.write(tmp_path / "model", {}, config)) as model:
            assert isinstance(model, Unmerged)
            A, B, found = model.read_factors("a.weight")
            assert (A.shape, B.shape, found) == ((2, 5), (7, 2), scaling)

    @pytest.mark.parametrize(
        "change",
        [
            {A: torch.ones(0, 5), B: torch.ones(7, 0)},
            {A: torch.ones(10)},
            {A: torch.tensor(1.0)},
            {A: torch.ones(2, 5, 1)},
            {A: torch.ones(3, 5)},
            {A: torch.ones(2, 6)},
            {B: torch.ones(8, 2)},
            {A: torch.ones(2, 5, dtype=torch.int64)},
            {B: torch.ones(7, 2, dtype=torch.complex64)},
            {A: torch.full((2, 5), torch.nan)},
            {B: torch.full((7, 2), 3e38)},
        ],
    )
    def test_factors_that_are_no_lora_of_their_tensor_are_refused(self, tmp_path, change):
        with open_checkpoint(self.write(tmp_path / "model", change)) as model:
            assert isinstance(model, Unmerged)
            assert torch.equal(model.read("a.weight"), torch.ones(7, 5))
            with pytest.raises(InputError, match=r"the factors of .* (do not fit each other|are no LoRA of it); "):
                model.read_factors("a.weight")

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ("[]", "is malformed"),
            ('{"lora_alpha": "6"}', "has no lora_alpha; got '6'"),
            ('{"lora_alpha": true}', "has no lora_alpha; got True"),
            ('{"lora_alpha": NaN}', "is no number to multiply by"),
            (f'{{"lora_alpha": 1{"0" * 400}}}', "is no number to multiply by"),
            ('{"lora_alpha": 6, "r": 4}', "has rank 2, expected 4"),
            ('{"lora_alpha": 6, "use_dora": true}', "is more than plain LoRA; .*; merge model with PEFT's merge_and_"),
        ],
    )
    def test_settings_that_do_not_say_how_to_scale_are_refused(self, tmp_path, config, message):
        with open_checkpoint(self.write(tmp_path / "model", {}, config)) as model:
            assert isinstance(model, Unmerged)
            with pytest.raises(InputError, match=message):
                model.read_factors("a.weight")

    def test_dora_is_refused_without_settings_too(self, tmp_path):
        change = {"base_model.model.a.lora_magnitude_vector.default.weight": torch.ones(7)}
        with open_checkpoint(self.write(tmp_path / "model", change)) as model:
            assert isinstance(model, Unmerged)
            with pytest.raises(InputError, match="is more than plain LoRA; it has a magnitude for each row"):
                model.read_factors("a.weight")

    @pytest.mark.parametrize("name", ["a.weight", "a.base_layer.weight", "a.lora_A.default", A.removesuffix(".weight")])
    def test_two_tensors_for_one_place_are_refused(self, tmp_path, name):
        path = self.write(tmp_path / "model", {name: torch.ones(7, 5)})
        with pytest.raises(InputError, match=r"model holds two tensors for one place of the base; they are .*; remove"):
            open_checkpoint(path)
