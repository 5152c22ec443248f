"""Verdicts on answers that are not of low rank as they stand: rearranged, scaled, of frozen factors, or voted for."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from detune.certificate.error_model import moved_mse
from detune.certificate.jackknife import Solve
from detune.certificate.verdict import Certificate, Verdict
from detune.methods.dora import Scaled, as_one_scale
from detune.methods.lokr import Rearranged, arrange_back, as_solved
from detune.methods.vera import Frozen, expected_mse
from detune.problem.low_rank import LowRank
from detune.problem.recovery import PredictedError, Recovery
from detune.problem.stack import Stack
from detune.problem.storage_noise import FLOOR_RATIO

Certify = Callable[[Stack, Recovery, torch.dtype, Solve | None], Certificate]


def certify_structured(
    stack: Stack, recovery: Recovery, stored: torch.dtype, check: Solve | None, certify: Certify
) -> Certificate | None:
    """Judge an answer by the structure it was found by.

    Args:
        stack: The models.
        recovery: What a solver made of them.
        stored: The dtype that the weight will be rounded to.
        check: Recovers from a part of the models.
        certify: Judges an answer of low rank.

    Returns:
        The certificate; None where the answer is of low rank as it stands.
    """
    arranged = as_solved(stack, recovery)
    if arranged is not None:
        return certify(*arranged, stored, check and _of_rearranged(check, recovery))
    on_scale = as_one_scale(stack, recovery)
    if on_scale is not None:
        return _but_for_scales(*on_scale, recovery.deltas, certify)
    if recovery.deltas and isinstance(recovery.deltas[0], Frozen):
        return _of_frozen(stack, recovery)
    if recovery.agreed is not None:
        return _of_votes(recovery.agreed)
    return None


def _of_frozen(stack: Stack, recovery: Recovery) -> Certificate:
    """Known factors leave far less unknown than a rank does: the misfit and draws of noise tell."""
    mse = expected_mse(stack, recovery)
    left = recovery.noise_ratio or 0.0
    if left > FLOOR_RATIO:
        reason = f"{left:.2g} times the storage noise is left: adapters of these factors do not explain the data"
        # If it is noise it is in the weight too; and factors that are wrong altogether moved the answer by that much.
        most = left**2 * mse + moved_mse(recovery)
        expected = PredictedError(left**2 * mse, mse, most)
        return Certificate.of_error(Verdict.APPROXIMATE, reason, expected)
    reason = "the only answer with these factors; storage noise is all that is left"
    return Certificate.of_error(Verdict.FLOOR, reason, mse)


def _of_votes(agreed: Tensor) -> Certificate:
    """Entries that models share by no accident."""
    missing = int(agreed.logical_not().count_nonzero())
    if not missing:
        return Certificate(Verdict.EXACT, "the base's own bits, if models agree by no accident", 0)
    reason = f"{missing} of {agreed.numel()} entries are in no two models; the others are the base's own bits"
    return Certificate(Verdict.NOT_DETERMINED, reason, missing)


def _but_for_scales(stack: Stack, recovery: Recovery, deltas: Sequence[LowRank], certify: Certify) -> Certificate:
    """An answer that is good for its rows' directions and not for their lengths."""
    scales, rest, null = len(deltas[0].scale) if isinstance(deltas[0], Scaled) else 0, "", 0
    if any(recovery.ranks):
        found = certify(stack, recovery, torch.float64, None)
        error = "" if found.worst_w_error is None else f", W-Error up to {found.worst_w_error:.2f}"
        if found.verdict is Verdict.FLOOR and found.predicted_w_error is not None:
            error = f", W-Error {found.predicted_w_error:.2f}"
        rest, null = f"; but for them: {found.verdict}{error}", found.undetermined or 0
    reason = f"the lengths of {scales} rows or columns are a guess{rest}"
    return Certificate(Verdict.NOT_DETERMINED, reason, scales + null)


def _of_rearranged(check: Solve, recovery: Recovery) -> Solve:
    """The certificate of models that were rearranged."""
    first = recovery.deltas[0]
    assert isinstance(first, Rearranged)

    def solve(part: Stack) -> Recovery:
        matrices = tuple(arrange_back(W_i, first.blocks, first.shape) for W_i in part.matrices)
        return check(Stack(matrices, part.dtype, part.device))

    return solve
