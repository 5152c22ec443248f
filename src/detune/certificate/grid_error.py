"""The error to expect of an answer on the base's grid, what says how good that prediction is, and its doubts."""

import math
from itertools import combinations
from statistics import fmean

import torch

from detune.certificate.calibration import Assessment, log_ratio
from detune.fitting.normal_operator import NormalOperator
from detune.identifiability.error_traces import error_traces
from detune.identifiability.null_space import basis_error_variances, undetermined
from detune.lattice import is_coarse
from detune.numerics.float_grid import COARSE, name_of, spacing
from detune.problem.low_rank import SVDFactors
from detune.problem.recovery import DecodedBits, Recovery
from detune.problem.stack import Stack
from detune.problem.storage_noise import FLOOR_RATIO

# Where chance alone brings the error within a factor of two of its median in less than 95 % of draws, a few entries
# decide (definition of a doubt).
FORESEEABLE = 0.95
# A grid shows where a base off it would look so less than once in 10^9 matrices (definition; as in `LatticeSearch`).
SHOWN = -9.0
# Spaces are close to each other where least squares amplifies noise by an eighth or more (definition of a doubt).
CLOSE_SPACES = 1.125
# Fewer certain entries than 95 % leave the error to how far the others can be trusted (definition of a doubt).
MOSTLY_CERTAIN = 0.95
# From this amplification on a fit that least squares began has errors that it does not know of, many entries alike, and
# so has one that began with the grid alone in a matrix of fewer entries: 3,290 of 0.9 million entries called certain
# were wrong there, 17 of 4.0 million in larger ones (measured: `benchmarks/corpus.py`, its parts fit and check).
MOST_AMPLIFIED, FEW_ENTRIES = 1.5, 1 << 16
# Where models as coarse as the base leave a third of the entries open, adapters of many directions can explain a base
# that is on no grid, and a delta that hardly shows goes unseen: below a half 12,052 of 2.7 million entries called
# certain were wrong, from there on 22 of 15 million (measured: there) and 457 of 2.0 million of a language model with
# adapters of rank 64, above 6 of 140 million.
LEAST_CERTAIN = 2 / 3
# In matrices below this a wrong fit of the adapters shows in too few entries: 60 of 0.2 million entries called certain
# were wrong (measured: there).
FEWEST_ENTRIES = 1 << 13
# The share of two light models' distance by which an answer is off that knows no direction of one: up to 0.05 in a
# language model of which preferences changed one entry in a hundred, where the entrywise median is as good (measured
# once).
CHANGED_ALIKE = 0.1


def assess_bits(stack: Stack, recovery: Recovery) -> Assessment:
    """Assess an answer of which some entries are not certain.

    Args:
        stack: The models.
        recovery: The answer, on a grid.
    """
    bits = recovery.bits
    assert bits is not None
    # Where no wrong entry is to be expected, what one by a step would make, of those that may be wrong.
    may_be_wrong = torch.ones_like(bits.certain) if bool(bits.certain.all()) else bits.certain.logical_not()
    step = spacing(recovery.weight.double(), bits.grid).square()
    one = float(step[may_be_wrong].mean()) / step.numel()
    expected = bits.expected
    mse = expected.mse or one
    amplified = amplification(stack, recovery)
    size = math.sqrt(max((M_i.energy for M_i in recovery.deltas), default=0.0) / step.numel())
    open_entries = int(may_be_wrong.count_nonzero())
    covariates = {
        "wrong entries": log_ratio(mse / one),
        "open share": log_ratio(open_entries / step.numel()),
        "foreseeable": bits.foreseeable,
        "chance above": log_ratio(expected.most / mse),
        "chance below": log_ratio(mse / expected.least) if expected.least else 12.0,
        "amplification": log_ratio(amplified),
        "deltas": log_ratio(size / math.sqrt(float(step.mean()))),
        "noise ratio": log_ratio(recovery.noise_ratio or 0.0),
        "finer models": math.log2(torch.finfo(bits.grid).eps / _finest(stack)),
    }
    believed = are_certain(stack, recovery, amplified)
    unseen = stack.n > 2 and 0 in recovery.ranks and is_coarse(stack)
    certain = bits.share if believed else 0.0
    share = f"{100 * certain:.4g} % of the entries are certain" if certain else "no entry is certain"
    left, explained = float(recovery.noise_ratio or 0.0), _explains(recovery)
    table = (
        (
            not explained,
            f"{left:.2g} times the storage noise is left: the adapters' fit does not explain the data",
        ),
        (
            bits.foreseeable < FORESEEABLE,
            "which of the others with long steps are wrong is chance, so the error is known to a factor",
        ),
        (
            math.isinf(amplified),
            "but for the grid, nothing tells the weight from the adapters: errors that many entries share do not show "
            "in each",
        ),
        (
            CLOSE_SPACES < amplified < math.inf,
            f"the adapters' spaces are close to each other, which amplifies noise {amplified:.2g} times: errors that "
            "many entries share do not show in each",
        ),
        (unseen, "no direction of some model shows: entries that it and another changed alike are wrong"),
        (certain < MOSTLY_CERTAIN, "how far the others can be trusted is known to a factor"),
    )
    return Assessment(
        _basis(amplified > MOST_AMPLIFIED, _are_finer(stack, recovery), bool(expected.mse)),
        mse,
        covariates,
        tuple(why for holds, why in table if holds),
        explained,
        f"{share} {on_grid(bits)}",
        certain=believed,
        hidden_mse=CHANGED_ALIKE * fmean(stack.distance(i, j) for i, j in combinations(range(stack.n), 2))
        if unseen
        else 0.0,
    )


def on_grid(bits: DecodedBits) -> str:
    """On which grid the base is, and whether that shows or is assumed."""
    name, power = name_of(bits.grid), math.ceil(bits.log10_false_positive)
    if bits.log10_false_positive > SHOWN:
        return f"on the {name} grid of the models, which the base is taken to be on"
    return f"on the base's {name} grid; off that grid with a probability below 1e{power}"


def is_exact(stack: Stack, recovery: Recovery) -> bool:
    """Whether every entry is certain, and can be.

    Models that are stored as coarsely as the base do not show a direction that all adapters' spaces share: entries that
    agree with one another may be wrong together there. Measured: 11 wrong of 2,351 entries called certain in two such
    matrices of the corpus, 1 of 10.8 million in all others (`benchmarks/corpus.py`).
    """
    bits = recovery.bits
    if bits is None or not bool(bits.certain.all()) or bits.log10_false_positive > SHOWN:
        return False
    if not _explains(recovery) or _is_of_two(stack, recovery):
        return False
    return _are_finer(stack, recovery) or amplification(stack, recovery) <= MOST_AMPLIFIED


def are_certain(stack: Stack, recovery: Recovery, amplified: float) -> bool:
    """Whether the entries that a fit on a grid calls certain are to be taken for it.

    Not if the grid is assumed, nor if the fit leaves more than the models' rounding, nor where models as coarse as the
    base are copies of two. Not of such models if a third of the entries is open, if the matrix is small, or if the fit
    began with a least-squares answer that is one of many, or nearly so: then entries are wrong together. So they are
    where the fit finds no direction of a model that did not leave the matrix alone. And not of
    one model, unless next to all its entries are certain: a delta that is off by whole steps in some rows and columns
    explains that model as well (11 wrong of 0.1 million entries called certain in `benchmarks/corpus.py`).

    Args:
        stack: The models.
        recovery: The answer, on a grid.
        amplified: As by `amplification`.
    """
    bits = recovery.bits
    assert bits is not None
    if bits.log10_false_positive > SHOWN or not _explains(recovery) or _is_of_two(stack, recovery):
        return False
    if stack.n == 1:
        return bits.share >= MOSTLY_CERTAIN
    if _are_finer(stack, recovery):
        return True
    entries = recovery.weight.numel()
    if bits.share < LEAST_CERTAIN:
        return False
    if amplified <= MOST_AMPLIFIED:
        return entries >= FEWEST_ENTRIES
    return entries >= FEW_ENTRIES and all(recovery.ranks) and not bits.from_least_squares


def _explains(recovery: Recovery) -> bool:
    """Whether the fit leaves no more than the storage noise."""
    return float(recovery.noise_ratio or 0.0) <= FLOOR_RATIO


def _is_of_two(stack: Stack, recovery: Recovery) -> bool:
    """Whether models as coarse as the base are copies of two: either may be the base's."""
    return stack.n > 2 and len(stack.versions) == 2 and not _are_finer(stack, recovery)


def _are_finer(stack: Stack, recovery: Recovery) -> bool:
    """Whether some model is stored far more finely than the base."""
    assert recovery.bits is not None
    return torch.finfo(recovery.bits.grid).eps > COARSE * _finest(stack)


def _finest(stack: Stack) -> float:
    return min(torch.finfo(dtype).eps for dtype in stack.rounded_dtypes)


def _basis(alike: bool, finer: bool, expected: bool) -> str:
    """The bin of the calibration: by the gravest doubt, and by what the models tell of an entry."""
    if alike:
        return "grid, adapters alike"
    if finer:
        return "grid, finer models" if expected else "grid, no wrong entry expected"
    return "grid"


def amplification(stack: Stack, recovery: Recovery) -> float:
    """Root of the error of least squares over that of an average; infinite where it has no answer.

    So it is for one or two models, and where spaces coincide as far as their own errors let tell.
    """
    if stack.n < 3:
        return math.inf
    spaces = [SVDFactors.of(M_i, stack.factor_dtype) for M_i in recovery.deltas]
    operator = NormalOperator.of([space.U for space in spaces], [space.V for space in spaces])
    if undetermined(operator, *basis_error_variances(stack, spaces)):
        return math.inf
    variances = stack.noise.square().to(operator.Q.device)
    error = float((variances * error_traces(operator).weight).sum()) / recovery.weight.numel()
    return math.sqrt(error * stack.n**2 / float(variances.sum()))
