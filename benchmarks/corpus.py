"""The corpus behind the certificate: problems whose truth is known, each solved, and reduced to one line of figures.

    python benchmarks/corpus.py --split fit --problems 400
    python benchmarks/corpus.py --split check --problems 200
    python benchmarks/corpus.py --split sealed --problems 200

Only seeds and figures are kept, in `benchmarks/.cache/corpus/SPLIT.jsonl`; a run that was cut off goes on where it
stopped. `benchmarks/certificate.py` makes the calibration and the tables from these lines, at once. The adapters of the
real models are trained on the first run, in some minutes, and kept.
"""

import argparse
import json
import math
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from corpus_problems import SPLITS, Problem, draw

from detune.certificate.certify import Assessment, Certificate, assess
from detune.methods import Auto, Intersect, Lattice
from detune.numerics.float_grid import name_of
from detune.problem import NotRecoverable, Recovery, Solver, Stack
from detune.problem.solving import Prepared, solve
from detune.source_models.solve_from import source_part

FOLDER = Path(__file__).parent / ".cache" / "corpus"
# Every third problem is solved by the closed form alone.
CLOSED_FORM_EVERY = 3
# What takes the solver more processor time than this is left out, and counted.
MOST_SECONDS = 10.0
REFUSED, TOO_SLOW = "refused", "too slow"


@dataclass(frozen=True)
class Outcome:
    """What was predicted of a problem, and what came of it.

    Attributes:
        seed: The problem's number in its split.
        kind: Its kind.
        dtype: Storage dtype of the models; "mixed" of several.
        entries: Of the matrix.
        models: Number of models.
        ulps: Size of the deltas in units in the last place of the base's dtype.
        method: The solver.
        verdict: "exact", "not determined", "refused" or "too slow", or None where the certificate has a range.
        basis: What the prediction rests on; None without a range.
        predicted: log10 of the predicted mean squared error, before calibration; None without a range.
        true: log10 of the true one of the weight as stored; None where every entry is right.
        at_floor: As in `Assessment`.
        covariates: As there.
        doubts: As there.
        hidden_mse: As there.
        best: The lower end of a range that is derived and not calibrated; None where there is none, or it is open.
        worst: Its upper end.
        certain: How many entries were called certain; 0 where none was.
        certain_wrong: How many of them are not the base's.
        wrong: How many entries of the stored weight are not the base's.
        solving_seconds: Processor time of the recovery.
        judging_seconds: Processor time of the certificate.
        about: The problem, in words.
    """

    seed: int
    kind: str
    dtype: str
    entries: int
    models: int
    ulps: float
    method: str
    verdict: str | None
    basis: str | None
    predicted: float | None
    true: float | None
    at_floor: bool
    covariates: Mapping[str, float]
    doubts: tuple[str, ...]
    hidden_mse: float
    best: float | None
    worst: float | None
    certain: int
    certain_wrong: int
    wrong: int
    solving_seconds: float
    judging_seconds: float
    about: str

    @property
    def ratio(self) -> float:
        """log10 of the true over the predicted error; `-inf` where the answer is exact."""
        assert self.predicted is not None
        return -math.inf if self.true is None else self.true - self.predicted


def outcome(seed: int, problem: Problem, most_seconds: float = MOST_SECONDS) -> Outcome:
    """Solve a problem, and compare with its truth."""
    stack = Stack.of(problem.models, noise=problem.noise)
    solver: Solver = Lattice() if stack.n < 3 else Intersect() if seed % CLOSED_FORM_EVERY == 0 else Auto()
    dtypes = {name_of(W_i.dtype) for W_i in problem.models}
    about: dict[str, Any] = {
        "seed": seed,
        "kind": problem.kind,
        "dtype": dtypes.pop() if len(dtypes) == 1 else "mixed",
        "entries": problem.W.numel(),
        "models": stack.n,
        "ulps": problem.ulps,
        "about": f"{tuple(problem.W.shape)} {problem.about}",
    }
    began = time.process_time()
    try:
        with time_limit(most_seconds):
            recovery = solve(solver, stack)
    except (NotRecoverable, TimeoutError) as why:
        verdict = TOO_SLOW if isinstance(why, TimeoutError) else REFUSED
        seconds = time.process_time() - began
        return Outcome(**about, **_nothing(), verdict=verdict, solving_seconds=seconds)
    solved = time.process_time()
    found = _assessed(stack, recovery, problem.stored)
    judged = time.process_time()
    weight = recovery.weight.to(problem.stored).double()
    mse, wrong = float((weight - problem.W).square().mean()), int(weight.ne(problem.W).sum())
    believed = recovery.bits is not None and found.certain
    certain = recovery.bits.certain if recovery.bits and believed else torch.zeros(stack.shape, dtype=torch.bool)
    ranged = isinstance(found, Assessment)
    return Outcome(
        **about,
        method=recovery.method,
        verdict=None if ranged else str(found.verdict),
        basis=found.basis if ranged else None,
        predicted=math.log10(found.mse) if ranged else None,
        true=math.log10(mse) if mse else None,
        at_floor=bool(ranged and found.at_floor),
        covariates={name: round(value, 4) for name, value in found.covariates.items()} if ranged else {},
        doubts=found.doubts if ranged else (),
        hidden_mse=found.hidden_mse if ranged else 0.0,
        best=None if ranged else found.best_w_error,
        worst=None if ranged else found.worst_w_error,
        certain=int(certain.sum()),
        certain_wrong=int((certain & recovery.weight.double().ne(problem.W)).sum()),
        wrong=wrong,
        solving_seconds=round(solved - began, 4),
        judging_seconds=round(judged - solved, 4),
    )


def _assessed(stack: Stack, recovery: Recovery, stored: torch.dtype) -> Assessment | Certificate:
    """What `certify` bases its range on, of a stack that is of the order of one."""
    unit, found = Prepared.of(stack).as_solved(recovery)
    part, of_part = source_part(unit, found) if found.source_models else (unit, found)
    return assess(part, of_part.with_plain_errors(), stored)


def _nothing() -> dict[str, Any]:
    return {
        "method": "",
        "judging_seconds": 0.0,
        "basis": None,
        "predicted": None,
        "true": None,
        "at_floor": False,
        "covariates": {},
        "doubts": (),
        "hidden_mse": 0.0,
        "best": None,
        "worst": None,
        "certain": 0,
        "certain_wrong": 0,
        "wrong": 0,
    }


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError once so much processor time has gone by."""

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def outcomes(split: str) -> list[Outcome]:
    """The outcomes of a split that are kept."""
    return list(_kept(FOLDER / f"{split}.jsonl"))


def _kept(path: Path) -> Iterator[Outcome]:
    if path.is_file():
        for line in path.read_text().splitlines():
            row = json.loads(line)
            yield Outcome(**{**row, "doubts": tuple(row["doubts"])})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=SPLITS, required=True)
    parser.add_argument("--problems", type=int, default=400)
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = FOLDER / f"{options.split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {found.seed for found in _kept(path)}
    # What is imported and compiled costs once, and must not be interrupted.
    outcome(0, draw(options.split, 0), most_seconds=3600.0)
    with path.open("a") as file:
        for seed in range(options.problems):
            if seed not in done:
                found = outcome(seed, draw(options.split, seed))
                file.write(json.dumps(asdict(found)) + "\n")
                file.flush()
                print(f"\r{seed + 1} of {options.problems}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
