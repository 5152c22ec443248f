"""One tensor, given to an outsider by one release after the other."""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import ClassVar

import torch
from torch import Tensor

from detune.attacks.measured_noise import best_split, with_measured_noise
from detune.audit.members import ENOUGH
from detune.audit.naming import Position
from detune.audit.record import Outcome, TensorEntry
from detune.certificate.verdict import Verdict
from detune.compatibility.model_set import Held
from detune.methods import Auto, Lattice, Mean, Single
from detune.metrics import bit_identical
from detune.metrics.w_error import squared_error
from detune.numerics.float_grid import HALVES, lies_on, name_of, spacing
from detune.origin import Origin
from detune.problem import Recovery, Solver, Stack
from detune.problem.solving import solve
from detune.problem.stack import matricise
from detune.problem.storage_noise import storage_variance
from detune.recovery.report import TensorResult
from detune.recovery.tensor import RecoveredTensor, result_of, solve_tensor

# Deltas of more steps of the base's grid do not show modulo the step; the method itself gives up at 8.
MOST_STEPS = 100.0
# An error of up to this multiple of what storing a release rounds off is at the storage floor.
AT_FLOOR = 2.0
# An error below this share of the change made by fine-tuning gives the base away.
CLOSER = 100.0


@dataclass(frozen=True)
class Tried:
    """The result for one tensor.

    Attributes:
        result: From all releases.
        weight: The recovered values, in the tensor's shape.
        entry: For the report.
    """

    result: TensorResult
    weight: Tensor
    entry: TensorEntry


@dataclass(frozen=True)
class Trial:
    """The recovery of a tensor from any number of releases.

    Attributes:
        solver: For three releases and more.
        rank: The most that any adapter's rank can be; None finds it.
        device: Where to compute.
        turned: Whether the releases were turned into one frame: no grid shows any more, and the noise is measured.
        noisy: Whether they differ at full rank: so it is, and adapters are split off with care for it.
    """

    solver: Solver
    rank: int | None = None
    device: torch.device | str | None = None
    turned: bool = False
    noisy: bool = False

    def run(self, name: str, position: Position, held: Held, truth: Tensor | None) -> Tried:
        """Recover a tensor from the first release, from the first two, and so on.

        All of them come first: what they show of the deltas tells whether fewer have to be tried at all.

        Args:
            name: Its qualified name.
            position: Where it lies in the model.
            held: What every release holds of it.
            truth: The base's; None where that is not given.
        """
        tensors = held.tensors
        figures = _Figures.of(tensors, truth)
        outcomes = []
        for k in range(len(tensors), 0, -1):
            began = time.perf_counter()
            first = replace(held, tensors=tensors[:k], models=held.models[:k], noise=held.noise[:k])
            found = self._solve(name, first, figures)
            if k == len(tensors):
                whole = found
                if truth is None and whole.result.verdict.is_close:
                    figures = _Figures.of(tensors, whole.weight)
            outcomes.append(_outcome(k, found, truth, figures, time.perf_counter() - began))
        entry = TensorEntry(
            name=name,
            block=position.block,
            depth=position.depth,
            kind=position.kind,
            shape=tuple(tensors[0].shape),
            dtype=", ".join(dict.fromkeys(name_of(tensor.dtype) for tensor in tensors)),
            is_matrix=tensors[0].is_floating_point() and min(matricise(tensors[0]).shape) > 1,
            change=figures.change,
            noise=figures.noise,
            outcomes=_gathered(reversed(outcomes)),
        )
        return Tried(whole.result, whole.weight, entry)

    def _solve(self, name: str, held: Held, figures: "_Figures") -> RecoveredTensor:
        """The tensor with its values as they would be stored."""
        tensors = held.tensors
        n = len(tensors)
        if n > 1 and all(_same(tensors[0], tensor) for tensor in tensors[1:]):
            same = result_of(name, held, Verdict.SHARED, Origin.COPY, f"identical in {n} releases")
            return RecoveredTensor(same, tensors[0])
        if n < ENOUGH and (self.turned or self.noisy):
            why = f"matrices that {'were turned' if self.turned else 'hold noise'} lie on no grid"
            return self._average(name, held, why)
        if n < ENOUGH and figures.show_no_grid(n):
            return self._average(name, held, figures.why_no_grid)
        solver = self.solver if n >= max(ENOUGH, self.solver.min_models) else Lattice()
        if self.turned or self.noisy:
            solver = AboveMeasuredNoise(solver, added=self.noisy)
        found = solve_tensor(name, held, solver, self.rank, self.device)
        return replace(found, weight=_stored(found.weight, tensors[0]))

    def _average(self, name: str, held: Held, reason: str) -> RecoveredTensor:
        """The average, where the search for a grid is known to fail: it can take seconds to say so."""
        solver = Single() if len(held.tensors) == 1 else Mean()
        stack = Stack.of([matricise(tensor) for tensor in held.tensors], device=self.device)
        found = solver.solve(stack) if isinstance(solver, Single) else solve(solver, stack)
        result = result_of(name, held, Verdict.NOT_DETERMINED, found.origin, reason)
        return RecoveredTensor(result, _stored(found.weight, held.tensors[0]))


@dataclass(frozen=True)
class _Figures:
    """Sizes of the releases' changes of a tensor.

    Attributes:
        change: Root mean square over all releases; None where the base's values are not known.
        noise: Root mean square of what storing the releases rounded off.
        steps: Change of each release, in steps of the base's grid; empty where they are not known.
        grid: Its name.
    """

    change: float | None
    noise: float
    steps: tuple[float, ...] = ()
    grid: str = ""

    @classmethod
    def of(cls, tensors: Sequence[Tensor], known: Tensor | None) -> "_Figures":
        """Measure them.

        Args:
            tensors: Tensors of every release.
            known: The base's values, as far as they are known.
        """
        if not tensors[0].is_floating_point():
            return cls(None, 0.0)
        noise = _rms(
            storage_variance(tensor[:: max(1, len(tensor) // 64)]).mean() for tensor in map(matricise, tensors)
        )
        if known is None:
            return cls(None, noise)
        changes = [squared_error(tensor, known) ** 0.5 for tensor in tensors]
        finest = min((tensor.dtype for tensor in tensors), key=lambda dtype: torch.finfo(dtype).eps)
        grid = next((half for half in HALVES if lies_on(known, half)), finest)
        step = float(spacing(matricise(known)[::16], grid).median())
        return cls(_rms(change**2 for change in changes), noise, tuple(c / step for c in changes), name_of(grid))

    @property
    def why_no_grid(self) -> str:
        """The reason, in a sentence."""
        return (
            f"the changes are {min(self.steps):.2g} steps of the base's {self.grid} grid and more; "
            f"beyond {MOST_STEPS:.0f} steps a grid shows nothing"
        )

    def show_no_grid(self, releases: int) -> bool:
        """Whether no grid can show in the first of the releases."""
        return bool(self.steps) and min(self.steps[:releases]) > MOST_STEPS


@dataclass(frozen=True)
class AboveMeasuredNoise:
    """A solver that is told the noise where that is more than storage's.

    Attributes:
        solver: What solves where it is not.
        added: Whether somebody added it, so that it may hide directions: then the adapters are split off as the attack
            `denoise` does.
    """

    min_models: ClassVar[int] = ENOUGH
    low_rank: ClassVar[bool] = True
    working_copies: ClassVar[int] = 10

    solver: Solver
    added: bool = False

    def solve(self, stack: Stack, rank: int | None = None) -> Recovery:
        """Measure the noise, then recover; see `Solver.solve`."""
        measured = with_measured_noise(stack)
        if measured is stack:
            return self.solver.solve(stack, rank)
        if not self.added:
            return Auto(lattice=None).solve(measured, rank)
        times = float(measured.noise.mean() / stack.noise.mean())
        reason = f"noise of {times:.2g} times the rounding; adapters split off as far as they stand over it"
        return Recovery(best_split(measured).weight, "denoise", reason, origin=Origin.DENOISED)


def is_given_away(verdict: Verdict, error: float | None, change: float | None, noise: float) -> bool:
    """Whether a tensor counts as given away.

    Against the base: its error is at the storage floor, or a hundredth of what fine-tuning changed. Without the base
    the certificate is believed.

    Args:
        verdict: What the recovery says.
        error: Root mean square, against the base; None without it.
        change: Change of the releases.
        noise: What storing the releases rounded off.
    """
    if error is None:
        return verdict.is_close
    return error <= max(AT_FLOOR * noise, (change or 0.0) / CLOSER)


def _outcome(models: int, found: RecoveredTensor, truth: Tensor | None, figures: _Figures, seconds: float) -> Outcome:
    result, weight = found.result, found.weight
    mse = None if truth is None else squared_error(weight, truth)
    return Outcome(
        models=models,
        verdict=result.verdict,
        method=result.method,
        reason=result.reason,
        origin=result.origin,
        ranks=tuple(rank for rank in result.ranks if rank is not None),
        undetermined=result.undetermined,
        grid=result.grid,
        predicted_w_error=result.predicted_w_error,
        best_w_error=result.best_w_error,
        worst_w_error=result.worst_w_error,
        w_error=math.log10(mse) if mse else None,
        identical=None if truth is None else bit_identical(weight, truth),
        given_away=is_given_away(result.verdict, None if mse is None else mse**0.5, figures.change, figures.noise),
        seconds=seconds,
    )


def _gathered(outcomes: Iterable[Outcome]) -> tuple[Outcome, ...]:
    """The outcomes in order. Whoever has more releases can still do with fewer: what is given away stays so."""
    gathered: list[Outcome] = []
    for outcome in outcomes:
        before = bool(gathered) and gathered[-1].given_away
        gathered.append(outcome.model_copy(update={"given_away": before or outcome.given_away}))
    return tuple(gathered)


def _stored(weight: Tensor, like: Tensor) -> Tensor:
    return weight.cpu().reshape(like.shape).to(like.dtype)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (one, other)))


def _rms(squares: Iterable[float | Tensor]) -> float:
    return math.sqrt(fmean(map(float, squares)))
