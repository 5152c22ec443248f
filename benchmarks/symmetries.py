"""Releases that are permuted, rotated or rescaled, each by a seed of its own, against the attack that knows it.

MiniLM, 3 and 5 merges of one seed (LoRA r=16 on query and value), and 3 of LoRAs of r=8 on all linear layers. Truth is
the base in the first release's frame. `recover` knows nothing of the frames. The floor is what `recover` gets from
releases without a defence; where weights are turned they are rounded once more, and the floor is what the same attack
gets from releases that all have the same frame.

Expected: every permutation within 0.05 of its floor, rotations and scales within 0.3; `recover` refuses, or is as bad
as the releases themselves.
"""

import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
from minilm import RANK, merged_models
from problems import verdict

from detune import compare
from detune.attacks import Align, Attack, Recover
from detune.checkpoints import CheckpointWriter, open_checkpoint
from detune.defences import Defence, Permutation, Rescaling, Rotation
from detune.demo.texts import DOMAINS, passages
from detune.demo.train import base_model, merge, train_lora
from detune.errors import InputError

CACHE = Path(__file__).parent / ".cache" / "symmetries"
PERMUTED, TURNED = 0.05, 0.3
CHAINS: dict[str, tuple[Defence, ...]] = {
    "permutation": (Permutation(),),
    "scales 2^k": (Rescaling(exact=True),),
    "rotation": (Rotation(),),
    "rescaling": (Rescaling(),),
    "all three": (Permutation(), Rotation(), Rescaling()),
}


def main() -> None:
    base = base_model()
    bf16 = stored_as(base, torch.bfloat16, CACHE / "base-bf16")
    of_heads, of_all = f"query, value, r={RANK}", "all linear layers, r=8"
    rows = (
        (of_heads, base, merged_models(3), ("permutation",)),
        (of_heads, base, merged_models(5), ("permutation",)),
        (of_all, base, on_all_layers(3), ("permutation",)),
        (f"{of_heads}, bf16", bf16, in_bf16(3), ("permutation", "rotation")),
        (of_heads, base, merged_models(3), ("scales 2^k", "rotation", "rescaling", "all three")),
        (of_all, base, on_all_layers(3), ("rotation", "all three")),
    )
    print("W-Error, mean over the matrices with adapters and worst of all that differ; seconds of the attack")
    print("releases                     defence      n  recover   align   worst   floor seconds")
    for name, truth, models, chains in rows:
        for chain in chains:
            row(name, truth, models, chain)


def row(name: str, base: Path, models: Sequence[Path], chain: str) -> None:
    """One defence on one set of releases."""
    exact = chain in ("permutation", "scales 2^k")
    folder = Path(tempfile.mkdtemp(prefix="detune-symmetries-"))
    try:
        truth = defended(base, folder / "truth", 0, chain)
        own = [defended(model, folder / f"own-{i}", i, chain) for i, model in enumerate(models)]
        naive = attacked(Recover(), own, folder / "naive", truth)
        began = time.perf_counter()
        errors = attacked(Align(), own, folder / "align", truth)
        seconds = time.perf_counter() - began
        if exact:
            floor = attacked(Recover(), models, folder / "floor", base)
        else:
            same = [defended(model, folder / f"same-{i}", 0, chain) for i, model in enumerate(models)]
            floor = attacked(Align(), same, folder / "floor", truth)
    finally:
        shutil.rmtree(folder)
    # Releases of one frame show the base's own bits where no adapter was; those of several do not.
    tuned = [errors.get(name, floor[name]) for name in floor]
    mean, worst, least = fmean(tuned), max(errors.values()), fmean(floor.values())
    unaware = f"{fmean(naive.values()):8.2f}" if naive else " refused"
    print(f"{name:28} {chain:12} {len(models)} {unaware} {mean:7.2f} {worst:7.2f} {least:7.2f} {seconds:7.1f}")
    print("  ", verdict("above the floor", mean - least, PERMUTED if exact else TURNED), flush=True)


def attacked(attack: Attack, models: Sequence[Path], out: Path, truth: Path) -> dict[str, float]:
    """W-Error of every matrix that differs from the truth; none where the attack refuses the releases."""
    try:
        attack.run(models, out)
    except InputError:
        return {}
    return {row.name: row.w_error for row in compare(out, truth).differing if len(row.shape) == 2}


def defended(model: Path, out: Path, seed: int, chain: str) -> Path:
    """A release, changed by one defence after the other."""
    with open_checkpoint(model) as opened, CheckpointWriter(opened, out) as writer:
        changes = [defence.prepare(opened, seed) for defence in CHAINS[chain]]
        for name in opened.tensors:
            tensor = opened.read(name)
            for change in changes:
                tensor = change(name, tensor)
            writer.write(name, tensor)
    return out


def on_all_layers(count: int) -> list[Path]:
    """Short fine-tunes whose LoRAs are on every linear layer, trained once."""
    paths = []
    for domain in list(DOMAINS)[:count]:
        path = CACHE / f"merged-{domain}"
        if not (path / "config.json").is_file():
            targets = ("query", "key", "value", "dense")
            adapter = CACHE / f"adapter-{domain}"
            train_lora(base_model(), passages(domain), adapter, rank=8, targets=targets, steps=30, seed=0)
            merge(base_model(), adapter, path)
        paths.append(path)
    return paths


def in_bf16(count: int) -> list[Path]:
    """The merges of LoRAs on query and value, in bf16."""
    paths = []
    for path in merged_models(count):
        domain = path.name.removeprefix("merged-")
        merged = CACHE / f"bf16-{domain}"
        if not (merged / "config.json").is_file():
            merge(base_model(), path.with_name(f"adapter-{domain}"), merged, torch.bfloat16)
        paths.append(merged)
    return paths


def stored_as(model: Path, dtype: torch.dtype, out: Path) -> Path:
    """A checkpoint with its float tensors rounded."""
    if not out.is_dir():
        with open_checkpoint(model) as opened, CheckpointWriter(opened, out, dtype=dtype) as writer:
            for name in opened.tensors:
                writer.write(name, opened.read(name))
    return out


if __name__ == "__main__":
    main()
