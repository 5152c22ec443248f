"""Recovery of one tensor: the solver's answer, and whether it explains the data."""

from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from detune.certificate.certify import certify
from detune.certificate.jackknife import Solve
from detune.certificate.verdict import Verdict
from detune.compatibility.low_rank_test import SMALLEST, split
from detune.compatibility.model_set import Held
from detune.lattice import NoGrid
from detune.methods import Auto, Lattice, Mean, SHiRA, Single
from detune.numerics.float_grid import name_of
from detune.origin import Origin
from detune.problem import NotRecoverable, Recovery, Solver, Stack
from detune.problem.solving import Prepared, outliers_of, solve
from detune.problem.stack import matricise
from detune.problem.storage_noise import FLOOR_RATIO, sample_rows
from detune.recovery.report import TensorResult
from detune.source_models.identical import unchanged
from detune.source_models.solve_from import renumbered

# Where models have trained rows of their own, most rows are as they were, and most entries of the others are not. Low
# ranks change all rows; where rounding leaves most entries as they were, it does so in all rows, too
# (definition: most is more than half).
FEW_ROWS, MOST_ENTRIES = 0.5, 0.5
# A low rank in some of the rows differs between any two models (definition of most).
MOSTLY_ALONE = 0.5


@dataclass(frozen=True)
class RecoveredTensor:
    """A tensor as recovered.

    Attributes:
        result: What the report says of it.
        weight: Its values, in any shape.
        certain: Where its bits are the base's, bool; None where it was found to lie on no grid.
    """

    result: TensorResult
    weight: Tensor
    certain: Tensor | None = None

    def but(self, **changes: Any) -> "RecoveredTensor":
        """The tensor with other words in its result."""
        return replace(self, result=replace(self.result, **changes))


@dataclass(frozen=True)
class TrainedRows:
    """A few rows that differ altogether, as those of tokens do that models have trained, each its own.

    Such changes are of full rank, or nearly so, and what most models have is the base's.

    Attributes:
        rows: Which rows differ, `(out,)`, bool.
        alone: The share of these in which two models at least agree.
    """

    rows: Tensor
    alone: float

    @classmethod
    def of(cls, stack: Stack) -> "TrainedRows | None":
        """Compare the models row by row; None where they do not differ so."""
        if stack.n < SHiRA.min_models or stack.noise_override or len({W_i.dtype for W_i in stack.matrices}) > 1:
            return None
        for matrices in ([sample_rows(W_i) for W_i in stack.matrices], stack.matrices):
            rows = torch.stack([W_i.ne(matrices[0]).any(dim=1) for W_i in matrices[1:]]).any(dim=0)
            if float(rows.double().mean()) > FEW_ROWS:
                return None
        pairs = torch.stack([one[rows].ne(other[rows]) for one, other in combinations(stack.matrices, 2)])
        if not bool(rows.any()) or float(pairs.any(dim=0).double().mean()) < MOST_ENTRIES:
            return None
        return cls(rows, 1 - float(pairs.any(dim=2).all(dim=0).double().mean()))

    def recovery(self, stack: Stack) -> Recovery:
        """The rows that nobody trained, and of the others what most models have, or their mean."""
        part = replace(stack, matrices=tuple(W_i[self.rows] for W_i in stack.matrices))
        try:
            found = SHiRA().solve(part)
        except NotRecoverable:
            found = Mean().solve(part)
        weight = stack.matrices[0].to(stack.device, stack.dtype, copy=True)
        agreed = torch.ones_like(weight, dtype=torch.bool)
        weight[self.rows] = found.weight
        agreed[self.rows] = found.agreed if found.agreed is not None else False
        reason = f"{int(self.rows.sum())} of {stack.shape[0]} rows differ altogether; in these {found.reason}"
        return Recovery(weight, "shira", reason, agreed=agreed)


def solve_tensor(
    name: str,
    held: Held,
    solver: Solver,
    rank: int | None,
    device: torch.device | str | None,
    stored: torch.dtype | None = None,
    check: bool = False,
) -> RecoveredTensor:
    """Recover one tensor that differs between the models.

    Args:
        name: Its qualified name.
        held: What the models hold of it.
        solver: The method.
        rank: The most that any adapter's can be; None finds it.
        device: Where to compute.
        stored: The dtype that the answer will be rounded to; None is that of the first model that has it.
        check: Whether to recover from parts of the models too, and see whether they agree.
    """
    tensors = held.tensors
    stored = stored or tensors[0].dtype
    if not all(tensor.is_floating_point() for tensor in tensors):
        reason = "not floating point, so there is no average; the first model's stand in"
        return RecoveredTensor(result_of(name, held, Verdict.NOT_DETERMINED, Origin.SINGLE, reason), tensors[0])
    stack = Stack.of([matricise(tensor) for tensor in tensors], device=device, noise=held.noise)
    found = _averaged_rows(stack) if held.added else _solve(stack, solver, rank, stored, check)
    return found.but(name=name, shape=tuple(tensors[0].shape), dtype=_dtypes(held))


def _averaged_rows(stack: Stack) -> RecoveredTensor:
    """Rows that are no base's."""
    reason = f"rows that each model has added by itself: the average of {stack.n} models"
    return _recovered(solve(Mean(), stack), Verdict.AVERAGED).but(reason=reason)


def _solve(stack: Stack, solver: Solver, rank: int | None, stored: torch.dtype, check: bool) -> RecoveredTensor:
    """Recover a matrix or a vector, from the models that agree on it."""
    if isinstance(solver, Mean | Single):
        averaged = solver.solve(stack) if isinstance(solver, Single) else solve(solver, stack)
        return _recovered(averaged, Verdict.AVERAGED)
    if min(stack.shape) == 1:
        return _solve_vector(stack, solver, stored)
    found = _solve_matrix(stack, solver, rank, stored, check)
    if stack.noise_override:
        size = float(stack.noise.square().mean().sqrt())
        found = found.but(reason=f"{found.result.reason}; quantised models, with noise of {size:.2g} in an entry")
    if _unexplained(found.result) and stack.n > solver.min_models and min(stack.shape) >= SMALLEST:
        groups = split(stack.matrices, noise=stack.noise_override)
        if len(groups) > 1 and len(groups[0]) >= solver.min_models and len(groups[0]) > len(groups[1]):
            return _solve_group(stack, groups[0], solver, rank, stored, check)
    return found


def _unexplained(result: TensorResult) -> bool:
    """Whether some models may not belong here: where adapters explain all of them to the noise, all do."""
    if result.verdict is Verdict.APPROXIMATE and result.noise_ratio is not None:
        return result.noise_ratio > FLOOR_RATIO
    return not result.verdict.is_close


def _solve_group(
    stack: Stack, group: tuple[int, ...], solver: Solver, rank: int | None, stored: torch.dtype, check: bool
) -> RecoveredTensor:
    """Recover a matrix that some models have anew, a head for instance, from the others."""
    found = _solve_matrix(stack.part(group), solver, rank, stored, check)
    others = [i for i in range(stack.n) if i not in group]
    listed = f"model{'s' * (len(others) > 1)} {', '.join(map(str, others))}"
    reason = f"{renumbered(found.result.reason, group)}; without {listed} of the {stack.n} used: full rank here"
    known = dict(zip(group, found.result.ranks, strict=True)) if found.result.ranks else {}
    ranks = tuple(known.get(i, min(stack.shape)) for i in range(stack.n)) if known else ()
    return found.but(reason=reason, trust=renumbered(found.result.trust, group), ranks=ranks)


def _solve_matrix(stack: Stack, solver: Solver, rank: int | None, stored: torch.dtype, check: bool) -> RecoveredTensor:
    """The solver's answer, and whether it explains the data."""
    trained = TrainedRows.of(stack) if isinstance(solver, Auto | Lattice) else None
    if trained is not None and trained.alone > MOSTLY_ALONE:
        return _certified(stack, trained.recovery(stack), stored)
    try:
        _require_grid(stack, solver)
        recovery = solve(solver, stack, rank)
    except NotRecoverable as why:
        if trained is not None:
            return _certified(stack, trained.recovery(stack), stored)
        reason = _joined(str(why), outliers_of(stack))
        return _recovered(solve(Mean(), stack), Verdict.NOT_DETERMINED).but(reason=reason)
    return _certified(stack, recovery, stored, (lambda part: solver.solve(part, rank)) if check else None)


def _require_grid(stack: Stack, solver: Solver) -> None:
    """Refuse what lies on the levels of a format, where a grid of the base's would have to tell.

    Raises:
        NoGrid: It does.
    """
    if stack.noise_override and stack.n < Auto.min_models and isinstance(solver, Lattice):
        raise NoGrid("quantised models lie on levels of their own, and on no grid of the base's")


def _solve_vector(stack: Stack, solver: Solver, stored: torch.dtype) -> RecoveredTensor:
    """A vector has no low rank: only models that did not change it give it away."""
    prepared = Prepared.of(stack).foretold(lambda part: ())
    if stack.n >= 3:
        untouched = unchanged(prepared.stack)
    else:
        untouched = solver.lattice.untouched(prepared.stack) if isinstance(solver, Lattice) else None
    if untouched is not None:
        return _certified(stack, prepared.restored(untouched), stored)
    reason = f"a vector cannot be low-rank: the average of {stack.n} models"
    return _recovered(solve(Mean(), stack), Verdict.AVERAGED).but(reason=_joined(reason, outliers_of(stack)))


def _joined(*sentences: str) -> str:
    """Sentences, of which some may be empty."""
    return "; ".join(filter(None, sentences))


def _certified(stack: Stack, recovery: Recovery, stored: torch.dtype, check: Solve | None = None) -> RecoveredTensor:
    """The answer with its verdict, for the dtype that it will be stored in."""
    certificate = certify(stack, recovery, stored, check)
    return _recovered(recovery, certificate.verdict, certificate.certain).but(
        reason=f"{recovery.reason}; {certificate.reason}",
        trust=certificate.reason,
        undetermined=certificate.undetermined,
        predicted_w_error=certificate.predicted_w_error,
        best_w_error=certificate.best_w_error,
        worst_w_error=certificate.worst_w_error,
        agreement=certificate.agreement,
    )


def _recovered(recovery: Recovery, verdict: Verdict, certain: bool = True) -> RecoveredTensor:
    """The answer as it stands; `certain` as in `Certificate`."""
    bits = recovery.bits
    if bits is not None and not certain:
        bits = replace(bits, certain=torch.zeros_like(bits.certain))
    result = TensorResult(
        name="",
        shape=(),
        dtype="",
        verdict=verdict,
        method=recovery.method,
        reason=recovery.reason,
        origin=recovery.origin,
        ranks=recovery.ranks,
        relative_residual=recovery.relative_residual,
        noise_ratio=recovery.noise_ratio,
        grid=name_of(bits.grid) if bits else None,
        log10_false_positive=bits.log10_false_positive if bits else None,
        certain=bits.share if bits else None,
    )
    return RecoveredTensor(result, recovery.weight, bits.certain if bits else None)


def result_of(name: str, held: Held, verdict: Verdict, origin: Origin, reason: str) -> TensorResult:
    """The result for a tensor that was not solved.

    Args:
        name: Its qualified name.
        held: What the models hold of it.
        verdict: How far it can be trusted.
        origin: What stands in.
        reason: Why.
    """
    shape = tuple(held.tensors[0].shape)
    return TensorResult(name, shape, _dtypes(held), verdict, str(origin), reason, origin)


def _dtypes(held: Held) -> str:
    return ", ".join(dict.fromkeys(name_of(tensor.dtype) for tensor in held.tensors))
