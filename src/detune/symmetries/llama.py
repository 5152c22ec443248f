"""Llama and Mistral: RMSNorm before each part, SwiGLU, grouped keys and values, rotary positions."""

from collections.abc import Mapping, Sequence
from typing import Any

from detune.symmetries.base import Attention, FeedForward, Layer, NormInto, prefixes, width_of

__all__ = ["describe"]


def describe(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> tuple[Layer, ...]:
    """The layers; see `find_layers`.

    The last norm is left alone: its output may be the model's.
    """
    heads, hidden = width_of(config, "num_attention_heads"), width_of(config, "hidden_size")
    groups = width_of(config, "num_key_value_heads", "num_attention_heads")
    width = hidden // heads if config.get("head_dim") is None else width_of(config, "head_dim")
    layers = []
    for layer in prefixes(shapes, "layers", "mlp.gate_proj.weight"):
        attention = Attention(
            f"{layer}.self_attn.q_proj",
            f"{layer}.self_attn.k_proj",
            f"{layer}.self_attn.v_proj",
            f"{layer}.self_attn.o_proj",
            heads,
            groups,
            width,
            rotary=True,
        )
        neurons = FeedForward(
            f"{layer}.mlp.up_proj",
            f"{layer}.mlp.down_proj",
            width_of(config, "intermediate_size"),
            gate=f"{layer}.mlp.gate_proj",
        )
        norms = (
            NormInto(f"{layer}.input_layernorm", (attention.query, attention.key, attention.value), hidden),
            NormInto(f"{layer}.post_attention_layernorm", (f"{layer}.mlp.gate_proj", neurons.up), hidden),
        )
        layers.append(Layer(layer, attention, neurons, norms))
    return tuple(layers)
