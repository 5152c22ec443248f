"""Adapters written by `extract` and `recover`, loaded and merged by PEFT itself."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaModel,
    ViTConfig,
    ViTModel,
)

import detune
from detune.adapters.changes import Kept, adapter_names
from detune.errors import InputError, OutputError
from detune.metrics import bit_identical
from tests.cases import normal, seeded
from tests.families import Fine, edit, fine_tune, perturb, plain_family, shard, stored, tree

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96, "vocab_size": 80}
# PEFT and transformers warn of each other's changes.
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning:peft", "ignore::UserWarning:diffusers"
)


def bert(dtype: torch.dtype = torch.float32) -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(**SMALL)).to(dtype).eval()


def gpt2(dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=200, n_positions=32)
    return GPT2LMHeadModel(config).to(dtype).eval()


def merged_by_peft(make: Callable[[], Any], folder: Path, config: LoraConfig, n: int = 3, size: float = 0.05) -> Fine:
    """A base, and `n` random LoRAs of it that PEFT merged."""
    make().save_pretrained(folder / "base")
    generator = seeded(21)
    models = []
    for i in range(n):
        adapted = get_peft_model(make(), config)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0, size, generator=generator)
        adapted.merge_and_unload().save_pretrained(folder / f"model-{i}")
        models.append(folder / f"model-{i}")
    return Fine(folder / "base", tuple(models))


def merge(base: Path, adapter: Path, loader: Any = AutoModel) -> dict[str, Tensor]:
    """What a user of PEFT gets; every key of the adapter has a place in the model."""
    with warnings.catch_warnings():
        # PEFT warns of keys that it misses in an adapter.
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        model = PeftModel.from_pretrained(loader.from_pretrained(base, dtype="auto"), adapter)
    return dict(model.merge_and_unload().state_dict())


def share(merged: dict[str, Tensor], model: Path, names: list[str]) -> float:
    expected = stored(model)
    entries = {name: expected[name].numel() for name in names}
    return sum(bit_identical(merged[name], expected[name]) * n for name, n in entries.items()) / sum(entries.values())


# In float32 the product of the factors is rounded as coarsely as the weights: a part of the bits lies in its error.
@pytest.mark.parametrize(("dtype", "size", "least"), [(torch.float32, 0.01, 0.9), (torch.bfloat16, 0.05, 0.95)])
def test_merged_by_peft_again_it_is_the_model(tmp_path, dtype, size, least):
    """The report says of the merge what PEFT makes of it, to the last bit."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"])
    fine = merged_by_peft(lambda: bert(dtype), tmp_path, config, size=size)
    extraction = detune.extract(fine.models, tmp_path / "out", base=fine.base)
    assert {(row.kept, row.rank) for row in extraction.rows} == {(Kept.LORA, 4)}
    for model in fine.models:
        rows = [row for row in extraction.rows if row.model == model.name]
        assert len(rows) == 4
        merged = merge(fine.base, tmp_path / "out" / model.name)
        for row in rows:
            assert bit_identical(merged[row.name], stored(model)[row.name]) == row.identical
        changed = share(merged, model, [row.name for row in rows])
        assert changed == pytest.approx(extraction.summary[model.name]["identical_of_changed"])
        assert changed > least
        unchanged = merged.keys() - {row.name for row in rows}
        assert all(bit_identical(merged[name], stored(model)[name]) == 1 for name in unchanged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recover_writes_adapters_of_the_base_it_wrote(tmp_path, dtype):
    config = LoraConfig(r=2, target_modules=["query", "value"])
    fine = merged_by_peft(lambda: bert(dtype), tmp_path, config, size=0.01 if dtype is torch.float32 else 0.2)
    report = detune.recover(fine.models, tmp_path / "base-again", adapters=tmp_path / "adapters")
    again = detune.extract(fine.models, tmp_path / "again", base=tmp_path / "base-again")
    assert report.adapters == again.summary
    for model in fine.models:
        file = f"{model.name}/adapter_model.safetensors"
        assert (tmp_path / "adapters" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
        merged = merge(tmp_path / "base-again", tmp_path / "adapters" / model.name)
        figures = report.adapters[model.name]
        assert share(merged, model, list(stored(model))) == pytest.approx(figures["identical"], abs=1e-9)
        # A base that is off by a rounding of its own: the sum of two uniform errors lies within half a step in 3/4.
        assert figures["identical_of_changed"] > 0.6
    config = json.loads((tmp_path / "adapters" / "model-0" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "../../base-again"
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (2, 2, {})
    assert json.loads((tmp_path / "base-again" / "detune.json").read_text())["adapters"] == report.adapters


def test_transposed_layers_and_tied_embeddings(tmp_path):
    """GPT-2 stores (in, out), and its head is its embedding."""
    config = LoraConfig(r=3, target_modules=["c_attn", "c_proj", "wte"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    fine = merged_by_peft(gpt2, tmp_path, config, size=0.01)
    extraction = detune.extract(fine.models, tmp_path / "out", base=fine.base)
    assert {row.rank for row in extraction.rows} == {3}
    assert {row.name for row in extraction.rows} >= {"transformer.wte.weight", "transformer.h.0.attn.c_attn.weight"}
    merged = merge(fine.base, tmp_path / "out" / "model-0", AutoModelForCausalLM)
    rows = [row for row in extraction.rows if row.model == "model-0"]
    assert all(bit_identical(merged[row.name], stored(fine.models[0])[row.name]) == row.identical for row in rows)
    assert min(row.identical for row in rows) > 0.8
    assert torch.equal(merged["lm_head.weight"], merged["transformer.wte.weight"])


def test_kernels_and_modules_that_transformers_renames(tmp_path):
    """A ViT stores its layers under other names than it has in memory."""

    def make() -> ViTModel:
        torch.manual_seed(0)
        config = {key: value for key, value in SMALL.items() if key != "vocab_size"}
        return ViTModel(ViTConfig(image_size=16, patch_size=4, **config)).eval()

    fine = fine_tune(make(), ["query", "q_proj", "patch_embeddings.projection"], tmp_path, 2)
    extraction = detune.extract(fine.models, tmp_path / "out", base=fine.base)
    assert {(row.kept, row.rank) for row in extraction.rows} == {(Kept.LORA, 2)}
    assert any(len(row.shape) == 4 for row in extraction.rows)
    merged = PeftModel.from_pretrained(
        make().from_pretrained(fine.base), tmp_path / "out" / "model-0"
    ).merge_and_unload()
    merged.save_pretrained(tmp_path / "again")
    for row in extraction.rows:
        if row.model == "model-0":
            again = stored(tmp_path / "again")[row.name]
            assert bit_identical(again, stored(fine.models[0])[row.name]) == row.identical > 0.7


def test_each_component_of_a_pipeline_has_its_own(tmp_path):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(32,), norm_num_groups=4, down_block_types=("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",), layers_per_block=1,
    )  # fmt: skip
    fine = Fine(tmp_path / "base", (tmp_path / "model-0",))
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(fine.base)
    perturb(unet, ["to_q", "conv1"], seeded(4), 2)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(fine.models[0])
    extraction = detune.extract(fine.models, tmp_path / "out", base=fine.base)
    assert {(row.kept, row.rank) for row in extraction.rows} == {(Kept.LORA, 2)}
    adapter = tmp_path / "out" / "model-0" / "unet"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "../../../base/unet"
    loading = "PeftModel.from_pretrained(base.unet, 'model-0/unet')"
    assert loading in (tmp_path / "out" / "model-0" / "README.md").read_text()
    base = UNet2DModel.from_pretrained(fine.base / "unet")
    merged = PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    for row in extraction.rows:
        truth = stored(fine.models[0])[row.name]
        assert bit_identical(merged[row.name.removeprefix("unet/")], truth) == row.identical > 0.7


def test_ranks_that_differ_by_layer_and_model(tmp_path):
    config = LoraConfig(r=2, target_modules=["query", "value"], rank_pattern={"layer.1.attention.self.value": 5})
    fine = merged_by_peft(bert, tmp_path, config, n=2)
    extraction = detune.extract(fine.models, tmp_path / "out", base=fine.base)
    config = json.loads((tmp_path / "out" / "model-1" / "adapter_config.json").read_text())
    assert config["r"] == 2
    assert config["rank_pattern"] == config["alpha_pattern"] == {"encoder.layer.1.attention.self.value": 5}
    merge(fine.base, tmp_path / "out" / "model-1")
    assert extraction.summary["model-1"]["ranks"] == [2, 5]


def test_what_is_no_low_rank_is_kept_whole(tmp_path):
    """Biases, norms and a head that was started anew come back in every bit."""

    def make() -> BertForSequenceClassification:
        torch.manual_seed(0)
        return BertForSequenceClassification(BertConfig(**SMALL, num_labels=3)).eval()

    fine = fine_tune(make(), ["query"], tmp_path, 1)
    head, norm = "classifier.weight", "bert.encoder.layer.0.output.LayerNorm.weight"
    biases = ["bert.encoder.layer.0.attention.self.query.bias", "bert.encoder.layer.1.attention.self.key.bias"]
    changed = {name: normal(seeded(3), *stored(fine.base)[name].shape).float() for name in (head, norm, *biases)}
    edit(fine.models[0], lambda state: state.update(changed))
    extraction = detune.extract(fine.models, tmp_path / "out", base=fine.base)
    assert {row.name for row in extraction.rows if row.kept is Kept.WHOLE} == set(changed)
    assert extraction.summary["model-0"]["left out"] == 0
    merged = merge(fine.base, tmp_path / "out" / "model-0", BertForSequenceClassification)
    assert all(bit_identical(merged[name], changed[name]) == 1 for name in changed)
    config = json.loads((tmp_path / "out" / "model-0" / "adapter_config.json").read_text())
    assert config["bias"] == "all"
    assert config["modules_to_save"] == ["bert.encoder.layer.0.output.LayerNorm", "classifier"]


def test_modules_that_peft_takes_for_a_saved_one_come_along(tmp_path):
    """`norm` is the end of `layers.0.input_layernorm` too, and PEFT looks no further."""
    torch.manual_seed(0)
    fine = fine_tune(LlamaModel(LlamaConfig(**SMALL)), ["q_proj"], tmp_path, 1)
    edit(fine.models[0], lambda state: state.update({"norm.weight": state["norm.weight"] * 1.5}))
    detune.extract(fine.models, tmp_path / "out", base=fine.base)
    merged = merge(fine.base, tmp_path / "out" / "model-0")
    assert bit_identical(merged["norm.weight"], stored(fine.models[0])["norm.weight"]) == 1
    assert (
        bit_identical(merged["layers.0.input_layernorm.weight"], stored(fine.base)["layers.0.input_layernorm.weight"])
        == 1
    )


def test_what_peft_has_no_place_for_is_named(tmp_path):
    """A class token is a parameter of a module with parts: PEFT can neither add to it nor save it alone."""
    torch.manual_seed(0)
    config = {key: value for key, value in SMALL.items() if key != "vocab_size"}
    fine = fine_tune(ViTModel(ViTConfig(image_size=16, patch_size=8, **config)), ["query", "q_proj"], tmp_path, 1)
    edit(fine.models[0], lambda state: state["embeddings.cls_token"].add_(1))
    extraction = detune.extract(fine.models, tmp_path / "out", base=fine.base)
    (row,) = (row for row in extraction.rows if row.kept is not Kept.LORA)
    assert (row.name, row.kept, row.reason) == ("embeddings.cls_token", Kept.LEFT_OUT, "PEFT has no place for it")
    assert row.largest_deviation == pytest.approx(1, rel=1e-6)
    assert row.identical == 0


def test_shards_and_models_that_no_library_knows(fine, tmp_path):
    """Names and shapes tell what the tensors are; the LoRAs are those that were added."""
    shard(fine.models[1])
    extraction = detune.extract(fine.models, tmp_path / "out", base=fine.base)
    assert {(row.kept, row.rank) for row in extraction.rows} == {(Kept.LORA, 2)}
    merged = detune.checkpoints.open_checkpoint(f"{fine.base}+{tmp_path / 'out' / 'model-1'}")
    rows = {row.name: row.identical for row in extraction.rows if row.model == "model-1"}
    assert {name: bit_identical(merged.read(name), stored(fine.models[1])[name]) for name in rows} == rows


def test_a_rank_that_is_told_is_the_most(fine, tmp_path):
    extraction = detune.extract(fine.models, tmp_path / "out", base=fine.base, rank=1)
    assert {row.rank for row in extraction.rows} == {1}
    assert max(row.identical for row in extraction.rows) < 0.1


def test_a_model_that_left_a_tensor_alone_has_no_lora_there(fine, tmp_path):
    untouched = stored(fine.base)["layer.0.weight"]
    edit(fine.models[2], lambda state: state.update({"layer.0.weight": untouched}))
    extraction = detune.extract(fine.models, tmp_path / "out", base=fine.base)
    assert [row.name for row in extraction.rows if row.model == "model-2"] == [f"layer.{i}.weight" for i in (1, 2, 3)]


@pytest.fixture
def fine(tmp_path: Path) -> Fine:
    return plain_family(tmp_path / "models")


# --- refusals ---


def test_another_base_is_refused(fine, tmp_path):
    other = plain_family(tmp_path / "other").base
    edit(other, lambda state: [state[name].normal_(generator=seeded(5)) for name in state if "layer" in name])
    message = r"other/base is not the base of .*model-0; they differ at full rank in 4 of 4 matrices.*another base"
    with pytest.raises(InputError, match=message):
        detune.extract(fine.models, tmp_path / "out", base=other)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda state: state.update({"layer.1.weight": torch.zeros(3, 4)}),
            "shape [80, 64] instead of [3, 4], as the base has it",
        ),
        (lambda state: state.pop("layer.1.weight"), "the base has no such tensor"),
    ],
)
def test_what_the_base_does_not_have_is_left_out_and_said_to_be(fine, tmp_path, change, reason):
    edit(fine.base, change)
    rows = detune.extract(fine.models, tmp_path / "out", base=fine.base).rows
    left_out = [row for row in rows if row.kept is Kept.LEFT_OUT]
    assert [(row.name, row.reason) for row in left_out] == [("layer.1.weight", reason)] * 3
    assert len(rows) == 12


def test_a_base_of_another_architecture_is_refused(fine, tmp_path):
    save_file({f"block.{i}": torch.ones(3) for i in range(4)}, fine.base / "model.safetensors")
    with pytest.raises(InputError, match=r"model-0 does not fit .*base; 0 of 4 tensors are alike, it lacks 'block\.0'"):
        detune.extract(fine.models, tmp_path / "out", base=fine.base)


def test_a_base_may_have_more_than_the_models(fine, tmp_path):
    edit(fine.base, lambda state: state.update({"position_ids": torch.arange(9)}))
    assert len(detune.extract(fine.models, tmp_path / "out", base=fine.base).rows) == 12


def test_models_without_any_lora_are_refused(fine, tmp_path):
    for model in fine.models:
        edit(model, lambda state: state.update(stored(fine.base) | {"norm.weight": state["norm.weight"] + 1}))
    with pytest.raises(InputError, match=r"no model has a LoRA of .*none of 1 changed tensors"):
        detune.extract(fine.models[:1], tmp_path / "out", base=fine.base)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("broken", ["base", "model-1"])
def test_damaged_weights_are_refused(fine, tmp_path, broken):
    edit(fine.base.with_name(broken), lambda state: state["layer.2.weight"].fill_(float("nan")))
    with pytest.raises(InputError, match=rf"'layer.2.weight' of .*{broken} holds NaN or Inf"):
        detune.extract(fine.models, tmp_path / "out", base=fine.base)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(fine, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(OutputError, match="out exists; expected a new or empty directory"):
        detune.extract(fine.models, tmp_path / "out", base=fine.base)
    with pytest.raises(OutputError, match="lies inside the base"):
        detune.extract(fine.models, fine.base / "adapters", base=fine.base)
    assert tree(tmp_path / "out") == {"mine": b"mine"}


def test_a_failure_leaves_neither_adapters_nor_base(fine, tmp_path, monkeypatch):
    """The last model breaks when the others' adapters are written."""
    monkeypatch.setattr("detune.checkpoints.peft_writer.PeftWriter._config", lambda self: 1 / 0)
    before = set(tmp_path.iterdir())
    with pytest.raises(ZeroDivisionError):
        detune.recover(fine.models, tmp_path / "base", adapters=tmp_path / "adapters")
    (run_directory,) = set(tmp_path.iterdir()) - before
    assert run_directory.name.startswith(".base.recovering-")
    assert not list(run_directory.rglob("*.json"))


def test_names_of_adapters(tmp_path):
    assert adapter_names(["a/m", "b/m", "m-1"]) == ("m-2", "m-3", "m-1")
    # Files lie beside them, and some file systems take "A" for "a".
    assert adapter_names(["README.md", "Detune.JSON", "adapter_config.json"]) == (
        "README.md-1",
        "Detune.JSON-1",
        "adapter_config.json-1",
    )
    assert adapter_names(["A", "a", "a-1"]) == ("A-2", "a-3", "a-1")
    # An accent in one character and in two.
    assert adapter_names(["caf\u00e9", "cafe\u0301"]) == ("caf\u00e9-1", "cafe\u0301-2")
    path = tmp_path / "me@home" / "model"
    path.mkdir(parents=True)
    assert adapter_names([str(path), "org/name@v2"]) == ("model", "name")


# --- the command ---


def test_extract_from_the_command_line(fine, tmp_path, command):
    ran = command("extract", *fine.models, "--base", fine.base, "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert "layer.*.weight" in ran.out
    assert "model-0: 4 LoRA layers of rank 2; merged by PEFT, " in ran.out
    ran = command("extract", *fine.models, "--base", fine.base, "--out", tmp_path / "again", "--json")
    assert json.loads(ran.out)["summary"]["model-2"]["LoRA"] == 4


def test_recover_with_adapters_from_the_command_line(fine, tmp_path, command):
    ran = command("recover", *fine.models, "--out", tmp_path / "base", "--adapters", tmp_path / "adapters")
    assert ran.code == 0, ran.err
    assert "model-2: 4 LoRA layers of rank 2" in ran.out
    made = {path.name for path in (tmp_path / "adapters").iterdir()}
    assert made == {"model-0", "model-1", "model-2", "detune.json", "README.md"}
