"""ViT: LayerNorm before each part, GELU, learned positions."""

from collections.abc import Mapping, Sequence
from typing import Any

from detune.symmetries.base import Attention, FeedForward, Layer, NormInto, prefixes, width_of

__all__ = ["describe"]


def describe(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> tuple[Layer, ...]:
    """The layers; see `find_layers`.

    The last norm is left alone: its output may be the model's.
    """
    heads, hidden = width_of(config, "num_attention_heads"), width_of(config, "hidden_size")
    layers = []
    for layer in prefixes(shapes, "encoder.layer", "intermediate.dense.weight"):
        attention = Attention(
            f"{layer}.attention.attention.query",
            f"{layer}.attention.attention.key",
            f"{layer}.attention.attention.value",
            f"{layer}.attention.output.dense",
            heads,
            heads,
            hidden // heads,
        )
        neurons = FeedForward(
            f"{layer}.intermediate.dense", f"{layer}.output.dense", width_of(config, "intermediate_size")
        )
        norms = (
            NormInto(f"{layer}.layernorm_before", (attention.query, attention.key, attention.value), hidden),
            NormInto(f"{layer}.layernorm_after", (neurons.up,), hidden),
        )
        layers.append(Layer(layer, attention, neurons, norms))
    return tuple(layers)
