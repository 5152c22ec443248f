"""How far true errors were from predicted ones, on problems whose truth is known: the ranges of the certificate.

A point prediction is turned into a range by split-conformal prediction (Vovk, Gammerman & Shafer 2005) in Mondrian bins
(Boström & Johansson 2020). Problems of a corpus are binned by the gravest doubt and, where a bin has problems enough,
by a regression tree over what can be seen without the truth. The range is that between two quantiles of the bin's
log10(true / predicted mean squared error). `benchmarks/certificate.py` fills the bins and writes `calibration.json`.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

FILE = "calibration.json"


@dataclass(frozen=True)
class Assessment:
    """A predicted error before it has a range.

    Attributes:
        basis: What the prediction rests on and the gravest doubt, a key of the calibration.
        mse: Mean squared error per entry to expect of the weight as stored, above zero.
        covariates: What can be seen without the truth and says how good the prediction is.
        doubts: Each reason for which it may be wrong.
        at_floor: Whether storage noise is all that is left, and the answer the best that there is.
        reason: What the answer is, if storage noise is all that is left.
        agreement: The same figure by the disagreement of parts of the models; 0 where that was not looked at.
        certain: As in `Certificate`.
        hidden_mse: What may be wrong beside that and does not show, at most; 0 where nothing is.
    """

    basis: str
    mse: float
    covariates: Mapping[str, float]
    doubts: tuple[str, ...]
    at_floor: bool
    reason: str
    agreement: float = 0.0
    certain: bool = True
    hidden_mse: float = 0.0


@dataclass(frozen=True)
class Band:
    """Quantiles of log10(true / predicted mean squared error) in one bin.

    Attributes:
        low: The lower end; `-inf` where the answer may be exact.
        middle: The median; `-inf` where most answers were exact.
        high: The upper end.
        problems: How many the bin holds.
        seen: Whether the covariates that the bins depend on are within those of the corpus.
    """

    low: float
    middle: float
    high: float
    problems: int
    seen: bool = True


def band(assessment: Assessment) -> Band:
    """Look up the bin of a prediction."""
    calibration = _calibration()[assessment.basis]
    node = calibration["tree"]
    while "covariate" in node:
        node = node["below" if assessment.covariates[node["covariate"]] < node["at"] else "above"]
    low, middle, high = (-math.inf if end is None else float(end) for end in node["log10"])
    seen = all(least <= assessment.covariates[name] <= most for name, (least, most) in calibration["seen"].items())
    return Band(low, middle, high, node["problems"], seen)


def log_ratio(value: float) -> float:
    """A covariate that is a ratio: its log10, within twelve orders."""
    return math.log10(min(max(value, 1e-12), 1e12))


@cache
def _calibration() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(files(__package__).joinpath(FILE).read_text(encoding="utf-8"))
    return found
