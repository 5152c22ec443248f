"""Trained adapters of one seed on all-MiniLM-L6-v2, float32 merges: 3 and 8 models, against the Cramér-Rao bound.

Expected: n=3 worst at or below -15.7 and mean -16.3; n=8 mean -17.6; each within 0.3 of the bound.
Training eight adapters takes some minutes; they are kept in `benchmarks/.cache`.
"""

import math
from pathlib import Path
from statistics import fmean

import torch
from problems import verdict

from detune import recover_matrix
from detune.checkpoints import open_checkpoint
from detune.demo.texts import DOMAINS, passages
from detune.demo.train import STEPS, base_model, merge, train_lora
from detune.identifiability.error_traces import cramer_rao_mse
from detune.metrics import w_error
from detune.problem import Stack

CACHE = Path(__file__).parent / ".cache" / f"minilm-{STEPS}"
RANK = 16


def merged_models(count: int = len(DOMAINS)) -> list[Path]:
    """The first of the eight fine-tunes, trained once."""
    paths = []
    for domain in list(DOMAINS)[:count]:
        path = CACHE / f"merged-{domain}"
        if not (path / "config.json").is_file():
            adapter = train_lora(base_model(), passages(domain), CACHE / f"adapter-{domain}", rank=RANK, seed=0)
            merge(base_model(), adapter, path)
        paths.append(path)
    return paths


def main() -> None:
    base = open_checkpoint(base_model())
    models = [open_checkpoint(path) for path in merged_models()]
    names = [name for name in base.tensors if name.endswith(("query.weight", "value.weight"))]
    print(f"{len(names)} matrices 384x384, rank {RANK}, one seed; W-Error, lower is better")
    print(f"{'n':>2} {'method':>12} {'mean':>7} {'worst':>7} {'bound, mean':>11} {'largest excess over the bound':>29}")
    for n in (3, 8):
        stacks = {name: [model.read(name) for model in models[:n]] for name in names}
        bounds = {name: bound(base.read(name), stack) for name, stack in stacks.items()}
        for method, rank in (("mean", None), ("spectral", RANK), ("intersect", None), ("auto", None)):
            errors = {
                name: w_error(recover_matrix(stack, method, rank=rank).weight, base.read(name))
                for name, stack in stacks.items()
            }
            excess = max(errors[name] - bounds[name] for name in names)
            print(f"{n:2} {method:>12} {fmean(errors.values()):7.2f} {max(errors.values()):7.2f} ", end="")
            print(f"{fmean(bounds.values()):11.2f} {excess:+29.2f}")
        # The errors are now those of auto.
        print("  ", verdict("auto's mean", fmean(errors.values()), {3: -16.3, 8: -17.6}[n]))
        if n == 3:
            print("  ", verdict("auto's worst", max(errors.values()), -15.7))
        print("  ", verdict("auto's largest excess", excess, 0.3))


def bound(W: torch.Tensor, stack: list[torch.Tensor]) -> float:
    """The bound at the true deltas, as a W-Error."""
    triples = [torch.linalg.svd(W_i.double() - W.double()) for W_i in stack]
    variance = float(Stack.of(stack).noise.square().mean())
    U, V = [U[:, :RANK] for U, _, _ in triples], [Vh[:RANK].mT for _, _, Vh in triples]
    return math.log10(cramer_rao_mse(U, V, variance))


if __name__ == "__main__":
    main()
