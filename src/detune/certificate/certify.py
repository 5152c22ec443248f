"""How far an answer can be trusted, without the truth.

Nothing here believes the solver: misfit and distance to the maximum-likelihood answer are measured on the data. What
must be assumed is said in `Certificate.reason`, and in the section on the certificate of `docs/method.md`.
"""

import math
from dataclasses import replace

import torch

from detune.certificate.error_model import WRONG, ErrorModel, moved_mse
from detune.certificate.jackknife import Solve, disagreement
from detune.certificate.stored_error import rounded_mse
from detune.certificate.structured import certify_structured
from detune.certificate.verdict import Certificate, Verdict
from detune.fitting.normal_operator import NormalOperator
from detune.identifiability.error_traces import error_traces
from detune.identifiability.null_space import basis_error_variances, undetermined
from detune.identifiability.principal_part import lacks_principal_part
from detune.lattice import is_coarse
from detune.methods.mixed_precision import finest_part
from detune.numerics.float_grid import name_of, spacing
from detune.problem.low_rank import SVDFactors
from detune.problem.recovery import PredictedError, Recovery
from detune.problem.solving import Prepared
from detune.problem.stack import Stack
from detune.problem.storage_noise import storage_energy

__all__ = ["Certificate", "Verdict", "certify"]

# Parts of the models disagree by so many times the predicted error (mean square) only if something is wrong.
MOST_DISAGREEMENT = 10.0
# On a base's grid the error must be within a factor of two of the prediction with this probability.
FORESEEABLE = 0.95
# Where least squares amplifies noise by more than this, the errors of the M_i are not independent.
CLOSE_SPACES = 1.12
# More entries can be wrong than each by itself foretells, by no more than this in the problems of
# `benchmarks/certificate.py` and `benchmarks/exact.py` with seeds from 6000 to 6199;
SHARED = 5.0
# Where fewer entries than this share are certain, rows and columns may be off by more than they say (measured on
# the matrices of a language model, `benchmarks/llm.py`);
MOSTLY_CERTAIN = 0.95
# and, as the probabilities of entries are known no better than that, fewer.
BITS_LESS = 0.3
# Where rounding hides the deltas in most entries, the error is down to this share of what noise would leave (measured:
# a hundredth to a three-hundredth in 18 matrices of a language model, light fine-tunes in bf16).
UNCHANGED = 1e-3


def certify(
    stack: Stack, recovery: Recovery, stored: torch.dtype | None = None, check: Solve | None = None
) -> Certificate:
    """Judge an answer by the data it was made from.

    Args:
        stack: The models.
        recovery: What a solver made of them.
        stored: The dtype that the weight will be rounded to; its own by default.
        check: Recovers from a part of the models, to see whether the parts agree; None saves that time.

    Returns:
        The certificate.
    """
    prepared, stored = Prepared.of(stack), stored or recovery.weight.dtype
    unit, as_solved = prepared.as_solved(recovery)
    scale, wild = prepared.scale, prepared.wild
    found = _certify(unit, as_solved.with_plain_errors(), stored, check).times_power_of_two(scale.exponent)
    if scale.fixed_step:
        # Where the answer will be stored, no step is shorter than that of the smallest number.
        step = torch.finfo(stored).tiny * torch.finfo(stored).eps
        reason = "some entries are below the smallest normal number, and what storing makes of them is not known"
        found = found.but(reason, 2 * math.log10(step) - math.log10(12))
    if wild is not None and bool(wild.everywhere.any()):
        reason = "what all models hold far above the typical size is known to its rounding at best"
        found = found.but(reason, wild.log10_unknown - math.log10(recovery.weight.numel()))
    return found


def _certify(stack: Stack, recovery: Recovery, stored: torch.dtype | None, check: Solve | None) -> Certificate:
    """Judge an answer as it was solved."""
    structured = certify_structured(stack, recovery, stored, check, _certify)
    if structured is not None:
        return structured
    if recovery.source_models:
        part, of_part = finest_part(stack, recovery)
        return _certify(part, of_part, stored, check)
    if recovery.method == "unchanged":
        return _of_unchanged(stack, recovery)
    if recovery.bits is not None:
        return _of_bits(stack, recovery)
    if recovery.expected is not None:
        return _of_expected(recovery, recovery.expected, stored or recovery.weight.dtype)
    if not recovery.deltas:
        return Certificate(Verdict.NOT_DETERMINED, "no model of the deltas: how far they are from zero is unknown")
    disagreed = None if check is None else disagreement(stack, check)
    return _of_fit(stack, recovery, stored or recovery.weight.dtype, disagreed)


def _of_unchanged(stack: Stack, recovery: Recovery) -> Certificate:
    """A model's own matrix: right, if it left it alone."""
    sign, hidden = recovery.reason.partition(":")[0], recovery.hidden_mse
    if stack.noise_override:
        mse = float(stack.noise.square().mean())
        reason = f"{sign}, but what quantisation rounded off is lost"
        return Certificate.of_error(Verdict.APPROXIMATE, reason, PredictedError(mse, mse / 2, max(2 * mse, hidden)))
    if hidden:
        reason = f"exact, if {sign} because the matrix was left alone"
        return Certificate.of_error(Verdict.APPROXIMATE, reason, PredictedError(0.0, 0.0, hidden))
    return Certificate(Verdict.EXACT, f"the base's own bits, if {sign} by no accident")


def _of_expected(recovery: Recovery, expected: PredictedError, stored: torch.dtype) -> Certificate:
    """From the fit's own variances: deltas near the noise are held down, and no residual shows by how much too far."""
    added = storage_energy(recovery.weight.to(stored)) / recovery.weight.numel()
    range_ = PredictedError(*(mse + added for mse in (expected.mse, expected.least, expected.most)))
    reason = "deltas are near the models' noise: what they have in common is known to a factor only"
    return Certificate.of_error(Verdict.APPROXIMATE, reason, range_)


def _of_bits(stack: Stack, recovery: Recovery) -> Certificate:
    """The base's grid decides what the ranks leave open."""
    bits = recovery.bits
    assert bits is not None
    name = name_of(bits.grid)
    chance = f"off that grid with a probability below 1e{math.ceil(bits.log10_false_positive)}"
    if bool(bits.certain.all()):
        return Certificate(Verdict.EXACT, f"every entry is certain on the base's {name} grid; {chance}", 0)
    amplified = _amplified(stack, recovery)
    if not bits.share:
        reason = f"the base lies on the {name} grid, {chance}; but no entry is certain"
        return Certificate.of_error(Verdict.APPROXIMATE, reason, _range_of_bits(stack, recovery, amplified))
    reason = f"{100 * bits.share:.4g} % of the entries are certain on the base's {name} grid; {chance}"
    if bits.foreseeable < FORESEEABLE:
        reason += "; which of the others with long steps are wrong is chance, so the error is known to a factor"
    elif amplified > CLOSE_SPACES:
        why = (
            "but for the grid, nothing tells the weight from the adapters"
            if math.isinf(amplified)
            else f"the adapters' spaces are close to each other, which amplifies noise {amplified:.2g} times"
        )
        reason += f"; {why}: errors that many entries share do not show in each"
    elif bits.share < MOSTLY_CERTAIN:
        reason += "; how far the others can be trusted is known to a factor"
    else:
        return Certificate.of_error(Verdict.FLOOR, reason, _range_of_bits(stack, recovery, amplified))
    return Certificate.of_error(Verdict.APPROXIMATE, reason, _range_of_bits(stack, recovery, amplified))


def _range_of_bits(stack: Stack, recovery: Recovery, amplified: float) -> PredictedError:
    """What the number of wrong entries leaves open, and errors that they share."""
    bits, weight = recovery.bits, recovery.weight
    assert bits is not None
    expected = bits.expected
    least, most = BITS_LESS * expected.least, expected.most
    if not most:
        # None should be wrong; then say what one would do.
        most = float(spacing(weight.double(), bits.grid).square().mean()) / weight.numel()
    elif stack.n < 3:
        least, most = 0.0, max(most, WRONG * moved_mse(recovery))
    else:
        most *= SHARED
    return PredictedError(expected.mse, least, most)


def _amplified(stack: Stack, recovery: Recovery) -> float:
    """Root of the error of least squares over that of an average; infinite where it has no answer.

    So it is for one or two models, and where spaces coincide as far as their own errors let tell.
    """
    if stack.n < 3:
        return math.inf
    spaces = _spaces(stack, recovery)
    operator = NormalOperator.of([space.U for space in spaces], [space.V for space in spaces])
    if undetermined(operator, *basis_error_variances(stack, spaces)):
        return math.inf
    variances = stack.noise.square().to(operator.Q.device)
    error = float((variances * error_traces(operator).weight).sum()) / recovery.weight.numel()
    return math.sqrt(error * stack.n**2 / float(variances.sum()))


def _spaces(stack: Stack, recovery: Recovery) -> tuple[SVDFactors, ...]:
    """Of the deltas: half precision does not tell them better than to float32's rounding."""
    return tuple(SVDFactors.of(M_i, stack.factor_dtype) for M_i in recovery.deltas)


def _of_fit(stack: Stack, recovery: Recovery, stored: torch.dtype, disagreed: float | None) -> Certificate:
    """From the operator at the recovered spaces, the misfit and the storage noise."""
    spaces = _spaces(stack, recovery)
    operator = NormalOperator.of([space.U for space in spaces], [space.V for space in spaces])
    null = undetermined(operator, *basis_error_variances(stack, spaces))
    if null:
        reason = f"the data cannot see changes of the weight in a space of dimension {null}"
        return Certificate(Verdict.NOT_DETERMINED, reason, null)
    if lacks_principal_part(recovery):
        reason = (
            "the adapters are nearly the same, and the weight is empty where they are: a part of the base is in them"
        )
        return Certificate(Verdict.NOT_DETERMINED, reason)
    model = ErrorModel.of(stack, recovery, operator, spaces, stored)
    before, disagreed = model.expected, disagreed or 0.0
    if disagreed > before.most:
        before = replace(before, most=disagreed)
    dtypes = [W_i.dtype for W_i in stack.matrices]
    averaged = min(before.mse, model.rounding)
    rounded = rounded_mse(recovery, operator, dtypes, stored, before, averaged, quantised=model.told)
    # Storing takes or adds the same share, whichever way the error was found.
    agreement = rounded.mse * disagreed / before.mse if before.mse else 0.0
    doubts = model.doubts(rounded)
    if disagreed > MOST_DISAGREEMENT * before.mse:
        times = (disagreed / before.mse) ** 0.5
        doubts.append(f"recoveries from parts of the models disagree {times:.2g} times as much as predicted")
    if not stack.noise_override and is_coarse(stack):
        # Where a delta is below half a step the merge has the base's own number: rounding is then no noise at all.
        doubts.insert(0, "deltas are below a step of the models' rounding, which then leaves most entries as they were")
        rounded = replace(rounded, least=rounded.least * UNCHANGED)
    if doubts:
        return Certificate.of_error(Verdict.APPROXIMATE, "; ".join(doubts), rounded, agreement)
    reason = (
        f"the only answer in which no part is common to all adapters; storage noise, {model.amplified:.2g} times "
        "that of an average, is all that is left"
    )
    return Certificate.of_error(Verdict.FLOOR, reason, rounded.mse, agreement)
