"""The whole story on a real model: fine-tune three times, merge, throw the base away, get it back."""

import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.status import Status as Spinner
from rich.table import Table

import detune
from detune.demo.texts import DEMO_DOMAINS, passages
from detune.demo.train import STEPS, base_model, embeddings, merge, train_lora
from detune.errors import OutputError
from detune.recovery.compare import Comparison
from detune.recovery.report import Status

# The paper's baselines, its method, and ours.
METHODS = {
    "single": "one model as it is",
    "mean": "their average",
    "spectral": "the paper's method",
    "intersect": "closed form",
    "auto": "the same, polished",
}
RANK = 16
SENTENCES = (
    "The committee postponed its decision until spring.",
    "How do I read a file line by line?",
    "A lock protects the shared queue from two threads at once.",
    "Whales breathe air and come up for it.",
    "The decimal module rounds half to even.",
    "Send the message over an encrypted connection.",
)


def tell(out: Path | None = None, *, steps: int | None = None, seed: int = 0) -> dict[str, Comparison]:
    """Run the demonstration and print it as it goes.

    Args:
        out: Keep all models below this directory; None uses a temporary one.
        steps: Training steps of each LoRA; None is the trainer's default.
        seed: Seed of all LoRAs.

    Returns:
        The comparison of each method with the true base.

    Raises:
        DetuneError: The extra `demo` is not installed.
        OutputError: `out` exists and is not empty.
    """
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} exists and is not empty", "choose another directory, or leave --out away")
    console = Console(highlight=False)
    base = base_model()
    with nullcontext(out) if out is not None else tempfile.TemporaryDirectory(prefix="detune-demo-") as directory:
        folder = Path(directory)
        merged = _fine_tune(console, base, folder, steps or STEPS, seed)
        comparisons = _attack(console, base, merged, folder)
        _check_behaviour(console, base, merged[0], folder / "recovered-auto")
    console.print(
        "\nThree merged fine-tunes gave their base away: nobody published it, and anybody\n"
        "can compute it. Two would not have. Look at your own with\n"
        "   detune inspect MODEL MODEL MODEL"
    )
    if out is not None:
        console.print(f"All models are kept in {out}.", soft_wrap=True, markup=False)
    return comparisons


def _fine_tune(console: Console, base: Path, folder: Path, steps: int, seed: int) -> list[Path]:
    console.print(
        "[bold]1. A base model and three fine-tunes of it[/]\n"
        "   The base is all-MiniLM-L6-v2: 22 million real weights. Each fine-tune is a\n"
        f"   LoRA of rank {RANK} on query and value, trained from seed {seed} on English text that\n"
        "   Python carries, merged by PEFT and saved in float32."
    )
    merged = []
    for domain in DEMO_DOMAINS:
        began = time.perf_counter()
        texts = passages(domain)
        with Spinner(f"training on {domain}", console=console):
            adapter = train_lora(base, texts, folder / f"adapter-{domain}", rank=RANK, steps=steps, seed=seed)
            merged.append(merge(base, adapter, folder / f"merged-{domain}"))
        console.print(f"   {domain}: {len(texts)} passages, {steps} steps, {time.perf_counter() - began:.0f} s")
    return merged


def _attack(console: Console, base: Path, merged: list[Path], folder: Path) -> dict[str, Comparison]:
    console.print("\n[bold]2. The recovery, from the merged models alone[/]")
    console.print(f"   detune recover {' '.join(path.name for path in merged)}\n      --out recovered\n")
    comparisons = {}
    table = Table("method", "", "W-Error", "worst", "identical bits", "seconds", box=None)
    for method, meaning in METHODS.items():
        # Spectral DeTuning is told the rank, as in the paper; the others find it.
        rank = RANK if method == "spectral" else None
        with Spinner(f"recovering: {method}", console=console):
            report = detune.recover(merged, folder / f"recovered-{method}", method, rank=rank)
            comparisons[method] = detune.compare(folder / f"recovered-{method}", base)
        tuned = {row.name for row in report.tensors if row.status is not Status.SHARED}
        rows = [row for row in comparisons[method].rows if row.name in tuned]
        table.add_row(
            method,
            meaning,
            f"{fmean(row.w_error for row in rows):.2f}",
            f"{max(row.w_error for row in rows):.2f}",
            f"{100 * fmean(row.bit_identical for row in rows):.1f} %",
            f"{report.seconds:.1f}",
        )
    console.print(table)
    console.print(
        f"\n   Over the {len(tuned)} matrices that were fine-tuned; all others are shared by the models.\n"
        "   W-Error is log10 of the mean squared error against the true base, averaged\n"
        "   over the matrices; identical bits is the share of weights that are exact."
    )
    return comparisons


def _check_behaviour(console: Console, base: Path, tuned: Path, recovered: Path) -> None:
    console.print(
        "\n[bold]3. The recovered model behaves as the base[/]\n   Largest difference of sentence embeddings:"
    )
    truth = embeddings(base, SENTENCES)
    for name, path in (("a fine-tuned model", tuned), ("the recovered model", recovered)):
        difference = float((embeddings(path, SENTENCES) - truth).abs().max())
        console.print(f"   {name:20} {difference:.1e}")
