"""The base's dominant spectrum, taken out of what is public and put into authorised adapters (LoREnc)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from detune.checkpoints import Checkpoint, open_checkpoint
from detune.defences.base import Change, only, option
from detune.defences.linear import generator_of, linear_weights
from detune.errors import InputError
from detune.problem import LowRank

__all__ = ["LoREnc"]


@dataclass(frozen=True)
class LoREnc:
    """Take the largest singular values of the base out of every linear layer; with the adapter they are back.

        public:      W' = W - C,     C = U_k S_k V_k^T, the k largest of W
        authorised:  B' A' = [B, U_k S_k^(1/2)] Q Q^T [A; S_k^(1/2) V_k^T],     W' + B' A' = W + B A

    with an orthogonal Q of `r + k` that hides which part of the factors is which. The product is the same for every Q,
    so merged models are too, but for rounding.

    Here a release is a merged fine-tune: without the adapter `W_i - C`, which somebody has who puts a plain adapter on
    the public base; with it `W_i`.

    Attributes:
        base: The base that C is taken from.
        rank: k, in every linear layer.
        adapter: Whether the release is an authorised user's.

    Reference:
        Ahn et al., "LoREnc: Low-Rank Encryption for Securing Foundation Models and LoRA Adapters", ICIP 2026 (arXiv
        2605.13163). Read: abstract, the beginning of the introduction, and summaries by others, which do not say the
        rank or the layers.
    """

    name: ClassVar[str] = "lorenc"
    about: ClassVar[str] = "take the base's largest singular values out of linear layers; adapters bring them back"
    preserves_function: ClassVar[bool] = False
    draws: ClassVar[bool] = False

    base: Path = field(metadata=option("What IN was fine-tuned from."))
    rank: int = field(default=32, metadata=option("How many singular values, in each layer.", least=1))
    adapter: bool = field(default=False, metadata=option("As an authorised user has it, merged."))

    def prepare(self, model: Checkpoint, seed: int) -> Change:
        """Decompose the base's linear layers; see `Defence.prepare`."""
        linear = linear_weights(model)
        with open_checkpoint(self.base) as base:
            for name in linear:
                if name not in base.tensors or base.tensors[name].shape != model.tensors[name].shape:
                    raise InputError(
                        f"{base.spec} has no tensor {name!r} like that of {model.spec}",
                        f"expected shape {list(model.tensors[name].shape)}",
                        "give the base of the fine-tune",
                    )
            dominant = {name: self._dominant(name, base.read(name)) for name in linear}

        def change(name: str, tensor: Tensor) -> Tensor:
            C = dominant[name]
            public = (tensor.double() - C.dense()).to(tensor.dtype)
            if not self.adapter:
                return public
            drawn = torch.randn(C.rank, C.rank, generator=generator_of(seed, name), dtype=torch.float64)
            Q: Tensor = torch.linalg.qr(drawn)[0]
            B, A = (C.left @ Q).float(), (C.right @ Q).mT.float()
            return (public.float() + B @ A).to(tensor.dtype)

        return only(dominant, change)

    def _dominant(self, name: str, W: Tensor) -> LowRank:
        """C, its factors of equal norm."""
        if not 0 < self.rank < min(W.shape):
            raise InputError(
                f"{self.rank} singular values cannot be taken out of {name!r}",
                f"it is {W.shape[0]}x{W.shape[1]}, expected at least 1 and fewer than its smaller side",
                "give another --rank",
            )
        exact = W.double() if W.shape[0] >= W.shape[1] else W.double().mT
        V = torch.linalg.eigh(exact.mT @ exact)[1][:, -self.rank :]
        left = exact @ V
        root = torch.linalg.vector_norm(left, dim=0).sqrt()
        C = LowRank(left / root, V * root)
        return C if W.shape[0] >= W.shape[1] else C.transposed
