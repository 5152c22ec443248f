"""Recovery of one tensor: the solver's answer, and whether it explains the data."""

from dataclasses import replace

import torch
from torch import Tensor

from detune.certificate.certify import certify
from detune.certificate.jackknife import Solve
from detune.compatibility.low_rank_test import SMALLEST, split
from detune.compatibility.model_set import Held
from detune.methods import Lattice, Mean, Single
from detune.methods.auto import unchanged
from detune.problem import NotRecoverable, Recovery, Solver, Stack
from detune.problem.stack import matricise
from detune.recovery.loop import Answer
from detune.recovery.report import Status

# What adapters leave of models that they explain, in units of the storage noise.
EXPLAINED = 1.5


def solve_tensor(
    held: Held,
    solver: Solver,
    rank: int | None,
    device: torch.device | str | None,
    stored: torch.dtype | None = None,
    check: bool = False,
) -> tuple[Answer, Tensor]:
    """The answer for one tensor that differs between the models, and its values in any shape.

    Args:
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
        return Answer(Status.NOT_DETERMINED, "single", reason), tensors[0]
    stack = Stack.of([matricise(tensor) for tensor in tensors], device=device, noise=held.noise)
    if isinstance(solver, Mean | Single):
        return _answer(solver.solve(stack), Status.AVERAGED)
    if min(stack.shape) == 1:
        return _solve_vector(stack, solver, stored)
    answer, weight = _solve_matrix(stack, solver, rank, stored, check)
    if _unexplained(answer) and stack.n > solver.min_models and min(stack.shape) >= SMALLEST:
        groups = split(stack.matrices, noise=stack.noise_override)
        if len(groups) > 1 and len(groups[0]) >= solver.min_models and len(groups[0]) > len(groups[1]):
            return _solve_group(stack, groups[0], solver, rank, stored, check)
    return answer, weight


def _unexplained(answer: Answer) -> bool:
    """Whether some models may not belong here: where adapters explain all of them to the noise, all do."""
    if answer.status is Status.APPROXIMATE and answer.noise_ratio is not None:
        return answer.noise_ratio > EXPLAINED
    return answer.status not in (Status.EXACT, Status.FLOOR)


def _solve_group(
    stack: Stack, group: tuple[int, ...], solver: Solver, rank: int | None, stored: torch.dtype, check: bool
) -> tuple[Answer, Tensor]:
    """A matrix that some models have anew, a head for instance: the others tell what it was."""
    answer, weight = _solve_matrix(stack.part(group), solver, rank, stored, check)
    others = [i for i in range(stack.n) if i not in group]
    listed = f"model{'s' * (len(others) > 1)} {', '.join(map(str, others))}"
    reason = f"{answer.reason}; without {listed} of the {stack.n} used: full rank here"
    found = dict(zip(group, answer.ranks, strict=True)) if answer.ranks else {}
    ranks = tuple(found.get(i, min(stack.shape)) for i in range(stack.n)) if found else ()
    return replace(answer, reason=reason, ranks=ranks), weight


def _solve_matrix(
    stack: Stack, solver: Solver, rank: int | None, stored: torch.dtype, check: bool
) -> tuple[Answer, Tensor]:
    """The solver's answer, and whether it explains the data."""
    try:
        recovery = solver.solve(stack, rank)
    except NotRecoverable as why:
        answer, weight = _answer(Mean().solve(stack), Status.NOT_DETERMINED)
        return replace(answer, reason=str(why)), weight
    return _certified(stack, recovery, stored, (lambda part: solver.solve(part, rank)) if check else None)


def _certified(
    stack: Stack, recovery: Recovery, stored: torch.dtype, check: Solve | None = None
) -> tuple[Answer, Tensor]:
    """The answer with its verdict, for the dtype that it will be stored in."""
    certificate = certify(stack, recovery, stored, check)
    answer, weight = _answer(recovery, Status(certificate.verdict))
    return replace(answer, reason=f"{recovery.reason}; {certificate.reason}", certificate=certificate), weight


def _solve_vector(stack: Stack, solver: Solver, stored: torch.dtype) -> tuple[Answer, Tensor]:
    """A vector has no low rank: only models that did not change it give it away."""
    if stack.n >= 3:
        untouched = unchanged(stack)
    else:
        untouched = solver.lattice.untouched(stack) if isinstance(solver, Lattice) else None
    if untouched is not None:
        return _certified(stack, untouched, stored)
    answer, weight = _answer(Mean().solve(stack), Status.AVERAGED)
    return replace(answer, reason=f"a vector cannot be low-rank: the average of {stack.n} models"), weight


def _answer(recovery: Recovery, status: Status) -> tuple[Answer, Tensor]:
    answer = Answer(
        status,
        recovery.method,
        recovery.reason,
        recovery.ranks,
        recovery.relative_residual,
        recovery.noise_ratio,
        bits=recovery.bits,
    )
    return answer, recovery.weight
