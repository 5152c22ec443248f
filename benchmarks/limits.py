"""What could be had at best from noisy or quantised releases: by an attacker who is told every adapter to the bit.

Such an attacker knows each release's `W_i - M_i`: the base and nothing but the defence's error. What is left to do is
to put the n errors together. Under Gaussian noise that is the mean, drawn towards the row's own mean as far as its
weights are normal; under rounding and quantisation it is the mean of what the n intervals have in common. No attack on
releases alone can be expected to come closer. Beside it stand the best attack of `detune bench defences`, which must
have run, and the base itself after the defence, which has no adapter to hide: one error, and nothing else.
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from detune.attacks.cells import within_cells
from detune.bench.defences.families import FineTuneFamily, trained_families
from detune.bench.defences.rows import MODELS
from detune.bench.defences.run import SENTENCES
from detune.checkpoints import CheckpointWriter, open_checkpoint
from detune.compatibility.quantisation_levels import levels_of
from detune.defences import Bf16, Defence, Fp16, Int8, Nf4, Noise
from detune.demo.train import embeddings
from detune.metrics import w_error
from detune.metrics.cosine import cosine_distances
from detune.numerics.float_grid import interval

CACHE = Path(__file__).parent / ".cache" / "defences"
# Adapters that are known are known to this variance, beside weights of some 1e-3.
KNOWN = 1e-16
# Worked on at a time.
ROWS = 64


def main() -> None:
    family = trained_families(CACHE / "models", on_step=print)["ordinary"]
    size = {"fp16": torch.float16, "bf16": torch.bfloat16}
    told: dict[str, tuple[Defence, Callable[[Sequence[Tensor], Tensor], Tensor]]] = {
        "fp16": (Fp16(), lambda releases, M: between([interval(R_i.to(size["fp16"])) for R_i in releases], M)),
        "bf16": (Bf16(), lambda releases, M: between([interval(R_i.to(size["bf16"])) for R_i in releases], M)),
        "int8": (Int8(), lambda releases, M: between([levels_of(R_i) for R_i in releases], M)),
        "nf4": (Nf4(), lambda releases, M: between([levels_of(R_i) for R_i in releases], M)),
    }
    for share in (0.001, 0.01, 0.1):
        told[f"noise {share:.1%}"] = (Noise(share), lambda releases, M, share=share: averaged(releases, M, share))
    sentences = list(dict.fromkeys(text for own in family.texts for text in own[:SENTENCES]))
    truth = embeddings(family.base, sentences)

    def away(model: Path) -> float:
        return float(cosine_distances(embeddings(model, sentences), truth).mean())

    fine_tune = away(family.models[0])
    print(f"{MODELS} releases, 12 matrices 384x384; W-Error, and distance of embeddings as a share of a fine-tune's")
    print(f"{'':12} {'best attack':>24} {'adapters told':>16} {'defended base':>16}")
    with tempfile.TemporaryDirectory(prefix="detune-limits-") as folder:
        for name, (defence, solve) in told.items():
            best, base = Path(folder) / f"{name}-told", Path(folder) / f"{name}-base"
            w_errors = write(family, defence, solve, best, base)
            row = json.loads((CACHE / "rows" / f"{name.replace(' ', '-').replace('%', '')}.json").read_text())
            cell = min((c for c in row["cells"] if c["w_error"] is not None), key=lambda c: c["w_error"])
            figures = [f"{cell['attack']:>8} {cell['w_error']:7.2f} {cell['embeddings']:7.1e}"]
            for error, model in zip(w_errors, (best, base), strict=True):
                figures.append(f"{error:7.2f} {away(model) / fine_tune:8.1e}")
            print(f"{name:12} {' '.join(figures)}", flush=True)


def write(
    family: FineTuneFamily,
    defence: Defence,
    solve: Callable[[Sequence[Tensor], Tensor], Tensor],
    best: Path,
    base: Path,
) -> tuple[float, float]:
    """Write what the attacker who is told has, and the defended base; mean W-Errors over the fine-tuned matrices."""
    truth, models = open_checkpoint(family.base), [open_checkpoint(path) for path in family.models[:MODELS]]
    changes = [defence.prepare(model, seed) for seed, model in enumerate(models)]
    change_base = defence.prepare(truth, 0)
    found: list[tuple[float, float]] = []
    with CheckpointWriter(truth, best) as told, CheckpointWriter(truth, base) as defended:
        for name in truth.tensors:
            W = truth.read(name)
            if name not in models[0].tensors or not W.is_floating_point():
                told.copy(name)
                defended.copy(name)
                continue
            undefended = [model.read(name) for model in models]
            releases = [change(name, W_i) for change, W_i in zip(changes, undefended, strict=True)]
            alone, answer = change_base(name, W), torch.stack(releases).double().mean(dim=0)
            if W.ndim == 2 and not all(map(torch.equal, releases, undefended)):
                M = torch.stack([W_i.double() - W.double() for W_i in undefended])
                answer = solve(releases, M)
                if bool(M.any()):
                    found.append((w_error(answer, W), w_error(alone, W)))
            told.write(name, answer.to(W.dtype))
            defended.write(name, alone)
    first, second = (fmean(column) for column in zip(*found, strict=True))
    return first, second


def between(intervals: Sequence[object], M: Tensor) -> Tensor:
    """W within intervals that are known but for the adapters, and these told."""
    low, high = (torch.stack([getattr(each, end) for each in intervals]) for end in ("low", "high"))
    parts = zip(*(each.split(ROWS, dim=1) for each in (low, high, M)), strict=True)
    return torch.cat([within_cells(*part, torch.full_like(part[2], KNOWN)) for part in parts])


def averaged(releases: Sequence[Tensor], M: Tensor, share: float) -> Tensor:
    """W under Gaussian noise, adapters told and each row's weights normal."""
    exact = torch.stack([R_i.double() for R_i in releases]) - M
    mean = exact.mean(dim=0)
    noise = share**2 * exact.square().mean() / len(releases)
    row, spread = mean.mean(dim=1, keepdim=True), mean.var(dim=1, keepdim=True)
    return row + (mean - row) * (1 - noise / spread).clamp(min=0)


if __name__ == "__main__":
    main()
