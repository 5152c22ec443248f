"""BERT, RoBERTa and what is built like them: LayerNorm after each sum, GELU, learned positions."""

from collections.abc import Mapping, Sequence
from typing import Any

from detune.errors import InputError
from detune.symmetries.base import Attention, FeedForward, Layer, prefixes, width_of

__all__ = ["describe"]


def describe(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> tuple[Layer, ...]:
    """The layers; see `find_layers`.

    No norm can be rescaled: its output is what the next sum adds to, not only what linear layers read.
    """
    positions = config.get("position_embedding_type", "absolute")
    if positions != "absolute":
        raise InputError(
            f"queries and keys that know positions of kind {positions!r}", "expected absolute ones", "nothing to try"
        )
    heads, hidden = width_of(config, "num_attention_heads"), width_of(config, "hidden_size")
    return tuple(
        Layer(
            layer,
            Attention(
                f"{layer}.attention.self.query",
                f"{layer}.attention.self.key",
                f"{layer}.attention.self.value",
                f"{layer}.attention.output.dense",
                heads,
                heads,
                hidden // heads,
            ),
            FeedForward(f"{layer}.intermediate.dense", f"{layer}.output.dense", width_of(config, "intermediate_size")),
        )
        for layer in prefixes(shapes, "encoder.layer", "intermediate.dense.weight")
    )
