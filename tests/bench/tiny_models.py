"""Tiny random models of each kind that the benchmark knows, saved as `from_pretrained` reads them."""

from pathlib import Path

from detune._runtime import global_seed, quiet

LAYERS = 3
"""Blocks of the encoders."""


def save_vit(out: Path) -> None:
    """A classifier of images, in float64, so that weights can be changed by less than a step of float32."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=16,
        patch_size=8,
    )
    with global_seed(0), quiet():
        ViTForImageClassification(config).double().save_pretrained(out)
        ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(out)


def save_bert(out: Path, words: list[str]) -> None:
    """An encoder of text, in float64."""
    from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

    vocabulary = {token: number for number, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=160,
    )
    with global_seed(0), quiet():
        BertForMaskedLM(config).double().save_pretrained(out)
        BertTokenizerFast(vocab=vocabulary).save_pretrained(out)


def save_llama(out: Path, words: list[str]) -> None:
    """A causal language model."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate(["<unk>", "</s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        initializer_range=0.5,  # so that what it writes depends on the prompt
        eos_token_id=1,
        bos_token_id=None,
    )
    with global_seed(0), quiet():
        LlamaForCausalLM(config).save_pretrained(out)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(out)


def save_diffusion(out: Path, words: list[str]) -> None:
    """Stable Diffusion."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = sorted(set("".join(words)))
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    with global_seed(0), quiet("diffusers"):
        tokenizer = CLIPTokenizer(vocab=dict(zip(tokens, range(99), strict=False)), merges=[], model_max_length=16)
        text = CLIPTextConfig(
            vocab_size=len(tokens),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=16,
            bos_token_id=len(tokens) - 2,
            eos_token_id=len(tokens) - 1,
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16,),
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=16,
            attention_head_dim=2,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=4,
        )
        StableDiffusionPipeline(
            vae=vae,
            text_encoder=CLIPTextModel(text),
            tokenizer=tokenizer,
            unet=unet,
            scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(out)
