"""Reports as tables for people."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from rich.table import Column

from detune.certificate.verdict import Verdict
from detune.cli.terminal import say, show_table
from detune.compatibility.reading import Reading
from detune.recovery.report import Report, TensorResult, w_error_range

if TYPE_CHECKING:
    from detune.adapters.extract import Extraction
    from detune.bench.results import CellResult
    from detune.compatibility.check import FamilyCheck
    from detune.compatibility.tensor_ranks import ChangedTensor
    from detune.packing import PackReport, UnpackReport
    from detune.recovery.compare import Comparison


class _Named(Protocol):
    @property
    def name(self) -> str: ...


Row = TypeVar("Row", bound=_Named)

# What is left of a verdict when it is put in words.
MEANING = {
    Verdict.SHARED: "identical in all models, copied",
    Verdict.EXACT: "exact: the base's bits",
    Verdict.FLOOR: "to the storage floor",
    Verdict.APPROXIMATE: "approximate: the error is known to a range only",
    Verdict.AVERAGED: "averaged",
    Verdict.NOT_DETERMINED: "not determined by these models",
}


def show_report(report: Report, out: Path | None = None) -> None:
    """Print a short table: a line for each kind of tensor that differs, and what became of the rest.

    Args:
        report: Of `recover` or `inspect`.
        out: Where the checkpoint was written, if it was.
    """
    changed = [row for row in report.tensors if row.verdict is not Verdict.SHARED]
    columns = ["tensor", "shape", "verdict", "W-Error", "method", "ranks", "residual", "× noise"]
    on_grid = any(row.grid for row in changed)
    lines = [
        (
            f"{pattern} ×{len(rows)}" if len(rows) > 1 else pattern,
            "×".join(map(str, rows[0].shape)),
            rows[0].verdict,
            _expected(rows),
            rows[0].method,
            _ranks(rows),
            _largest(row.relative_residual for row in rows),
            _largest(row.noise_ratio for row in rows),
            *[_certain(rows)] * on_grid,
        )
        for (pattern, _), rows in _by_kind(changed, lambda row: row.verdict).items()
    ]
    if changed:
        show_table([*columns, *["certain bits"] * on_grid], lines)
    for model in report.inputs:
        if model.left_out is not None:
            say(f"left out {model.spec}: {model.left_out}")
        for note in model.notes if model.left_out is None else ():
            say(f"{model.spec}: {note}")
    for verdict, count in report.counts.items():
        say(f"{count} tensor{'s' * (count != 1)} {MEANING[verdict]}")
    names: dict[str, list[str]] = {}
    for row in changed:
        if row.verdict in (Verdict.NOT_DETERMINED, Verdict.APPROXIMATE):
            names.setdefault(row.reason, []).append(row.name)
    for reason, (name, *others) in names.items():
        more = f" and {len(others)} more" if others else ""
        say(f"  {name}{more}: {reason}")
    _show_reading(report.reading)
    if out is not None:
        took = f"wrote {out} in {report.seconds:.1f} s"
        say(f"{took}; the whole report is {out / 'detune.json'}")


def show_family(check: "FamilyCheck") -> None:
    """Print a line for each model, one for each kind of tensor that differs, and the verdict."""
    for model in check.models:
        source = "-" if model.group is None else chr(ord("A") + model.group)
        say(f"{source}  {'' if model.belongs else 'NOT '}{model.spec}: {model.reason}")
        for (pattern, cause), tensors in _by_kind(model.foreign, lambda tensor: tensor.cause).items():
            say(f"     {pattern}{f' ×{len(tensors)}' * (len(tensors) > 1)}: {cause}")
    lines = [
        (
            f"{pattern} ×{len(rows)}" if len(rows) > 1 else pattern,
            "×".join(map(str, rows[0].shape)),
            _member_ranks(rows),
            "yes" if rows[0].enough else f"no: {rows[0].reason}",
        )
        for (pattern, _), rows in _by_kind(check.tensors, lambda row: (row.shape, row.enough)).items()
    ]
    if check.tensors:
        show_table(("tensor", "shape", "ranks", "recoverable"), lines)
    if check.shared:
        say(f"{check.shared} tensor{'s' * (check.shared != 1)} identical in all of the family")
    _show_reading(check.reading)
    say(check.verdict)


def show_comparison(comparison: "Comparison") -> None:
    """Print the tensors that differ, by kind, and the summary."""
    lines = [
        (
            f"{pattern} ×{len(rows)}" if len(rows) > 1 else pattern,
            "×".join(map(str, rows[0].shape)),
            f"{sum(row.w_error for row in rows) / len(rows):.2f}",
            f"{max(row.w_error for row in rows):.2f}",
            f"{100 * sum(row.bit_identical for row in rows) / len(rows):.2f} %",
        )
        for (pattern, _), rows in _by_kind(comparison.differing, lambda row: row.shape).items()
    ]
    if comparison.differing:
        show_table(("tensor", "shape", "W-Error", "worst", "identical bits"), lines)
    for names, where in ((comparison.only_recovered, comparison.truth), (comparison.only_truth, comparison.recovered)):
        if names:
            listed = ", ".join(names[:4]) + (" ..." if len(names) > 4 else "")
            say(f"not compared: {where} lacks {listed}")
    summary = comparison.summary
    say(
        f"{summary['identical_tensors']} of {summary['tensors']} tensors and "
        f"{100 * summary['bit_identical']:.4f} % of all entries are identical bit for bit",
    )
    if summary["mean_w_error"] is not None:
        say(
            f"W-Error of the tensors that differ: mean {summary['mean_w_error']:.2f}, "
            f"worst {summary['worst_w_error']:.2f} in {summary['worst_tensor']}",
        )


def show_extraction(extraction: "Extraction", out: Path) -> None:
    """Print a line for each kind of tensor and where it went, and how closely each adapter gives its model back."""
    from detune.adapters.changes import Kept

    lines = [
        (
            pattern,
            "×".join(map(str, rows[0].shape)),
            rows[0].kept,
            _span(row.rank for row in rows if row.rank),
            f"{100 * sum(row.identical for row in rows) / len(rows):.2f} %",
            f"{max(row.largest_ulps for row in rows)}",
        )
        for (pattern, _), rows in _by_kind(extraction.rows, lambda row: (row.kept, row.shape)).items()
    ]
    show_table(("tensor", "shape", "kept", "ranks", "identical bits", "largest ulp"), lines)
    for row in extraction.rows:
        if row.kept is Kept.LEFT_OUT:
            say(f"  left out of {row.model}: {row.name}: {row.reason}")
    show_adapters(extraction.summary, out)


def show_adapters(summary: "dict[str, dict[str, Any]]", out: Path) -> None:
    """Print a line for each adapter: what is in it, and what PEFT's merge of it gives back."""
    for name, figures in summary.items():
        whole = f", {figures['whole']} tensors whole" * bool(figures["whole"])
        lost = f", {figures['left out']} LEFT OUT" * bool(figures["left out"])
        shares = (f"{100 * figures[key]:.2f} %" for key in ("identical_of_changed", "identical"))
        say(
            f"{name}: {figures['LoRA']} LoRA layers of rank {_span(figures['ranks'])}{whole}{lost}; "
            f"merged by PEFT, {' of the changed entries and '.join(shares)} of all have the model's bits, "
            f"largest deviation {figures['largest_deviation']:.1e} ({figures['largest_ulps']} ulp)",
        )
    loading = f"PeftModel.from_pretrained(base, {str(out / next(iter(summary)))!r})"
    say(f"wrote {out}; load with {loading}")


def show_pack(report: "PackReport") -> None:
    """Print what a pack saves, and where its bytes are."""
    lines = [
        (part, f"{size / 1e6:.2f}", f"{100 * size / report.input_bytes:.2f} %")
        for part, size in sorted(report.parts_bytes.items(), key=lambda item: -item[1])
    ]
    show_table(("part", "MB", "of the input"), lines)
    say(
        f"{len(report.models)} models in {report.files} files, {report.input_bytes / 1e6:.1f} MB: "
        f"packed {100 * report.ratio:.1f} %, zstd alone {100 * report.zstd_ratio:.1f} %",
    )
    say(
        f"wrote {report.path} in {report.seconds:.1f} s; unpacked in memory, every file has its hash. "
        "The models are where they were",
    )


def show_unpack(report: "UnpackReport", out: Path) -> None:
    """Print what was restored."""
    say(
        f"restored {len(report.models)} models, {report.files} files, {report.size_bytes / 1e6:.1f} MB, below {out} in "
        f"{report.seconds:.1f} s: every file has the hash that it was packed with",
    )


def show_tables(results: "Sequence[CellResult]") -> None:
    """Print the table of each subset of the benchmark, and what to know beside it."""
    from detune.bench.table import remarks, tables

    for subset, frame in tables(results).items():
        columns = [Column(name, no_wrap=name != "method") for name in frame.columns]
        show_table(columns, frame.itertuples(index=False), title=subset)
        say()
    for remark in remarks(results):
        say(remark)


def show_catalogue() -> None:
    """Print what the benchmark can run on: the published subsets and the recipes."""
    from detune.bench.recipes import RECIPES
    from detune.bench.subsets import PUBLISHED, PUBLISHED_LORAS, REPOSITORY

    columns = _catalogue("published", "layers", "rank", "n", "iterations", "base")
    numbers = {name: (each.layers, each.rank, each.models, each.iterations) for name, each in PUBLISHED.items()}
    show_table(columns, ((name, *map(str, numbers[name]), PUBLISHED[name].base) for name in PUBLISHED))
    say(f"n and iterations are the paper's. {PUBLISHED_LORAS} LoRAs each, streamed from the Hub dataset")
    say(f"{REPOSITORY}, or from a local copy with --data DIR:")
    say(f"  hf download {REPOSITORY} --repo-type dataset --local-dir DIR")
    say()
    columns = _catalogue("recipe", "layers", "rank", "stands for", "what it is")
    about = {name: (each.layers, each().rank, each.stands_for or "", each.about) for name, each in RECIPES.items()}
    show_table(columns, ((name, *map(str, about[name])) for name in RECIPES))
    say(f"{PUBLISHED_LORAS} LoRAs each, made here and without a network by")
    say("  detune bench build RECIPE --out DIR")


def _show_reading(reading: Reading | None) -> None:
    if reading is not None:
        share = 100 * reading.read_bytes / max(1, reading.total_bytes)
        say(
            f"looked at {reading.rows} rows of each matrix at most: read {reading.read_bytes / 1e6:.1f} MB of "
            f"{reading.total_bytes / 1e6:.1f} MB, {share:.1f} %; the rest may differ, and --rows all reads it",
        )


def _catalogue(*columns: str) -> list[Column]:
    return [*(Column(column, no_wrap=True) for column in columns[:-1]), Column(columns[-1], overflow="fold")]


def _by_kind(rows: Iterable[Row], key: Callable[[Row], object]) -> "dict[tuple[str, object], list[Row]]":
    """Rows that differ only in the numbers of their names, together."""
    kinds: dict[tuple[str, object], list[Row]] = defaultdict(list)
    for row in rows:
        kinds[re.sub(r"\d+", "*", row.name), key(row)].append(row)
    # One of a kind keeps its own name.
    return {(group[0].name if len(group) == 1 else pattern, k): group for (pattern, k), group in kinds.items()}


def _ranks(rows: list[TensorResult]) -> str:
    spans = _spans(rows)
    return spans[0] if spans and len(set(spans)) == 1 else ", ".join(spans)


def _member_ranks(rows: "Sequence[ChangedTensor]") -> str:
    return ", ".join(_spans(rows))


def _spans(rows: "Sequence[TensorResult] | Sequence[ChangedTensor]") -> list[str]:
    """The ranks of each model over tensors of a kind; a dash where it does not have them, or not the family's."""
    spans = []
    for ranks in zip(*(row.ranks for row in rows if row.ranks), strict=False):
        known = [rank for rank in ranks if rank is not None]
        low, high = min(known, default=None), max(known, default=None)
        spans.append("-" if low is None else f"{low}" if low == high else f"{low}-{high}")
    return spans


def _span(numbers: Iterable[int]) -> str:
    known = sorted(set(numbers))
    return "" if not known else f"{known[0]}" if len(known) == 1 else f"{known[0]}-{known[-1]}"


def _expected(rows: Sequence[TensorResult]) -> str:
    """The W-Error to expect, the worst of a kind; a range where no more is known. An exact tensor has none."""
    known = [(row.worst_w_error, row) for row in rows if row.worst_w_error is not None]
    if not known:
        return "none" if rows[0].verdict is Verdict.EXACT else ""
    end, worst = max(known, key=itemgetter(0))
    if worst.verdict is Verdict.APPROXIMATE:
        return w_error_range(worst.best_w_error, end)
    return f"{worst.predicted_w_error:.2f}"


def _certain(rows: Sequence[TensorResult]) -> str:
    """The least share of entries that are certain on the base's grid, cut so that only all is 100 %."""
    shares = [row.certain if row.grid else None for row in rows]
    if None in shares:
        return "-"
    grids = "/".join(dict.fromkeys(row.grid or "" for row in rows))
    return f"{math.floor(10000 * min(share or 0.0 for share in shares)) / 100:g} % {grids}"


def _largest(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{max(known):.2g}" if known else ""
