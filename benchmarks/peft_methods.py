"""Every fine-tuning method of PEFT that merges: what its merges give away of the base, and by which command.

all-MiniLM-L6-v2, query and value of every layer, 3, 5 and 8 fine-tunes of 6 steps from one seed on subjects of their
own, merged by `merge_and_unload` in float32. W-Error is the mean over the two matrices of layer 2; "up to scale" is
the same with every row, or column, of the answer brought to the length of the truth's. With `--tiny`: two 96x96 layers
that learn to be others, which takes seconds to train.
"""

import os
import sys
from collections import Counter
from pathlib import Path
from statistics import fmean

import torch
from peft_sets import METHODS, Method, minilm_set, tiny_set
from torch import Tensor

from detune.compatibility.model_set import Held
from detune.methods import SOLVERS
from detune.metrics import w_error
from detune.recovery.tensor import solve_tensor

CACHE = Path(__file__).parent / ".cache" / "peft-methods"
COUNTS = (3, 5, 8)
LAYERS = ("layer.2.",)


def trained_tiny(name: str) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Train on two 96x96 layers: takes seconds."""
    return tiny_set(METHODS[name], max(COUNTS))


def trained(name: str) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The set of a method, trained once."""
    path = CACHE / f"{name}.pt"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(minilm_set(METHODS[name], max(COUNTS)), path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)
    truth, models = torch.load(path)
    return truth, models


def up_to_scale(weight: Tensor, W_star: Tensor, dim: int) -> float:
    """W-Error of the answer with its rows (1) or columns (0) at the length of the truth's."""
    weight, W_star = weight.double(), W_star.double()
    scale = (weight * W_star).sum(dim, keepdim=True) / (weight * weight).sum(dim, keepdim=True)
    return w_error(weight * scale, W_star)


def measure(name: str, method: Method, tiny: bool) -> None:
    """Print a line for each number of models."""
    truth, models = trained_tiny(name) if tiny else trained(name)
    keys = [key for key in truth if tiny or any(layer in key for layer in LAYERS)]
    for n in COUNTS:
        means, errors, scaled, verdicts, ranks = [], [], [], Counter[str](), set[int]()
        for key in keys:
            stack = tuple(model[key] for model in models[:n])
            solver = SOLVERS[method.solver]()
            found = solve_tensor(key, Held.of(stack), solver, method.rank, None, torch.float64)
            answer, weight = found.result, found.weight
            means.append(w_error(torch.stack(stack).double().mean(dim=0), truth[key]))
            errors.append(max(w_error(weight, truth[key]), -99.0))
            scaled.append(min(up_to_scale(weight, truth[key], dim) for dim in (0, 1)))
            verdicts[str(answer.verdict)] += 1
            ranks.update(answer.ranks)
        command = method.solver if method.rank is None else f"{method.solver} --rank {method.rank}"
        scale = f"{fmean(scaled):9.2f}" if method.solver == "dora" else " " * 9
        found = f"{min(ranks)}-{max(ranks)}" if ranks else ""
        told = ", ".join(f"{verdict} {count}" for verdict, count in verdicts.most_common())
        bits = sum(error == -99.0 for error in errors)
        recovered = f"{fmean(e for e in errors if e != -99.0):9.2f}" if bits < len(errors) else "     bits"
        print(f"{name:26} {n} {fmean(means):7.2f} {recovered} {scale} {found:>7}  {command:20} {told}", flush=True)


def main() -> None:
    tiny = "--tiny" in sys.argv[1:]
    chosen = [name for name in sys.argv[1:] if name != "--tiny"] or list(METHODS)
    print(f"{'method':26} n {'mean':>7} {'recovered':>9} {'to scale':>9} {'ranks':>7}  {'--method':20} verdicts")
    for name in chosen:
        measure(name, METHODS[name], tiny)


if __name__ == "__main__":
    main()
