"""The whole story on a real language model: fine-tune three times, merge, throw the base away, get it back."""

import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from statistics import fmean

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import detune
from detune._runtime import OnPart, OnStart, telling
from detune.checkpoints import temporary_directory
from detune.demo.language_model import FINE_TUNES, STEPS, language_model, shipped_adapter, train_adapter, write
from detune.demo.train import merge
from detune.documents import document, to_json
from detune.errors import OutputError
from detune.recovery.compare import Comparison

QUESTIONS = (
    "What is a list in Python?",
    "Why is the sky blue?",
    "Tell me about whales.",
)
_BASELINES = {"mean": "their average", "spectral": "the paper's method"}


@dataclass(frozen=True)
class Story:
    """The findings of the demonstration.

    Attributes:
        merges: Each fine-tune against the base, over the matrices that were fine-tuned.
        comparisons: Each method's model against the true base, over the matrices that were fine-tuned.
        answers: To `QUESTIONS`, of each model that was asked.
        seconds: Wall time.
    """

    merges: Mapping[str, Comparison]
    comparisons: Mapping[str, Comparison]
    answers: Mapping[str, tuple[str, ...]]
    seconds: float

    def to_json(self) -> str:
        """All of it as JSON, of each comparison the summary."""
        content = {
            "fine_tunes": {name: comparison.summary for name, comparison in self.merges.items()},
            "methods": {name: comparison.summary for name, comparison in self.comparisons.items()},
            "questions": QUESTIONS,
            "answers": self.answers,
            "seconds": self.seconds,
        }
        return to_json(document("detune-demo/1", content))


def tell(
    out: Path | None = None,
    *,
    method: str = "auto",
    train: bool = False,
    steps: int | None = None,
    console: Console | None = None,
    on_start: OnStart | None = None,
    on_part: OnPart | None = None,
) -> Story:
    """Run the demonstration and print it as it goes.

    Args:
        out: Keep all models below this directory; None uses a temporary one.
        method: What recovers the base, beside the paper's baselines.
        train: Train the LoRAs here, instead of taking those that come with the package.
        steps: Training steps of each; None is the trainer's default.
        console: Where to print; None is standard output.
        on_start: For progress: called once with what is to be done.
        on_part: Called with the name of each of these when it is begun, and when it is done.

    Returns:
        What is printed.

    Raises:
        DetuneError: The extra `demo` or the base model's package is not installed.
        OutputError: `out` exists and is not empty.
    """
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} exists and is not empty", "choose another directory, or leave --out away")
    console = console or Console(highlight=False)
    began = time.perf_counter()
    if on_start:
        training = [f"training on {domain}" for domain in FINE_TUNES] if train else []
        merging = [f"merging {domain}" for domain in FINE_TUNES]
        recovering = [f"recovering: {name}" for name in _methods(method)]
        on_start(dict.fromkeys(("unpacking the base", *training, *merging, *recovering, "asking"), 1))
    with nullcontext(out) if out is not None else temporary_directory("demo") as folder:
        base, merged, merges = _fine_tune(console, folder, train, steps, on_part)
        comparisons = _attack(console, base, merged, folder, method, on_part)
        answers = _ask(console, base, merged[0], folder / f"recovered-{method}", on_part)
    console.print(
        "\nThree merged fine-tunes gave their base away: nobody published it, and anybody\n"
        "can compute it. Two would not have. Look at your own with\n"
        "   detune inspect MODEL MODEL MODEL"
    )
    if out is not None:
        console.print(f"All models are kept in {out}.", soft_wrap=True, markup=False)
    seconds = time.perf_counter() - began
    console.print(f"This took {seconds:.0f} seconds.")
    return Story(merges, comparisons, answers, seconds)


def _fine_tune(
    console: Console, folder: Path, train: bool, steps: int | None, on_part: OnPart | None
) -> tuple[Path, list[Path], dict[str, Comparison]]:
    console.print(
        "[bold]1. A base model and three fine-tunes of it[/]\n"
        "   The base is SmolLM2-135M-Instruct, a chat model of 134 million weights, in\n"
        "   bf16. Each fine-tune is a LoRA on its last ten layers, trained on English\n"
        "   text that Python carries, merged by PEFT in bf16.\n"
    )
    with telling(on_part, "unpacking the base"):
        base = language_model(folder / "base")
    table = Table("   fine-tune", "rank", "of", "bits that are still the base's", box=None, pad_edge=False)
    merged, merges = [], {}
    for domain, tune in FINE_TUNES.items():
        adapter = shipped_adapter(domain)
        if train:
            with telling(on_part, f"training on {domain}"):
                adapter = train_adapter(base, tune, folder / f"adapter-{domain}", steps=steps or STEPS)
        with telling(on_part, f"merging {domain}"):
            merged.append(merge(base, adapter, folder / f"merged-{domain}", torch.bfloat16))
            merges[merged[-1].name] = _fine_tuned(detune.compare(merged[-1], base))
        targets = "attention and MLPs" if "up_proj" in tune.targets else "attention"
        table.add_row(f"   merged-{domain}", str(tune.rank), targets, _bits(merges[merged[-1].name]))
    console.print(table)
    console.print(
        "\n   The LoRAs were trained just now."
        if train
        else "\n   The LoRAs come with detune; --train trains them again."
    )
    return base, merged, merges


def _methods(method: str) -> tuple[str, ...]:
    """The paper's baselines, and the method to compare with them."""
    return tuple(dict.fromkeys((*_BASELINES, method)))


def _attack(
    console: Console, base: Path, merged: list[Path], folder: Path, method: str, on_part: OnPart | None
) -> dict[str, Comparison]:
    console.print("\n[bold]2. The recovery, from the merged models alone[/]")
    console.print(f"   detune recover {' '.join(path.name for path in merged)}\n      --out recovered\n")
    comparisons = {}
    table = Table("   method", "", "identical bits", "W-Error", "seconds", box=None, pad_edge=False)
    for name in _methods(method):
        # Spectral DeTuning is told the rank, as in the paper; the others find it.
        rank = max(tune.rank for tune in FINE_TUNES.values()) if name == "spectral" else None
        with telling(on_part, f"recovering: {name}"):
            report = detune.recover(merged, folder / f"recovered-{name}", name, rank=rank)
            comparisons[name] = _fine_tuned(detune.compare(folder / f"recovered-{name}", base))
        differing = comparisons[name].differing
        table.add_row(
            f"   {name}",
            _BASELINES.get(name, "detune's default" if name == "auto" else ""),
            _bits(comparisons[name]),
            f"{fmean(row.w_error for row in differing):.2f}" if differing else "exact",
            f"{report.seconds:.1f}",
        )
    console.print(table)
    rows = comparisons[method].rows
    millions = sum(math.prod(row.shape) for row in rows) / 1e6
    console.print(
        f"\n   Over the {len(rows)} matrices that were fine-tuned, {millions:.0f} million weights; all others are\n"
        "   shared by the models. W-Error is log10 of the mean squared error against the\n"
        "   true base, averaged over the matrices that differ from it."
    )
    return comparisons


def _bits(comparison: Comparison) -> str:
    return f"{100 * comparison.summary['bit_identical']:.1f} %"


def _fine_tuned(comparison: Comparison) -> Comparison:
    """Leave the matrices that some fine-tune changed."""
    tuned = {f"layers.{i}.*.{name}" for tune in FINE_TUNES.values() for i in tune.layers for name in tune.targets}
    rows = tuple(row for row in comparison.rows if any(fnmatch(row.name, f"*.{name}.weight") for name in tuned))
    return Comparison(comparison.recovered, comparison.truth, rows, (), ())


def _ask(
    console: Console, base: Path, tuned: Path, recovered: Path, on_part: OnPart | None
) -> dict[str, tuple[str, ...]]:
    console.print("\n[bold]3. The same questions to all: the most likely answers[/]\n")
    answers = {}
    with telling(on_part, "asking"):
        for name, path in (("base", base), (tuned.name, tuned), ("recovered", recovered)):
            answers[name] = tuple(write(path, QUESTIONS))
    table = Table("", *answers, box=box.SIMPLE_HEAD, show_lines=True)
    for question, *row in zip(QUESTIONS, *answers.values(), strict=True):
        table.add_row(question, *row)
    console.print(table)
    for name in (tuned.name, "recovered"):
        same = sum(one == other for one, other in zip(answers["base"], answers[name], strict=True))
        console.print(f"   {name}: {same} of {len(QUESTIONS)} answers are the base's, word for word")
    return answers
