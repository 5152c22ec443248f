"""Grow the certificate's calibration from a corpus: Mondrian conformal bins, chosen by a regression tree.

Each bin of a gravest doubt has a tree, which is one leaf where its problems are few. A split is the one, of all
covariates and some quantiles of each, that lowers the interval score of the two halves' ranges most (Gneiting & Raftery
2007, doi 10.1198/016214506000001437):

    width + 2 / a (low - y)+ + 2 / a (y - high)+,    y = log10(true / predicted),  a = MISSED.

A leaf's range is that between the conformal quantiles of its problems: of n numbers the one in place `a (n + 1) / 2`
from either end (Vovk, Gammerman & Shafer 2005), and between two places what lies between their numbers. Exact answers
have y = -inf. A range that begins there misses on one side alone: its upper end is in place `a (n + 1)`.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from corpus import Outcome
from numpy.typing import NDArray

from detune.certificate.verdict import BAND

Floats = NDArray[np.float64]
# Ranges are to miss one problem in twenty, half of these at either end (definition).
MISSED = 0.05
# From 39 problems in a bin on, its extremes are a range that misses one in twenty (derived: 2 / MISSED - 1). Of fewer
# they miss more, and no split makes such bins; a quarter more, as bins are chosen by the numbers that fill them.
FEWEST = 49
CANDIDATES = 8
# A split must lower the score by a twentieth: less is chance.
GAIN = 0.05
# What an exact answer counts as in scores: three orders below the prediction.
EXACT = -3.0


def calibration(found: Sequence[Outcome]) -> dict[str, Any]:
    """The content of `calibration.json`."""
    result: dict[str, Any] = {}
    for basis in sorted({o.basis for o in found if o.basis is not None}):
        rows = [o for o in found if o.basis == basis]
        names = list(rows[0].covariates)
        X, y = np.array([[o.covariates[name] for name in names] for o in rows]), np.array([o.ratio for o in rows])
        tree = _tree(X, y, names)
        used = _covariates_of(tree)
        seen = {name: [float(X[:, k].min()), float(X[:, k].max())] for k, name in enumerate(names) if name in used}
        result[basis] = {"problems": len(rows), "seen": seen, "tree": tree}
    return result


def _covariates_of(tree: dict[str, Any]) -> set[str]:
    """Those that some split of a tree asks for."""
    if "covariate" not in tree:
        return set()
    return {tree["covariate"]} | _covariates_of(tree["below"]) | _covariates_of(tree["above"])


def _tree(X: Floats, y: Floats, names: Sequence[str]) -> dict[str, Any]:
    """The tree below one node."""
    best, before = None, _score(y)
    for k, name in enumerate(names):
        for at in np.unique(np.round(np.quantile(X[:, k], np.arange(1, CANDIDATES) / CANDIDATES), 3)):
            below = X[:, k] < at
            if min(below.sum(), len(y) - below.sum()) < FEWEST:
                continue
            score = _score(y[below]) + _score(y[~below])
            if score < (1 - GAIN) * before and (best is None or score < best[0]):
                best = score, name, float(at), below
    if best is None:
        low, high = _ends(y)
        ends = [math.floor(1000 * low) / 1000 if math.isfinite(low) else None, _finite(float(np.median(y)))]
        # Where all were exact the prediction itself is the upper end: one wrong entry.
        return {"problems": len(y), "log10": [*ends, math.ceil(1000 * max(high, 0.0)) / 1000]}
    _, name, at, below = best
    return {
        "covariate": name,
        "at": at,
        "below": _tree(X[below], y[below], names),
        "above": _tree(X[~below], y[~below], names),
    }


def _finite(value: float) -> float | None:
    return round(value, 3) if math.isfinite(value) else None


def _ends(y: Floats) -> tuple[float, float]:
    """The range of a bin."""
    low = _quantile(y, MISSED / 2)
    return low, -_quantile(-y, MISSED / 2 if math.isfinite(low) else MISSED)


def _quantile(y: Floats, share: float) -> float:
    """The number in place `share (n + 1)`, or the smallest; between places what lies between their finite numbers."""
    place, ordered = max(1.0, share * (len(y) + 1)), np.sort(y)
    below, above = ordered[math.floor(place) - 1], ordered[min(math.ceil(place), len(y)) - 1]
    between = math.isfinite(below) and math.isfinite(above)
    return float(below + place % 1 * (above - below)) if between else float(below)


def _score(y: Floats) -> float:
    """The interval score of a bin, summed over its problems."""
    y = np.maximum(y, EXACT)
    (low, high), middle = _ends(y), float(np.median(y))
    low, high = min(low, middle - BAND), max(high, middle + BAND)
    outside = np.maximum(low - y, 0).sum() + np.maximum(y - high, 0).sum()
    return float(len(y) * (high - low) + 2 / MISSED * outside)
