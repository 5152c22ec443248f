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
from detune.comparison import Comparison
from detune.demo.texts import DEMO_DOMAINS, passages
from detune.demo.train import base_model, embeddings, merge, train_lora
from detune.errors import OutputError
from detune.report import Status

# The paper's baselines, its method, and ours.
METHODS = {
    "single": "one fine-tuned model, as it is",
    "mean": "the average of the three",
    "spectral": "Spectral DeTuning, 300 iterations",
    "intersect": "closed form",
    "auto": "closed form, then polished",
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
    if out is not None and out.exists() and any(out.iterdir()):
        raise OutputError(f"{out} exists and is not empty", "choose another directory, or leave --out away")
    base = base_model()
    options = {} if steps is None else {"steps": steps}
    with nullcontext(out) if out is not None else tempfile.TemporaryDirectory(prefix="detune-demo-") as folder:
        return _tell(base, Path(folder), options, seed)


def _tell(base: Path, folder: Path, options: dict[str, int], seed: int) -> dict[str, Comparison]:
    console = Console(highlight=False)
    console.print(
        "[bold]1. A base model and three fine-tunes of it.[/] The base is all-MiniLM-L6-v2, 22 million real weights. "
        f"Each fine-tune is a LoRA of rank {RANK} on query and value, trained from seed {seed} on English text that "
        "Python carries, merged by PEFT and saved as float32."
    )
    merged = []
    for domain in DEMO_DOMAINS:
        texts = passages(domain)
        with Spinner(f"training on {domain}", console=console):
            began = time.perf_counter()
            adapter = train_lora(base, texts, folder / f"adapter-{domain}", rank=RANK, seed=seed, **options)
            merged.append(merge(base, adapter, folder / f"merged-{domain}"))
        console.print(f"   {domain}: {len(texts)} passages, {time.perf_counter() - began:.0f} s")

    console.print("\n[bold]2. The attack.[/] It sees the three merged models, not the base and not the adapters:")
    console.print(f"   detune recover {' '.join(path.name for path in merged)} --out recovered\n")
    comparisons = {}
    table = Table("method", "", "W-Error, mean", "worst", "identical bits", "seconds", box=None, pad_edge=False)
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
        f"   Over the {len(tuned)} matrices that were fine-tuned; the others are identical in all models. W-Error is\n"
        "   log10 of the mean squared error against the true base, identical bits the share of exact entries."
    )

    console.print("\n[bold]3. The recovered model behaves as the base.[/] Largest difference of sentence embeddings:")
    truth = embeddings(base, SENTENCES)
    for name, path in {"a fine-tuned model": merged[0], "the recovered model": folder / "recovered-auto"}.items():
        difference = float((embeddings(path, SENTENCES) - truth).abs().max())
        console.print(f"   {name + ':':22} {difference:.1e}")
    console.print(
        "\nThree merged fine-tunes gave their base away: nobody published it, and anybody can compute it. Two would not "
        "have. Look at your own models with [bold]detune inspect MODEL...[/]"
    )
    return comparisons
