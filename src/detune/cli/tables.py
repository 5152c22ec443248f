"""Reports as tables for people."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from rich.console import Console
from rich.table import Table

from detune.compatibility.reading import Reading
from detune.recovery.report import Report, Status, TensorRow, w_error_range

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

# What is left of a status when it is put in words.
MEANING = {
    Status.SHARED: "identical in all models, copied",
    Status.EXACT: "exact: the base's bits",
    Status.FLOOR: "to the storage floor",
    Status.APPROXIMATE: "approximate: the error is known to a range only",
    Status.AVERAGED: "averaged",
    Status.NOT_DETERMINED: "not determined by these models",
}


def show_report(report: Report, out: Path | None = None) -> None:
    """Print a short table: a line for each kind of tensor that differs, and what became of the rest.

    Args:
        report: Of `recover` or `inspect`.
        out: Where the checkpoint was written, if it was.
    """
    console = Console(markup=False)
    changed = [row for row in report.tensors if row.status is not Status.SHARED]
    columns = ["tensor", "shape", "verdict", "W-Error", "method", "ranks", "residual", "× noise"]
    on_grid = any(row.grid for row in changed)
    table = Table(*columns, *["certain bits"] * on_grid, box=None, pad_edge=False)
    for (pattern, _), rows in _by_kind(changed, lambda row: row.status).items():
        table.add_row(
            f"{pattern} ×{len(rows)}" if len(rows) > 1 else pattern,
            "×".join(map(str, rows[0].shape)),
            rows[0].status,
            _expected(rows),
            rows[0].method,
            _ranks(rows),
            _largest(row.relative_residual for row in rows),
            _largest(row.noise_ratio for row in rows),
            *[_certain(rows)] * on_grid,
        )
    if changed:
        console.print(table)
    for model in report.inputs:
        if model.left_out is not None:
            console.print(f"left out {model.spec}: {model.left_out}", highlight=False, soft_wrap=True)
    for status, count in report.counts.items():
        console.print(f"{count} tensor{'s' * (count != 1)} {MEANING[status]}", highlight=False)
    names: dict[str, list[str]] = {}
    for row in changed:
        if row.status in (Status.NOT_DETERMINED, Status.APPROXIMATE):
            names.setdefault(row.reason, []).append(row.name)
    for reason, (name, *others) in names.items():
        more = f" and {len(others)} more" if others else ""
        console.print(f"  {name}{more}: {reason}", highlight=False, soft_wrap=True)
    _show_reading(console, report.reading)
    if out is not None:
        took = f"wrote {out} in {report.seconds:.1f} s"
        console.print(f"{took}; the whole report is {out / 'detune.json'}", soft_wrap=True)


def show_family(check: "FamilyCheck") -> None:
    """Print a line for each model, one for each kind of tensor that differs, and the verdict."""
    console = Console(markup=False, highlight=False)
    for model in check.models:
        source = "-" if model.group is None else chr(ord("A") + model.group)
        console.print(f"{source}  {'' if model.belongs else 'NOT '}{model.spec}: {model.reason}", soft_wrap=True)
        for (pattern, cause), tensors in _by_kind(model.foreign, lambda tensor: tensor.cause).items():
            console.print(f"     {pattern}{f' ×{len(tensors)}' * (len(tensors) > 1)}: {cause}", soft_wrap=True)
    table = Table("tensor", "shape", "ranks", "recoverable", box=None, pad_edge=False)
    for (pattern, _), rows in _by_kind(check.tensors, lambda row: (row.shape, row.enough)).items():
        table.add_row(
            f"{pattern} ×{len(rows)}" if len(rows) > 1 else pattern,
            "×".join(map(str, rows[0].shape)),
            _member_ranks(rows),
            "yes" if rows[0].enough else f"no: {rows[0].reason}",
        )
    if check.tensors:
        console.print(table)
    if check.shared:
        console.print(f"{check.shared} tensor{'s' * (check.shared != 1)} identical in all of the family")
    _show_reading(console, check.reading)
    console.print(check.verdict, soft_wrap=True)


def show_comparison(comparison: "Comparison") -> None:
    """Print the tensors that differ, by kind, and the summary."""
    console = Console(markup=False)
    table = Table("tensor", "shape", "W-Error", "worst", "identical bits", box=None, pad_edge=False)
    for (pattern, _), rows in _by_kind(comparison.differing, lambda row: row.shape).items():
        errors = [row.w_error for row in rows]
        table.add_row(
            f"{pattern} ×{len(rows)}" if len(rows) > 1 else pattern,
            "×".join(map(str, rows[0].shape)),
            f"{sum(errors) / len(errors):.2f}",
            f"{max(errors):.2f}",
            f"{100 * sum(row.bit_identical for row in rows) / len(rows):.2f} %",
        )
    if comparison.differing:
        console.print(table)
    for names, where in ((comparison.only_recovered, comparison.truth), (comparison.only_truth, comparison.recovered)):
        if names:
            listed = ", ".join(names[:4]) + (" ..." if len(names) > 4 else "")
            console.print(f"not compared: {where} lacks {listed}", highlight=False, soft_wrap=True)
    summary = comparison.summary
    console.print(
        f"{summary['identical_tensors']} of {summary['tensors']} tensors and "
        f"{100 * summary['bit_identical']:.4f} % of all entries are identical bit for bit",
        highlight=False,
    )
    if summary["mean_w_error"] is not None:
        console.print(
            f"W-Error of the tensors that differ: mean {summary['mean_w_error']:.2f}, "
            f"worst {summary['worst_w_error']:.2f} in {summary['worst_tensor']}",
            highlight=False,
            soft_wrap=True,
        )


def show_extraction(extraction: "Extraction", out: Path) -> None:
    """Print a line for each kind of tensor and where it went, and how closely each adapter gives its model back."""
    from detune.adapters.changes import Kept

    console = Console(markup=False, highlight=False)
    table = Table("tensor", "shape", "kept", "ranks", "identical bits", "largest ulp", box=None, pad_edge=False)
    for (pattern, _), rows in _by_kind(extraction.rows, lambda row: (row.kept, row.shape)).items():
        table.add_row(
            pattern,
            "×".join(map(str, rows[0].shape)),
            rows[0].kept,
            _span(row.rank for row in rows if row.rank),
            f"{100 * sum(row.identical for row in rows) / len(rows):.2f} %",
            f"{max(row.largest_ulps for row in rows)}",
        )
    console.print(table)
    for row in extraction.rows:
        if row.kept is Kept.LEFT_OUT:
            console.print(f"  left out of {row.model}: {row.name}: {row.reason}", soft_wrap=True)
    show_adapters(extraction.summary, out)


def show_adapters(summary: "dict[str, dict[str, Any]]", out: Path) -> None:
    """Print a line for each adapter: what is in it, and what PEFT's merge of it gives back."""
    console = Console(markup=False, highlight=False)
    for name, figures in summary.items():
        whole = f", {figures['whole']} tensors whole" * bool(figures["whole"])
        lost = f", {figures['left out']} LEFT OUT" * bool(figures["left out"])
        shares = (f"{100 * figures[key]:.2f} %" for key in ("identical_of_changed", "identical"))
        console.print(
            f"{name}: {figures['LoRA']} LoRA layers of rank {_span(figures['ranks'])}{whole}{lost}; "
            f"merged by PEFT, {' of the changed entries and '.join(shares)} of all have the model's bits, "
            f"largest deviation {figures['largest_deviation']:.1e} ({figures['largest_ulps']} ulp)",
            soft_wrap=True,
        )
    loading = f"PeftModel.from_pretrained(base, {str(out / next(iter(summary)))!r})"
    console.print(f"wrote {out}; load with {loading}", soft_wrap=True)


def show_pack(report: "PackReport") -> None:
    """Print what a pack saves, and where its bytes are."""
    console = Console(markup=False, highlight=False)
    table = Table("part", "MB", "of the input", box=None, pad_edge=False)
    for part, size in sorted(report.parts_bytes.items(), key=lambda item: -item[1]):
        table.add_row(part, f"{size / 1e6:.2f}", f"{100 * size / report.input_bytes:.2f} %")
    console.print(table)
    console.print(
        f"{len(report.models)} models in {report.files} files, {report.input_bytes / 1e6:.1f} MB: "
        f"packed {100 * report.ratio:.1f} %, zstd alone {100 * report.zstd_ratio:.1f} %",
        soft_wrap=True,
    )
    console.print(
        f"wrote {report.path} in {report.seconds:.1f} s; unpacked in memory, every file has its hash. "
        "The models are where they were",
        soft_wrap=True,
    )


def show_unpack(report: "UnpackReport", out: Path) -> None:
    """Print what was restored."""
    console = Console(markup=False, highlight=False)
    console.print(
        f"restored {len(report.models)} models, {report.files} files, {report.size_bytes / 1e6:.1f} MB, below {out} in "
        f"{report.seconds:.1f} s: every file has the hash that it was packed with",
        soft_wrap=True,
    )


def show_tables(results: "Sequence[CellResult]") -> None:
    """Print the table of each subset of the benchmark, and what to know beside it."""
    from detune.bench.table import remarks, tables

    console = Console(markup=False)
    for subset, frame in tables(results).items():
        table = Table(title=subset, title_justify="left", box=None, pad_edge=False)
        for name in frame.columns:
            table.add_column(name, no_wrap=name != "method")
        for row in frame.itertuples(index=False):
            table.add_row(*row)
        console.print(table)
        console.print()
    for remark in remarks(results):
        console.print(remark, highlight=False, soft_wrap=True)


def show_catalogue() -> None:
    """Print what the benchmark can run on: the published subsets and the recipes."""
    from detune.bench.recipes import RECIPES
    from detune.bench.subsets import PUBLISHED, PUBLISHED_LORAS, REPOSITORY

    console = Console(markup=False, highlight=False)
    table = _catalogue("published", "layers", "rank", "n", "iterations", "base")
    for name, subset in PUBLISHED.items():
        numbers = (subset.layers, subset.rank, subset.models, subset.iterations)
        table.add_row(name, *map(str, numbers), subset.base)
    console.print(table)
    console.print(
        f"n and iterations are the paper's. {PUBLISHED_LORAS} LoRAs each, streamed from the Hub dataset\n"
        f"{REPOSITORY}, or from a local copy with --data DIR:\n"
        f"  hf download {REPOSITORY} --repo-type dataset --local-dir DIR\n",
        soft_wrap=True,
    )
    table = _catalogue("recipe", "layers", "rank", "stands for", "what it is")
    for name, recipe in RECIPES.items():
        table.add_row(name, str(recipe.layers), str(recipe().rank), recipe.stands_for or "", recipe.about)
    console.print(table)
    console.print(
        f"{PUBLISHED_LORAS} LoRAs each, made here and without a network by\n  detune bench build RECIPE --out DIR",
        soft_wrap=True,
    )


def _show_reading(console: Console, reading: Reading | None) -> None:
    if reading is not None:
        share = 100 * reading.read_bytes / max(1, reading.total_bytes)
        console.print(
            f"looked at {reading.rows} rows of each matrix at most: read {reading.read_bytes / 1e6:.1f} MB of "
            f"{reading.total_bytes / 1e6:.1f} MB, {share:.1f} %; the rest may differ, and --rows all reads it",
            highlight=False,
            soft_wrap=True,
        )


def _catalogue(name: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in (name, *columns[:-1]):
        table.add_column(column, no_wrap=True)
    table.add_column(columns[-1], overflow="fold")
    return table


def _by_kind(rows: Iterable[Row], key: Callable[[Row], object]) -> "dict[tuple[str, object], list[Row]]":
    """Rows that differ only in the numbers of their names, together."""
    kinds: dict[tuple[str, object], list[Row]] = defaultdict(list)
    for row in rows:
        kinds[re.sub(r"\d+", "*", row.name), key(row)].append(row)
    # One of a kind keeps its own name.
    return {(group[0].name if len(group) == 1 else pattern, k): group for (pattern, k), group in kinds.items()}


def _ranks(rows: list[TensorRow]) -> str:
    by_model = zip(*(row.ranks for row in rows if row.ranks), strict=False)
    spans = [f"{min(r)}" if min(r) == max(r) else f"{min(r)}-{max(r)}" for r in by_model]
    return spans[0] if spans and len(set(spans)) == 1 else ", ".join(spans)


def _member_ranks(rows: "Sequence[ChangedTensor]") -> str:
    """The ranks of each member over tensors of a kind; a dash where its tensor is not the family's."""
    spans = []
    for ranks in zip(*(row.ranks for row in rows if row.ranks), strict=False):
        known = [rank for rank in ranks if rank is not None]
        low, high = min(known, default=None), max(known, default=None)
        spans.append("-" if low is None else f"{low}" if low == high else f"{low}-{high}")
    return ", ".join(spans)


def _span(numbers: Iterable[int]) -> str:
    known = sorted(set(numbers))
    return "" if not known else f"{known[0]}" if len(known) == 1 else f"{known[0]}-{known[-1]}"


def _expected(rows: Sequence[TensorRow]) -> str:
    """The W-Error to expect, the worst of a kind; a range where no more is known. An exact tensor has none."""
    known = [(row.worst_w_error, row) for row in rows if row.worst_w_error is not None]
    if not known:
        return "none" if rows[0].status is Status.EXACT else ""
    end, worst = max(known, key=itemgetter(0))
    if worst.status is Status.APPROXIMATE:
        return w_error_range(worst.best_w_error, end)
    return f"{worst.predicted_w_error:.2f}"


def _certain(rows: Sequence[TensorRow]) -> str:
    """The least share of entries that are certain on the base's grid, cut so that only all is 100 %."""
    shares = [row.certain if row.grid else None for row in rows]
    if None in shares:
        return "-"
    grids = "/".join(dict.fromkeys(row.grid or "" for row in rows))
    return f"{math.floor(10000 * min(share or 0.0 for share in shares)) / 100:g} % {grids}"


def _largest(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{max(known):.2g}" if known else ""
