"""The rows of the table of defences: each defence with the attacks that it meets.

A defence counts only against the attack that knows it. So every defence meets the attacks that know none and those that
know one like it, and the best of them decides.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from detune.defences import (
    Bf16,
    Defence,
    Dither,
    Fp8,
    Fp16,
    Int8,
    Invertible,
    LoREnc,
    Nf4,
    Noise,
    Padding,
    Permutation,
    QuietNoise,
    Rearrangement,
    Rescaling,
    Rotation,
)

__all__ = ["MODELS", "Row", "rows_of"]

MODELS = 5
"""Releases, where a row does not say otherwise."""

_NOISE = ("average", "recover", "denoise")
_QUANTISED = (*_NOISE, "cells")
_ANISOTROPIC = (*_NOISE, "whiten")
_GRID = ("average", "recover", "denoise", "snap")
_SYMMETRIC = ("average", "recover", "align")


@dataclass(frozen=True)
class Row:
    """A defence as it is tried.

    Attributes:
        name: What the table calls it.
        attacks: Keys of `ATTACKS`.
        defence: What is done to each release; None does nothing.
        family: Of which fine-tunes; frozen A and a base on a grid have their own.
        models: Number of releases.
        public: What is done to the base, which then everybody has beside the releases; None publishes none.
    """

    name: str
    attacks: tuple[str, ...]
    defence: Defence | None = None
    family: str = "ordinary"
    models: int = MODELS
    public: Defence | None = None

    @property
    def file_name(self) -> str:
        """The name of its file."""
        return f"{self.name.replace(', ', '-').replace(' ', '-').replace('%', '')}.json"

    @property
    def settings(self) -> str:
        """The defence with its settings; where texts and a base lie on this machine is nobody's concern."""
        text = repr(self.defence) if self.defence else "nothing"
        for place in vars(self.defence).values() if self.defence else ():
            if isinstance(place, Path):
                text = text.replace(repr(place), repr(place.name))
        return text


def rows_of(families: Collection[str], base: Path, texts: Path, models: int = MODELS) -> tuple[Row, ...]:
    """The rows that some families allow.

    Args:
        families: Their names; "ordinary" or "given" is needed.
        base: Their base, for the defences that look at it.
        texts: A file with texts for the defences that look at activations.
        models: Number of releases.
    """
    plain = "given" if "given" in families else "ordinary"
    rows = [
        Row("none", ("average", "recover", "denoise"), None, plain, models),
        Row("release one", ("average",), None, plain, 1),
        Row("release two", ("average", "lattice"), None, plain, 2),
        Row("bf16", _NOISE, Bf16(), plain, models),
        Row("fp16", _NOISE, Fp16(), plain, models),
        Row("int8", _QUANTISED, Int8(), plain, models),
        Row("nf4", _QUANTISED, Nf4(), plain, models),
        Row("fp8", (*_NOISE, "known-dither"), Fp8(), plain, models),
        *(Row(f"noise {size:.1%}", _NOISE, Noise(size), plain, models) for size in (0.001, 0.01, 0.1)),
        Row("quiet noise 10.0%", _ANISOTROPIC, QuietNoise(texts, 0.1), plain, models),
        Row("padding 3.0%", _ANISOTROPIC, Padding(texts, 0.03), plain, models),
        Row("permutation", _SYMMETRIC, Permutation(), plain, models),
        Row("rotation", _SYMMETRIC, Rotation(), plain, models),
        Row("rescaling", _SYMMETRIC, Rescaling(), plain, models),
        Row("rearrangement", _SYMMETRIC, Rearrangement(), plain, models),
        Row("invertible", _SYMMETRIC, Invertible(), plain, models),
        Row("LoREnc, no adapter", ("average", "recover"), LoREnc(base), plain, models, LoREnc(base)),
        Row("LoREnc, one adapter", ("average", "complete"), LoREnc(base, adapter=True), plain, 1, LoREnc(base)),
    ]
    if "frozen-a" in families:
        rows.append(Row("frozen A", ("average", "recover", "prior"), None, "frozen-a", models))
    if "bf16-base" in families:
        rows.append(Row("none, bf16 base", _GRID, None, "bf16-base", models))
        rows.append(Row("release one, bf16 base", ("average", "lattice"), None, "bf16-base", 1))
        rows.append(Row("dither, bf16 base", _GRID, Dither(), "bf16-base", models))
        rows.append(Row("release one, dither, bf16 base", ("average", "lattice"), Dither(), "bf16-base", 1))
    return tuple(rows)
