"""How far an answer can be trusted, without the truth.

Nothing here believes the solver: misfit and distance to the maximum-likelihood answer are measured on the data. What
must be assumed is said in `Certificate.reason`, and in the section on the certificate of `docs/method.md`.
"""

import math

import torch

from detune.certificate.calibration import Assessment, band, log_ratio
from detune.certificate.error_model import ErrorModel
from detune.certificate.grid_error import assess_bits, is_exact, on_grid
from detune.certificate.jackknife import Solve, disagreement
from detune.certificate.structured import certify_structured
from detune.certificate.verdict import BAND, Certificate, Verdict
from detune.fitting.normal_operator import NormalOperator
from detune.identifiability.null_space import basis_error_variances, undetermined
from detune.identifiability.principal_part import lacks_principal_part
from detune.numerics.float_grid import name_of
from detune.problem.low_rank import SVDFactors
from detune.problem.recovery import PredictedError, Recovery
from detune.problem.solving import Prepared
from detune.problem.stack import Stack
from detune.problem.storage_noise import storage_energy
from detune.source_models.solve_from import source_part

__all__ = ["Certificate", "Verdict", "assess", "certify"]

# A range of up to 0.8 is that of an answer at the storage floor: a factor of 1.6 in the root mean squared error
# to either side; on a grid, where an answer may be far better than that, no longer than the shortest range, with room
# for rounding (definitions of the verdict).
NARROW, BANDS = 0.8, 2 * BAND + 1e-9
UNSEEN = "the calibration has seen no problem like it"


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
    scale, outliers = prepared.scale, prepared.outliers
    found = _certify(unit, as_solved.with_plain_errors(), stored, check)
    if recovery.bits is not None or recovery.left_alone:
        found = found.rounded(name_of(stored), _lost(as_solved.weight, stored))
    found = found.times_power_of_two(scale.exponent)
    if scale.fixed_step:
        # Where the answer will be stored, no step is shorter than that of the smallest number.
        step = torch.finfo(stored).tiny * torch.finfo(stored).eps
        reason = "some entries are below the smallest normal number, and what storing makes of them is not known"
        found = found.but(reason, 2 * math.log10(step) - math.log10(12))
    if outliers is not None and bool(outliers.everywhere.any()):
        reason = "what all models hold far above the typical size is known to its rounding at best"
        found = found.but(reason, outliers.log10_unknown - math.log10(recovery.weight.numel()))
    return found


def _lost(weight: torch.Tensor, stored: torch.dtype) -> float:
    """Mean squared error that rounding a known weight makes."""
    rounded = weight.to(stored).to(weight.dtype)
    return 0.0 if torch.equal(rounded, weight) else float((weight.double() - rounded.double()).square().mean())


def _certify(stack: Stack, recovery: Recovery, stored: torch.dtype, check: Solve | None) -> Certificate:
    """Judge an answer as it was solved."""
    structured = certify_structured(stack, recovery, stored, check, _certify)
    if structured is not None:
        return structured
    if recovery.source_models:
        part, of_part = source_part(stack, recovery)
        return _certify(part, of_part, stored, check)
    has_model = bool(recovery.deltas) or recovery.expected is not None
    fitted = has_model and recovery.bits is None and not recovery.left_alone
    disagreed = disagreement(stack, check) if check is not None and fitted else None
    found = assess(stack, recovery, stored, disagreed or 0.0)
    return found if isinstance(found, Certificate) else calibrated(found)


def assess(stack: Stack, recovery: Recovery, stored: torch.dtype, disagreed: float = 0.0) -> Certificate | Assessment:
    """Predict the error of an answer of low rank.

    Args:
        stack: The models that it is from.
        recovery: The answer.
        stored: The dtype that the weight will be rounded to.
        disagreed: Mean squared error by the disagreement of parts of the models; 0 where that was not looked at.

    Returns:
        What a range follows from; the certificate itself where none does.
    """
    if recovery.left_alone:
        return _of_unchanged(stack, recovery)
    if recovery.bits is not None and is_exact(stack, recovery):
        return Certificate(Verdict.EXACT, f"every entry is certain {on_grid(recovery.bits)}", 0)
    if recovery.bits is not None:
        return assess_bits(stack, recovery)
    if recovery.expected is not None:
        return _of_expected(recovery, recovery.expected, stored, disagreed)
    if not recovery.deltas:
        return Certificate(Verdict.NOT_DETERMINED, "no model of the deltas: how far they are from zero is unknown")
    # Half precision does not tell the deltas' spaces better than to float32's rounding.
    spaces = tuple(SVDFactors.of(M_i, stack.factor_dtype) for M_i in recovery.deltas)
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
    if not model.traces.solved:
        reason = "the equations are too ill-conditioned to tell how the noise enters the weight"
        return Certificate(Verdict.NOT_DETERMINED, reason)
    return model.assessment(disagreed)


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


def _of_expected(recovery: Recovery, expected: PredictedError, stored: torch.dtype, disagreed: float) -> Assessment:
    """From the fit's own variances: deltas near the noise are held down, and no residual shows by how much too far."""
    added = storage_energy(recovery.weight.to(stored)) / recovery.weight.numel()
    mse = expected.mse + added
    covariates = {
        "chance above": log_ratio((expected.most + added) / mse),
        "chance below": log_ratio(mse / (expected.least + added)),
    }
    doubt = "deltas are near the models' noise: what they have in common is known to a factor only"
    return Assessment("held down", mse, covariates, (doubt,), False, "", disagreed)


def calibrated(found: Assessment) -> Certificate:
    """Give a predicted error its range, and the verdict that follows from it."""
    bin_ = band(found)
    mse = math.log10(found.mse)
    predicted = mse + bin_.middle if math.isfinite(bin_.middle) else None
    best = mse + bin_.low if math.isfinite(bin_.low) else None
    worst = mse + bin_.high
    if predicted is not None:
        best = None if best is None else min(best, predicted - BAND)
        worst = max(worst, predicted + BAND)
    agreement = math.log10(found.agreement) if found.agreement else None
    if agreement is not None:
        worst = max(worst, agreement)
    if found.hidden_mse:
        worst = max(worst, math.log10(found.hidden_mse))
    narrow = best is not None and worst - best <= (BANDS if found.basis.startswith("grid") else NARROW)
    doubts = found.doubts if bin_.seen else (*found.doubts, UNSEEN)
    verdict = Verdict.FLOOR if found.at_floor and narrow and bin_.seen else Verdict.APPROXIMATE
    said = (found.reason, *doubts) if found.at_floor else doubts
    if verdict is Verdict.APPROXIMATE and not doubts:
        said = (*said, "problems like it had errors that are known to a factor only")
    return Certificate(verdict, "; ".join(said), 0, predicted, best, worst, agreement, found.certain)
