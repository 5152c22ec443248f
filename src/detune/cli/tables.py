"""Reports as tables for people."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Column

from detune.adapters.summary import adapter_sentence, adapter_table
from detune.cli.terminal import Branch, duration, say, show_table, show_tree, terminal_width
from detune.compatibility.name_patterns import by_pattern, counted, spans
from detune.compatibility.reading import Reading
from detune.recovery.report import Report
from detune.recovery.summary import doubts, report_table

# Reasons that are listed; the report has all (a definition).
MOST_DOUBTS = 5
# Columns that a terminal of fewer characters has no room for.
WIDE, LEFT_OUT = 110, ("method", "residual", "× noise")

if TYPE_CHECKING:
    from detune.adapters.extract import Extraction
    from detune.bench.catalogue import Catalogue
    from detune.bench.results import CellResult
    from detune.lineage import Family, Lineage, Node
    from detune.packing import PackReport, UnpackReport
    from detune.plan import Plan
    from detune.recovery.compare import Comparison


def show_report(report: Report, out: Path | None = None) -> None:
    """Print a short table: a line for each kind of tensor that differs, and what became of the rest.

    Args:
        report: Report of `recover` or `inspect`.
        out: Where the checkpoint was written, if it was.
    """
    columns, lines = report_table(report)
    if lines:
        fitted, shown, title = _fitted(columns, lines)
        show_table(fitted, shown, title=title and f"tensors {title}")
    for model in report.inputs:
        if model.left_out is not None:
            say(f"left out {model.spec}: {model.left_out}")
        for note in model.notes if model.left_out is None else ():
            say(f"{model.spec}: {note}")
    for verdict, count in report.counts.items():
        say(f"{count} tensor{'s' * (count != 1)} {verdict.summary}")
    found = doubts(report)
    for doubt in found[:MOST_DOUBTS]:
        say(f"  {doubt}")
    if len(found) > MOST_DOUBTS:
        say(f"  and {len(found) - MOST_DOUBTS} other reasons, which the whole report has")
    if any(row.trust for row in report.tensors) and len(report.inputs) > 1:
        used = [model.spec for model in report.inputs if model.left_out is None]
        say("  models by number: " + ", ".join(f"{i} {name}" for i, name in enumerate(used)))
    _show_reading(report.reading)
    if out is not None:
        took = f"wrote {out} in {report.seconds:.1f} s"
        say(f"{took}; the whole report is {out / 'detune.json'}")


def _fitted(columns: Sequence[str], lines: Sequence[tuple[str, ...]]) -> tuple[list[str], list[tuple[str, ...]], str]:
    """Columns, lines and a title that a terminal has room for.

    Where it is narrow, how a tensor was found is left to the report, and what all names have in common to the title.
    """
    if terminal_width() >= WIDE:
        return list(columns), list(lines), ""
    kept = [i for i, name in enumerate(columns) if name not in LEFT_OUT]
    names, title = _without_common_parts([line[0] for line in lines])
    fitted = [(name, *(line[i] for i in kept[1:])) for name, line in zip(names, lines, strict=True)]
    return [columns[i] for i in kept], fitted, title


def _without_common_parts(names: Sequence[str]) -> tuple[list[str], str]:
    """Names of kinds of tensors, without the first and last parts that all have, and how they read with these.

    Example:
        >>> _without_common_parts(["layers.*.q.weight ×2", "layers.*.k.weight"])
        (['q ×2', 'k'], 'layers.*.….weight')
    """
    parts = [name.partition(" ") for name in names]
    split = [name.split(".") for name, _, _ in parts]
    shortest = min(map(len, split)) - 1
    first = next((i for i in range(shortest) if len({each[i] for each in split}) > 1), shortest)
    last = next((i for i in range(shortest - first) if len({each[-1 - i] for each in split}) > 1), shortest - first)
    if len(names) < 2 or not first + last:
        return list(names), ""
    inner = [".".join(each[first : len(each) - last]) for each in split]
    title = ".".join([*split[0][:first], "…", *split[0][len(split[0]) - last :]])
    return [f"{name}{space}{count}" for name, (_, space, count) in zip(inner, parts, strict=True)], title


def show_family(check: "Family") -> None:
    """Print a line for each model, one for each kind of tensor that differs, the tree, and the verdict."""
    for model in check.models:
        source = "-" if model.group is None else chr(ord("A") + model.group)
        say(f"{source}  {'' if model.belongs else 'NOT '}{model.spec}: {model.reason}")
        for (pattern, cause), tensors in by_pattern(model.foreign, lambda tensor: tensor.cause).items():
            say(f"     {counted(pattern, tensors)}: {cause}")
    lines = [
        (
            counted(pattern, rows),
            "×".join(map(str, rows[0].shape)),
            ", ".join(spans(rows)),
            "yes" if rows[0].enough else f"no: {rows[0].reason}",
        )
        for (pattern, _), rows in by_pattern(check.tensors, lambda row: (row.shape, row.enough)).items()
    ]
    if check.tensors:
        show_table(("tensor", "shape", "ranks", "recoverable"), lines)
    if check.shared:
        say(f"{check.shared} tensor{'s' * (check.shared != 1)} identical in all of the family")
    if check.lineage is not None:
        _show_lineage(check.lineage)
    _show_reading(check.reading)
    say(check.verdict)


def _show_lineage(lineage: "Lineage") -> None:
    """Print each tree, and what of it can be recovered or is not sure."""

    def label(node: "Node") -> str:
        name = node.name if node.spec else f"({node.name}, none of these models)"
        return f"{name}: {node.edge}{'' if node.sure else '?'}" if node.edge else name

    def grow(node: "Node") -> Branch:
        return Branch(label(node), tuple(map(grow, lineage.children(node.name))))

    for root in lineage.children(None):
        tree = grow(root)
        show_tree(tree.label, tree.branches)
    if not all(node.sure for node in lineage.nodes):
        say("?: too little tells which of the two is older; the node with most neighbours is taken for the root")
    for node in lineage.nodes:
        if node.recover_from:
            say(f"{node.name} can be recovered: recover --node {node.name}")


def show_comparison(comparison: "Comparison") -> None:
    """Print the tensors that differ, by kind, and the summary."""
    lines = [
        (
            counted(pattern, rows),
            "×".join(map(str, rows[0].shape)),
            f"{sum(row.w_error for row in rows) / len(rows):.2f}",
            f"{max(row.w_error for row in rows):.2f}",
            f"{100 * sum(row.bit_identical for row in rows) / len(rows):.2f} %",
        )
        for (pattern, _), rows in by_pattern(comparison.differing, lambda row: row.shape).items()
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

    show_table(*adapter_table(extraction.rows))
    for row in extraction.rows:
        if row.kept is Kept.LEFT_OUT:
            say(f"  left out of {row.model}: {row.name}: {row.reason}")
    show_adapters(extraction.summary, out)


def show_adapters(summary: "dict[str, dict[str, Any]]", out: Path) -> None:
    """Print a line for each adapter: what is in it, and what PEFT's merge of it gives back."""
    for name, figures in summary.items():
        say(f"{name}: {adapter_sentence(figures)}")
    # A pipeline's adapters lie in a directory for each component.
    first = min(out.rglob("adapter_config.json"), default=None)
    if first is not None:
        component = "".join(f".{part}" for part in first.parent.relative_to(out).parts[1:])
        say(f"wrote {out}; load with PeftModel.from_pretrained(base{component}, {str(first.parent)!r})")


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


def show_plan(plan: "Plan") -> None:
    """Print what a command would do."""
    lines = [
        (
            read.spec,
            str(read.files),
            str(read.tensors),
            f"{read.size_bytes / 1e6:.1f}",
            f"{read.download_bytes / 1e6:.1f}" if read.download_bytes else "",
            f"left out: {read.left_out}" if read.left_out else "",
        )
        for read in plan.reads
    ]
    if lines:
        show_table(("would read", "files", "tensors", "MB", "MB to download", ""), lines)
        say(f"{plan.changed} tensors to compute, {plan.copied} to copy, by the rows that were looked at")
    for made in plan.writes:
        size = f"{made.how_sure} {made.size_bytes / 1e6:.1f} MB"
        say(f"would write {made.what} {made.path}: {made.files} file{'s' * (made.files != 1)}, {size}")
    if plan.free_bytes is not None:
        say(f"{plan.free_bytes / 1e6:.1f} MB are free there")
    say(f"about {duration(plan.seconds)}, to a factor of two or so; nothing was written")
    for part in plan.time:
        say(f"  {part.what} {duration(part.seconds)}: {part.source}")


def show_tables(results: "Sequence[CellResult]") -> None:
    """Print the table of each subset of the benchmark, and what to know beside it."""
    from detune.bench.table import remarks, tables

    for subset, frame in tables(results).items():
        columns = [Column(name, no_wrap=name != "method") for name in frame.columns]
        show_table(columns, frame.itertuples(index=False), title=subset)
        say()
    for remark in remarks(results):
        say(remark)


def show_catalogue(catalogue: "Catalogue") -> None:
    """Print what the benchmark can run on: the published subsets and the recipes."""
    columns = _catalogue("published", "layers", "rank", "n", "iterations", "base")
    rows = {name: (each.layers, each.rank, each.models, each.iterations) for name, each in catalogue.published.items()}
    show_table(columns, ((name, *map(str, row), catalogue.published[name].base) for name, row in rows.items()))
    say(f"n and iterations are the paper's. {catalogue.loras} LoRAs each, streamed from the Hub dataset")
    say(f"{catalogue.repository}, or from a local copy with --data DIR:")
    say(f"  hf download {catalogue.repository} --repo-type dataset --local-dir DIR")
    say()
    columns = _catalogue("recipe", "layers", "rank", "stands for", "what it is")
    about = {
        name: (each.layers, each.rank, each.stands_for or "", each.about) for name, each in catalogue.recipes.items()
    }
    show_table(columns, ((name, *map(str, row)) for name, row in about.items()))
    say(f"{catalogue.loras} LoRAs each, made here and without a network by")
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
