"""LoRAs as factors: what the library itself merges is W + alpha / rank * B @ A."""

import json
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPTextConfig,
    CLIPTextModel,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTModel,
)

from detune.checkpoints import Checkpoint, Lora, MergedCheckpoint, open_checkpoint, open_lora
from detune.errors import DetuneError, InputError
from tests.checkpoints.loras import Mixed, merge, merge_model, train

QUERY = "encoder.layer.0.attention.self.query"
UNET_LAYERS = [
    *("conv_in", "linear_1", "linear_2", "time_emb_proj", "conv1", "conv2", "conv_shortcut", "conv", "conv_out"),
    *("proj_in", "proj_out", "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
]
TEXT_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def check(lora: Lora, base: Checkpoint, expected: Mapping[str, Tensor]) -> None:
    """The factors give the library's merge to float32 rounding, and the tensors it changed are those of the LoRA."""
    assert lora.names == tuple(name for name in base.tensors if name in lora.layers)
    for name, info in base.tensors.items():
        if name not in expected:
            assert name not in lora.layers
            continue
        weight, merged = base.read(name), expected[name]
        assert (name in lora.layers) == (not weight.equal(merged)), name
        if name not in lora.layers:
            continue
        layer = lora.read(name)
        assert layer.A.dtype == layer.B.dtype == torch.float32
        assert (layer.name, layer.rank, layer.rank) == (name, layer.A.shape[0], layer.B.shape[1])
        update = layer.alpha / layer.rank * (layer.B.flatten(1) @ layer.A.flatten(1))
        torch.testing.assert_close(weight + update.reshape(info.shape), merged, rtol=1e-6, atol=1e-6)


def make_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=16))


def make_vit() -> ViTModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "image_size": 8, "patch_size": 4}
    return ViTModel(ViTConfig(num_hidden_layers=1, num_attention_heads=2, **sizes))


class TestPeft:
    def test_rank_stabilised_with_patterns(self, tmp_path: Path, bert: Callable[..., Any]) -> None:
        config = LoraConfig(
            r=4,
            lora_alpha=7,
            target_modules=["query", "value"],
            use_rslora=True,
            rank_pattern={"value": 3},
            alpha_pattern={"layer.1.*": 5},
        )
        bert().save_pretrained(tmp_path / "base")
        train(bert(), config, tmp_path / "adapter")
        base = open_checkpoint(tmp_path / "base")
        lora = open_lora(tmp_path / "adapter", base)
        check(lora, base, merge(bert(), tmp_path / "adapter"))
        assert (lora.spec, lora.name, lora.extra) == (str(tmp_path / "adapter"), "adapter", ())
        assert {lora.read(name).rank for name in lora.names} == {3, 4}
        assert lora.read(f"{QUERY}.weight").alpha == pytest.approx(7 * 4**0.5)

    def test_embedding_and_convolutions(self, tmp_path: Path) -> None:
        def make() -> Mixed:
            torch.manual_seed(0)
            return Mixed()

        targets = ["embed", "linear", "square", "conv", "pointwise", "conv1d"]
        train(make(), LoraConfig(r=3, lora_alpha=5, target_modules=targets), tmp_path / "adapter")
        save_file(make().state_dict(), tmp_path / "base.safetensors")
        base = open_checkpoint(tmp_path / "base.safetensors")
        lora = open_lora(tmp_path / "adapter", base)
        check(lora, base, merge(make(), tmp_path / "adapter"))
        assert len(lora.names) == len(targets)
        assert lora.read("conv.weight").A.shape == (3, 3, 3, 3)
        assert lora.read("conv.weight").B.shape == (5, 3, 1, 1)
        assert lora.read("embed.weight").B.shape == (11, 3)

    @pytest.mark.filterwarnings("ignore:fan_in_fan_out")
    def test_square_layers_are_turned_as_their_class_says(self, tmp_path: Path) -> None:
        """Whatever the configuration says: PEFT corrects it, and here the oblong layers tell."""

        def make() -> Mixed:
            torch.manual_seed(0)
            return Mixed()

        train(make(), LoraConfig(r=3, target_modules=["linear", "square"]), tmp_path / "adapter")
        save_file(make().state_dict(), tmp_path / "base.safetensors")
        config = tmp_path / "adapter" / "adapter_config.json"
        base = open_checkpoint(tmp_path / "base.safetensors")
        for flag in ("false", "true"):
            text = config.read_text().replace('"fan_in_fan_out": false', f'"fan_in_fan_out": {flag}')
            config.write_text(text)
            assert json.loads(text)["fan_in_fan_out"] is (flag == "true")
            check(open_lora(tmp_path / "adapter", base), base, merge(make(), tmp_path / "adapter"))

    def test_layers_stored_transposed(self, tmp_path: Path) -> None:
        make_gpt2().save_pretrained(tmp_path / "base")
        train(make_gpt2(), LoraConfig(r=4, target_modules=["c_attn", "c_proj"]), tmp_path / "adapter")
        base = open_checkpoint(tmp_path / "base")
        merge_model(make_gpt2(), tmp_path / "adapter").save_pretrained(tmp_path / "merged")
        check(open_lora(tmp_path / "adapter", base), base, load_file(tmp_path / "merged" / "model.safetensors"))

    def test_tied_sharded_and_half_precision(self, tmp_path: Path, llama: Callable[..., Any]) -> None:
        llama().save_pretrained(tmp_path / "base", max_shard_size="10KB")
        train(llama(), LoraConfig(r=2, target_modules=["embed_tokens", "q_proj", "down_proj"]), tmp_path / "adapter")
        base = open_checkpoint(tmp_path / "base")
        lora = open_lora(tmp_path / "adapter", base)
        check(lora, base, merge(llama(), tmp_path / "adapter"))
        llama(torch.bfloat16).save_pretrained(tmp_path / "half")
        half = open_lora(tmp_path / "adapter", open_checkpoint(tmp_path / "half"))
        assert all(half.read(name).A.equal(lora.read(name).A) for name in lora.names)

    def test_names_that_differ_in_memory_and_on_disk(self, tmp_path: Path) -> None:
        make_vit().save_pretrained(tmp_path / "base")
        train(make_vit(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), tmp_path / "adapter")
        merge_model(make_vit(), tmp_path / "adapter").save_pretrained(tmp_path / "merged")
        base = open_checkpoint(tmp_path / "base")
        lora = open_lora(tmp_path / "adapter", base)
        check(lora, base, load_file(tmp_path / "merged" / "model.safetensors"))
        assert lora.names[0].endswith("attention.attention.query.weight")

    def test_a_classifier_trained_in_full_is_extra(self, tmp_path: Path, bert: Callable[..., Any]) -> None:
        """The base has no head: what the adapter has for one cannot be a change of it."""
        torch.manual_seed(0)
        model = BertForSequenceClassification(BertConfig(**bert().config.to_diff_dict()))
        bert().save_pretrained(tmp_path / "base")
        train(model, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"), tmp_path / "adapter")
        base = open_checkpoint(tmp_path / "base")
        lora = open_lora(tmp_path / "adapter", base)
        assert sorted(lora.extra) == ["base_model.model.classifier.bias", "base_model.model.classifier.weight"]
        assert lora.names == tuple(f"encoder.layer.{i}.attention.self.query.weight" for i in (0, 1))
        with pytest.raises(InputError, match=r'more than plain LoRA; it has modules_to_save=\["classifier"'):
            open_checkpoint(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")

    def test_a_component_against_its_pipeline(self, diffusion: Path, adapters: Path) -> None:
        """The adapter does not say which component it is of, and the VAE has a `decoder.conv_in` too."""
        pipeline, unet = open_checkpoint(diffusion), open_checkpoint(diffusion / "unet")
        names = open_lora(adapters / "unet", unet).names
        assert "conv_in.weight" in names
        assert open_lora(adapters / "unet", pipeline).names == tuple(f"unet/{name}" for name in names)

    def test_name_of_a_repository(self, diffusion: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The directory of a snapshot is called by its commit."""
        monkeypatch.setattr("detune.checkpoints.hub.fetch", lambda _: adapters / "unet")
        lora = open_lora("someone/style@v1", open_checkpoint(diffusion))
        assert (lora.spec, lora.name) == ("someone/style@v1", "style")

    def test_factors_are_read_when_asked_for(self, tmp_path: Path, bert: Callable[..., Any]) -> None:
        bert().save_pretrained(tmp_path / "base")
        train(bert(), LoraConfig(r=2, target_modules=["query"]), tmp_path / "adapter")
        lora = open_lora(tmp_path / "adapter", open_checkpoint(tmp_path / "base"))
        (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
        with pytest.raises(InputError, match=r"cannot read tensor '.*lora_A\.weight'"):
            lora.read(lora.names[0])


def make_text_encoder() -> CLIPTextModel:
    torch.manual_seed(1)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "vocab_size": 20, "max_position_embeddings": 8}
    return CLIPTextModel(CLIPTextConfig(num_hidden_layers=1, num_attention_heads=2, **sizes))


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion pipeline with one block of each kind."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=2,
    )
    path = tmp_path_factory.mktemp("models") / "diffusion"
    make_pipeline(unet).save_pretrained(path)
    return path


def make_pipeline(unet: UNet2DConditionModel) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, sample_size=8),
        text_encoder=make_text_encoder(),
        tokenizer=None,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="module")
def adapters(diffusion: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PEFT's adapters of the two components."""
    path = tmp_path_factory.mktemp("adapters")
    unet = UNet2DConditionModel.from_pretrained(diffusion / "unet")
    config = LoraConfig(r=3, lora_alpha=5, target_modules=UNET_LAYERS, rank_pattern={"conv1": 2})
    train(unet, config, path / "unet")
    train(make_text_encoder(), LoraConfig(r=2, lora_alpha=2, target_modules=TEXT_LAYERS), path / "text_encoder")
    return path


def state_of(adapters: Path, component: str) -> dict[str, Tensor]:
    tensors = load_file(adapters / component / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}


def fuse(diffusion: Path, file: Path) -> dict[str, Tensor]:
    """Merge the part of the U-Net as diffusers does."""
    pipeline = make_pipeline(UNet2DConditionModel.from_pretrained(diffusion / "unet"))
    state = {name: tensor for name, tensor in load_file(file).items() if name.startswith(("unet.", "lora_unet_"))}
    metadata = json.loads(open_checkpoint(file).weight_files[0].metadata.get("lora_adapter_metadata", "{}"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "While injecting the PEFT adapters")  # its target_modules are not literal
        if metadata:
            pipeline.unet.load_lora_adapter(state, prefix="unet", metadata=metadata)
        else:
            pipeline.load_lora_weights(state)
    pipeline.fuse_lora(components=["unet"])
    pipeline.unload_lora_weights()
    return {f"unet/{name}": tensor for name, tensor in pipeline.unet.state_dict().items()}


def merged_text_encoder(adapters: Path) -> dict[str, Tensor]:
    state = merge(make_text_encoder(), adapters / "text_encoder")
    return {f"text_encoder/{name}": tensor for name, tensor in state.items()}


class TestDiffusers:
    def save(self, adapters: Path, out: Path, unet: dict[str, Tensor], metadata: dict[str, Any] | None) -> Path:
        StableDiffusionPipeline.save_lora_weights(
            out,
            unet_lora_layers=unet,
            text_encoder_lora_layers=convert_state_dict_to_diffusers(state_of(adapters, "text_encoder")),
            unet_lora_adapter_metadata=metadata,
        )
        return out / "pytorch_lora_weights.safetensors"

    def test_names_of_peft_with_metadata(self, diffusion: Path, adapters: Path, tmp_path: Path) -> None:
        config = json.loads((adapters / "unet" / "adapter_config.json").read_text())
        file = self.save(adapters, tmp_path / "tuned", state_of(adapters, "unet"), config)
        base = open_checkpoint(diffusion)
        lora = open_lora(tmp_path / "tuned", base)
        check(lora, base, fuse(diffusion, file) | merged_text_encoder(adapters))
        assert lora.name == "tuned"
        assert len(lora.names) == len(load_file(file)) // 2
        assert lora.read("unet/conv_in.weight").alpha == 5
        assert open_lora(file, base).layers == lora.layers

    def test_what_its_training_scripts_save(self, diffusion: Path, adapters: Path, tmp_path: Path) -> None:
        """Attention layers as `lora.down`, without a word on alpha."""
        unet = {name: tensor for name, tensor in state_of(adapters, "unet").items() if ".to_" in name}
        file = self.save(adapters, tmp_path / "tuned", convert_state_dict_to_diffusers(unet), None)
        base = open_checkpoint(diffusion)
        lora = open_lora(file, base)
        check(lora, base, fuse(diffusion, file) | merged_text_encoder(adapters))
        assert len(lora.names) == len(load_file(file)) // 2
        assert all(lora.read(name).alpha == lora.read(name).rank for name in lora.names)

    def test_names_of_its_first_versions(self, diffusion: Path, adapters: Path, tmp_path: Path) -> None:
        """Attention processors of the U-Net alone: without a component, `to_q_lora.down`, no alpha."""
        state = {
            name.replace(".to_q.lora_A", ".processor.to_q_lora.down")
            .replace(".to_q.lora_B", ".processor.to_q_lora.up")
            .replace(".to_out.0.lora_A", ".processor.to_out_lora.down")
            .replace(".to_out.0.lora_B", ".processor.to_out_lora.up"): tensor
            for name, tensor in state_of(adapters, "unet").items()
            if ".to_q." in name or ".to_out." in name
        }
        assert all(".processor." in name for name in state)
        save_file(state, tmp_path / "old.safetensors")
        save_file({f"unet.{name}": tensor for name, tensor in state.items()}, tmp_path / "newer.safetensors")
        for base in (open_checkpoint(diffusion), open_checkpoint(diffusion / "unet")):
            lora = open_lora(tmp_path / "old.safetensors", base)
            prefix = "unet/" if "unet/conv_in.weight" in base.tensors else ""
            fused = fuse(diffusion, tmp_path / "newer.safetensors")
            check(lora, base, {prefix + name.removeprefix("unet/"): tensor for name, tensor in fused.items()})
            assert len(lora.names) == len(state) // 2

    def test_text_encoder_with_and_without_prefix(self, diffusion: Path, adapters: Path, tmp_path: Path) -> None:
        """Older transformers have `text_model.` in front of every module, and old diffusers wrote `to_q_lora`."""
        state = {
            f"text_encoder.text_model.{name}".replace("q_proj.lora_A", "to_q_lora.down").replace(
                "q_proj.lora_B", "to_q_lora.up"
            ): tensor
            for name, tensor in state_of(adapters, "text_encoder").items()
        }
        save_file(state, tmp_path / "text.safetensors")
        base = open_checkpoint(diffusion)
        check(open_lora(tmp_path / "text.safetensors", base), base, merged_text_encoder(adapters))


class TestKohya:
    @pytest.fixture
    def file(self, adapters: Path, tmp_path: Path) -> Path:
        state = {f"unet.{name}": tensor for name, tensor in state_of(adapters, "unet").items()}
        state |= {f"text_encoder.{name}": tensor for name, tensor in state_of(adapters, "text_encoder").items()}
        kohya = convert_state_dict_to_kohya(state)
        kohya |= {name: torch.tensor(2.0) for name in kohya if name.endswith(".alpha")}
        save_file(kohya, tmp_path / "style.safetensors")
        return tmp_path / "style.safetensors"

    def test_equals_what_diffusers_fuses(self, diffusion: Path, adapters: Path, file: Path) -> None:
        base = open_checkpoint(diffusion)
        lora = open_lora(file, base)
        assert lora.name == "style"
        assert len(lora.names) == len(load_file(file)) // 3
        assert lora.read("unet/down_blocks.0.resnets.0.conv1.weight").A.shape == (2, 4, 3, 3)
        check(lora, base, fuse(diffusion, file) | merged_text_encoder(adapters))

    def test_each_layer_has_its_own_alpha(self, diffusion: Path, file: Path) -> None:
        """Diffusers reads but one alpha for all attention layers, so there is nothing to compare with."""
        tensors = load_file(file)
        tensors["lora_unet_conv_in.alpha"] = torch.tensor(0.5, dtype=torch.float16)
        tensors["lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.alpha"] = torch.tensor([7.0])
        save_file(tensors, file)
        lora = open_lora(file, open_checkpoint(diffusion))
        assert lora.read("unet/conv_in.weight").alpha == 0.5
        assert lora.read("unet/mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight").alpha == 7
        assert lora.read("unet/mid_block.attentions.0.transformer_blocks.0.attn1.to_k.weight").alpha == 2

    def test_merged_on_the_fly(self, diffusion: Path, file: Path, tmp_path: Path) -> None:
        (tmp_path / "hub").mkdir()
        shutil.copy(file, tmp_path / "hub")
        merged = open_checkpoint(f"{diffusion}+{tmp_path / 'hub'}")
        assert isinstance(merged, MergedCheckpoint)
        expected = fuse(diffusion, file)
        assert all(merged.read(name).equal(tensor) for name, tensor in expected.items())
        assert "+hub/style.safetensors" in merged.hashes()
        assert open_checkpoint(f"{diffusion}+{file}").paths == (diffusion, file)

    def test_no_alpha_at_all_means_the_rank(self, diffusion: Path, file: Path) -> None:
        save_file({name: tensor for name, tensor in load_file(file).items() if ".alpha" not in name}, file)
        lora = open_lora(file, open_checkpoint(diffusion))
        assert all(lora.read(name).alpha == lora.read(name).rank for name in lora.names)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t.pop("lora_unet_conv_in.alpha"), r"no alpha for module 'unet/conv_in'; other modules have one"),
            (lambda t: t.update({"lora_unet_conv_in.alpha": torch.ones(2)}), r"conv_in\.alpha' in .* shape \(2,\)"),
            (
                lambda t: t.update({"lora_unet_x.alpha": torch.ones(())}),
                r"LoRA; found tensor '.*_x\.alpha",
            ),
            (
                lambda t: t.pop("lora_unet_conv_in.lora_up.weight"),
                r"incomplete; module 'lora_unet_conv_in' has lora_down\.weight and no lora_up\.weight",
            ),
            (
                lambda t: t.update({"lora_unet_conv_in.dora_scale": torch.ones(4)}),
                r"more than plain LoRA; found tensor '.*dora_scale'; merge style\.safetensors with diffusers",
            ),
            (lambda t: t.update({"lora_unet_conv_in.hada_w1_a": torch.ones(4)}), "found tensor '.*hada_w1_a'"),
            (
                lambda t: t.update({"lora_unet_conv_in.lora_up.weight": torch.ones(4, 2, 1, 1)}),
                r"module 'unet/conv_in' in .* A has shape \(3, 4, 3, 3\) and B \(4, 2, 1, 1\)",
            ),
            (
                lambda t: t.update(
                    {
                        "lora_unet_conv_in.lora_up.weight": torch.ones(4, 0, 1, 1),
                        "lora_unet_conv_in.lora_down.weight": torch.ones(0, 4, 3, 3),
                    }
                ),
                r"with r of at least 1",
            ),
            (
                lambda t: t.update({"lora_unet_conv_in.lora_up.weight": torch.ones(9, 3, 1, 1)}),
                r"does not fit tensor 'unet/conv_in\.weight' in .*shape \(9, 4, 3, 3\), the weight \(4, 4, 3, 3\)",
            ),
            (
                lambda t: t.update(
                    {
                        "lora_unet_mid_block_attentions_7_proj_in.lora_up.weight": torch.ones(8, 1, 1, 1),
                        "lora_unet_mid_block_attentions_7_proj_in.lora_down.weight": torch.ones(1, 8, 1, 1),
                        "lora_unet_mid_block_attentions_7_proj_in.alpha": torch.ones(()),
                    }
                ),
                r"cannot place module 'unet/mid_block\.attentions\.7\.proj_in' of adapter .*style\.safetensors",
            ),
        ],
    )
    def test_files_that_cannot_be_used(
        self, diffusion: Path, file: Path, change: Callable[[dict[str, Tensor]], Any], message: str
    ) -> None:
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        with pytest.raises(InputError, match=message):
            open_lora(file, open_checkpoint(diffusion))


class TestRefused:
    def test_another_base(self, adapters: Path, bert_dir: Path) -> None:
        with pytest.raises(InputError, match=r"cannot place module 'conv_in' .* no tensor fits; use the base model"):
            open_lora(adapters / "unet", open_checkpoint(bert_dir))

    def test_no_lora(self, bert_dir: Path, tmp_path: Path) -> None:
        base = open_checkpoint(bert_dir)
        with pytest.raises(InputError, match=r"model\.safetensors is no LoRA; found no lora_A and lora_B at all"):
            open_lora(bert_dir, base)
        with pytest.raises(InputError, match="is not an adapter; expected adapter_model"):
            open_lora(tmp_path, base)
        with pytest.raises(InputError, match="no such model"):
            open_lora(tmp_path / "nowhere", base)

    @pytest.mark.parametrize("setting", [{"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "pissa"}])
    def test_more_than_lora(self, adapters: Path, diffusion: Path, tmp_path: Path, setting: dict[str, Any]) -> None:
        """PEFT's configuration says it, or the one that diffusers has in the file's metadata."""
        base = open_checkpoint(diffusion)
        config = json.loads((adapters / "unet" / "adapter_config.json").read_text()) | setting
        shutil.copytree(adapters / "unet", tmp_path / "peft")
        (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
        metadata = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in config.items()})}
        state = {f"unet.{name}": tensor for name, tensor in state_of(adapters, "unet").items()}
        save_file(state, tmp_path / "diffusers.safetensors", metadata)
        (key,) = setting
        for adapter in (tmp_path / "peft", tmp_path / "diffusers.safetensors"):
            with pytest.raises(InputError, match=f"more than plain LoRA; it has {key}="):
                open_lora(adapter, base)

    @pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[1]", "malformed metadata; expected a")])
    def test_broken_metadata(self, adapters: Path, diffusion: Path, tmp_path: Path, text: str, message: str) -> None:
        save_file(state_of(adapters, "unet"), tmp_path / "broken.safetensors", {"lora_adapter_metadata": text})
        with pytest.raises(InputError, match=message):
            open_lora(tmp_path / "broken.safetensors", open_checkpoint(diffusion))

    def test_two_names_of_one_factor(self, adapters: Path, diffusion: Path, tmp_path: Path) -> None:
        state = {f"unet.{name}": tensor for name, tensor in state_of(adapters, "unet").items()}
        state["unet.conv_in.lora.down.weight"] = state["unet.conv_in.lora_A.weight"].clone()
        save_file(state, tmp_path / "twice.safetensors")
        with pytest.raises(InputError, match=r"two tensors have the part of 'unet\.conv_in\.lora"):
            open_lora(tmp_path / "twice.safetensors", open_checkpoint(diffusion))

    def test_diffusers_is_missing(
        self, adapters: Path, diffusion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save_file(state_of(adapters, "unet"), tmp_path / "some.safetensors")
        monkeypatch.setitem(sys.modules, "diffusers.loaders.lora_pipeline", None)
        with pytest.raises(DetuneError, match=r"is not installed; pip install 'detune\[bench\]'"):
            open_lora(tmp_path / "some.safetensors", open_checkpoint(diffusion))
        open_lora(adapters / "unet", open_checkpoint(diffusion))

    def test_quantised_base(self, adapters: Path, diffusion: Path, tmp_path: Path) -> None:
        base = open_checkpoint(diffusion / "unet")
        state = {name: torch.zeros(info.shape, dtype=torch.int8) for name, info in base.tensors.items()}
        save_file(state, tmp_path / "quantised.safetensors")
        with pytest.raises(InputError, match=r"tensor 'conv_in\.weight' .* has no scale; it is stored as int8"):
            open_lora(adapters / "unet", open_checkpoint(tmp_path / "quantised.safetensors"))
