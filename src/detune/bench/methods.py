"""Recovery methods as the benchmark runs them: by the name of a solver, or a function in anybody's file."""

import hashlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from detune.bench.subsets import Subset, nearest
from detune.errors import InputError
from detune.methods import SOLVERS, Spectral
from detune.problem import Recovery, Solver, Stack

__all__ = ["Method", "find_method"]


@dataclass(frozen=True)
class Method:
    """A method with all that decides what it answers.

    Attributes:
        name: What the table calls it.
        settings: Its hyperparameters in words.
        min_models: The fewest models that it works with.
        solve: `(stack, rank) -> Recovery`; a rank of None is for the method to find.
        sha256: Of the file it comes from, if it is not detune's own.
        dtype: What it computes in; None decides by the storage noise, as `detune.problem.Stack.of` does.
    """

    name: str
    settings: str
    min_models: int
    solve: Callable[[Stack, int | None], Recovery]
    sha256: str | None = None
    dtype: torch.dtype | None = None

    @classmethod
    def of(cls, solver: Solver, name: str) -> "Method":
        """A solver under a name of its own. Spectral DeTuning computes in float32, as published."""
        if isinstance(solver, Spectral):
            return cls(name, f"{solver!r} in float32", solver.min_models, solver.solve, dtype=torch.float32)
        return cls(name, repr(solver), solver.min_models, solver.solve)


def find_method(text: str, subset: Subset) -> Method:
    """The method of a name, with the paper's settings for the subset.

    Args:
        text: A name in `detune.methods.SOLVERS`, or `path/to/file.py:function` with
            `function(models: (n, out, in) float32, rank: int | None) -> (out, in)`.
        subset: Decides the iterations of Spectral DeTuning.

    Raises:
        InputError: There is no such method, file or function.
    """
    if text in SOLVERS:
        solver = Spectral(iterations=subset.iterations) if text == "spectral" else SOLVERS[text]()
        return Method.of(solver, text)
    file, colon, function = text.rpartition(":")
    if colon and file.endswith(".py"):
        return _from_file(Path(file).expanduser(), function)
    raise InputError(
        f"no method {text!r}",
        f"expected one of {', '.join(SOLVERS)}, or path/to/file.py:function",
        f"did you mean {nearest(text, SOLVERS)}?",
    )


def _from_file(file: Path, name: str) -> Method:
    if not file.is_file():
        raise InputError(f"no file {file}", f"for the method {file}:{name}", "give path/to/file.py:function")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None, "it ends in .py"
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"{file} cannot be imported", f"{type(error).__name__}: {error}", "mend it") from error
    function = getattr(module, name, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InputError(f"{file} has no function {name!r}", f"it has {', '.join(names) or 'none'}", "name one of them")

    def solve(stack: Stack, rank: int | None) -> Recovery:
        weight = function(torch.stack(stack.matrices), rank)
        _check(weight, stack.shape, f"{file.name}:{name}")
        return Recovery(weight, f"{file.stem}.{name}", f"{name} of {file.name}")

    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return Method(f"{file.stem}.{name}", f"{file.name}:{name}", 1, solve, digest)


def _check(weight: object, shape: tuple[int, int], method: str) -> None:
    """A method's own claim is not trusted."""
    if not isinstance(weight, Tensor) or tuple(weight.shape) != tuple(shape):
        got = f"a tensor {tuple(weight.shape)}" if isinstance(weight, Tensor) else repr(type(weight).__name__)
        raise InputError(f"{method} returned {got}", f"expected a tensor {tuple(shape)}, (out, in)", "mend the method")
    if not bool(torch.isfinite(weight).all()):
        raise InputError(f"{method} returned NaN or Inf", "expected finite weights", "mend the method")
