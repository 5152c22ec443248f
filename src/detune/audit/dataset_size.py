"""The size of the training set of a LoRA, told by its norm and spectrum: DSiRe.

Fewer examples are seen more often in as many steps, and leave another spectrum in `M_i`. Who has LoRAs that were
trained in the same way, and knows on how many examples each, reads the size of another's training set off its singular
values: one nearest neighbour for each layer, and a vote of the layers.

Reference: Salama, Kahana, Horwitz & Hoshen, "Dataset Size Recovery from LoRA Weights", 2024 (arXiv 2406.19395). Read:
abstract, project page, data card, and a summary of the method by others. It predicts one of the known sizes, as here.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, log
from statistics import fmean

import torch
from torch import Tensor

from detune.errors import InputError

__all__ = ["Reference", "SizeEstimate", "estimate_size", "held_out_errors", "spectrum_of"]


@dataclass(frozen=True)
class Reference:
    """A LoRA whose training is known.

    Attributes:
        spectra: Singular values of its change of each layer, descending, by the layer's name.
        examples: The number of examples that it was trained on.
        group: Its task, or its customer. References of one group are left out together when errors are measured,
            because the next LoRA is of none of them.
    """

    spectra: Mapping[str, Tensor]
    examples: int
    group: str


@dataclass(frozen=True)
class SizeEstimate:
    """The number of examples that a LoRA was trained on.

    Attributes:
        examples: The size that most layers vote for.
        low: Lower end of where the truth lies in nine cases of ten, by references that were held out.
        high: Upper end.
        votes: Share of the layers that agree.
        layers: Number of layers that could vote.
    """

    examples: int
    low: float
    high: float
    votes: float
    layers: int


def spectrum_of(A: Tensor, B: Tensor, scaling: float = 1.0) -> Tensor:
    """Singular values of `scaling B A`, descending, float64, from the factors `(r, in)` and `(out, r)`."""
    left, right = torch.linalg.qr(B.double()).R, torch.linalg.qr(A.double().mT).R
    values: Tensor = torch.linalg.svdvals(left @ right.mT) * abs(scaling)
    return values


def estimate_size(spectra: Mapping[str, Tensor], references: Sequence[Reference]) -> SizeEstimate:
    """Estimate the size of a training set, with an error bar.

    Args:
        spectra: Spectra of the LoRA in question, as in `Reference`.
        references: LoRAs that were trained in the same way, of at least three groups.

    Returns:
        The estimate. Its range comes from references that were held out group by group, so it holds for LoRAs that were
        trained like them, and says nothing of others.

    Raises:
        InputError: Too few groups, or no layer in common.
    """
    errors = sorted(held_out_errors(references))
    votes = _votes(spectra, references)
    examples = _elected(votes)
    # The k-th smallest and largest of n errors enclose the next one with probability 1 - 2 k / (n + 1).
    k = max(1, int(0.05 * (len(errors) + 1)))
    share = fmean(size == examples for size, _ in votes)
    ends = (examples * exp(-errors[-k]), examples * exp(-errors[k - 1]))
    return SizeEstimate(examples, *ends, share, len(votes))


def held_out_errors(references: Sequence[Reference], *, by_group: bool = True) -> list[float]:
    """Errors of estimates of each reference from the others, `log(estimate / truth)`.

    Args:
        references: As `estimate_size` takes them.
        by_group: Whether a reference's whole group is left out with it; else it is alone, which is too kind.

    Raises:
        InputError: Fewer than three groups.
    """
    groups = {reference.group for reference in references}
    if len(groups) < 3:
        raise InputError(
            f"references of {len(groups)} groups", "expected at least three to measure errors by", "add adapters"
        )
    return [
        log(
            _elected(
                _votes(
                    one.spectra,
                    [r for r in references if (r.group != one.group if by_group else r is not one)],
                )
            )
            / one.examples
        )
        for one in references
    ]


def _votes(spectra: Mapping[str, Tensor], references: Iterable[Reference]) -> list[tuple[int, float]]:
    """For each layer the size of the nearest reference, and how far that is beside the spectrum's own norm."""
    known = list(references)
    votes = []
    for name, values in spectra.items():
        distances = [
            (float(_difference(values, other.spectra[name]).norm()), other.examples)
            for other in known
            if name in other.spectra
        ]
        if distances:
            distance, examples = min(distances)
            votes.append((examples, distance / max(float(values.norm()), 1e-30)))
    if not votes:
        raise InputError(
            "no layer of this adapter is in the references",
            f"got {len(spectra)} layers, first {next(iter(spectra), None)!r}",
            "give adapters of the same model and target modules",
        )
    return votes


def _elected(votes: Sequence[tuple[int, float]]) -> int:
    """The size with most votes; of several, the one whose voters are nearest."""
    counts = Counter(examples for examples, _ in votes)
    most = max(counts.values())
    tied = [examples for examples, count in counts.items() if count == most]
    return min(tied, key=lambda size: fmean(distance for examples, distance in votes if examples == size))


def _difference(one: Tensor, other: Tensor) -> Tensor:
    """The distance of two spectra; the shorter one goes on with zeros."""
    length = max(len(one), len(other))
    padded = [torch.nn.functional.pad(values, (0, length - len(values))) for values in (one, other)]
    return padded[0] - padded[1]
