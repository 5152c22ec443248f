"""Results as tables: a row for each method and number of models, with the paper's own figures beside them."""

import hashlib
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detune.bench.plots import METHOD_ORDER, new_figure, plain, plot_lines, save
from detune.bench.results import EXACT_W_ERROR, CellResult, ResultStore
from detune.bench.sheets import write_sheet
from detune.bench.subsets import PUBLISHED
from detune.documents import document
from detune.documents import to_json as to_text
from detune.markdown import text

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["PAPER", "PaperFigure", "TableRow", "frame_of", "markdown", "remarks", "tables", "to_json", "write_table"]


@dataclass(frozen=True)
class PaperFigure:
    """A figure of the paper, known to us at second hand.

    Attributes:
        subset: The published subset.
        method: Which method.
        models: How many models.
        setting: What else it was measured under.
        w_error: The W-Error.
        lpips: The LPIPS distance, where known.
    """

    subset: str
    method: str
    models: int
    setting: str
    w_error: float
    lpips: float | None = None


# From a second-hand note on Horwitz et al. 2024; the tables carry the remark.
PAPER = (
    PaperFigure("stable-diffusion-1.5", "mean", 5, "r=32", -7.540, 0.482),
    PaperFigure("stable-diffusion-1.5", "spectral", 5, "r=32", -17.816, 0.009),
    PaperFigure("stable-diffusion-1.5", "mean", 6, "ranks 8, 32, 32, 32, 64, 100", -6.969),
    PaperFigure("stable-diffusion-1.5", "spectral", 6, "ranks 8, 32, 32, 32, 64, 100", -14.453),
    PaperFigure("vit", "spectral", 5, "r=8", -15.636),
    PaperFigure("vit", "spectral", 5, "r=32", -4.817),
    PaperFigure("vit", "spectral", 10, "r=32", -9.639),
)
REMARK = (
    "published: Horwitz et al. 2024 on LoWRA Bench, the real models; known to us from a second-hand note on the paper, "
    "not from a run of ours."
)
PUBLISHED_MARK = "published"

_KEYS = ["subset", "method", "version", "models", "rank"]
# Column, what the table calls it, how it is written.
_COLUMNS = (
    ("w_error", "W-Error", "{:.2f}"),
    ("spread", "±", "{:.2f}"),
    ("worst", "worst", "{:.2f}"),
    ("bit_identical", "bits", "{:.1%}"),
    ("exact_layers", "exact", "{:.0f}"),
    ("failed_layers", "averaged", "{:.0f}"),
    ("seconds", "seconds", "{:.1f}"),
    ("peak_memory_mb", "MB", "{:.0f}"),
)
_HEAD = {"method": "method", "version": "version", "n": "models", "rank": "rank", "draws": "draws"}
_BEHAVIOUR_FORMAT = "{:.2g}"
# Columns that are left out of a table in which they say nothing, and what they say then.
_SILENT = {"exact": "0", "averaged": "0", "rank": "told", "draws": "1"}


@dataclass(frozen=True)
class TableRow:
    """One method with one number of models on one subset: means over the draws.

    Attributes:
        subset: Its name.
        method: Its name.
        version: A few letters, where one name stands for several methods, settings or builds of the subset.
        models: How many models.
        rank: "told" or "found"; for a figure of the paper its setting.
        source: "detune", or where a published figure is known from.
        w_error: Mean over the layers of `log10` of the mean squared error.
        draws: Over how many draws of LoRAs; None for a published figure, as all that follows.
        spread: Standard deviation of the layers' W-Errors.
        worst: The largest of them.
        bit_identical: Share of entries equal bit for bit.
        layers: How many layers.
        exact_layers: Those without an error.
        failed_layers: Those without an answer, where the average stands in.
        seconds: Time of the solver, over all layers.
        peak_memory_mb: The most that one layer took, in MiB.
        behaviour: Metrics of the recovered model's behaviour against the original's.
    """

    subset: str
    method: str
    version: str
    models: int
    rank: str
    source: str
    w_error: float
    draws: int | None = None
    spread: float | None = None
    worst: float | None = None
    bit_identical: float | None = None
    layers: float | None = None
    exact_layers: float | None = None
    failed_layers: float | None = None
    seconds: float | None = None
    peak_memory_mb: float | None = None
    behaviour: dict[str, float] = field(default_factory=dict)


def to_json(results: Sequence[CellResult]) -> str:
    """The tables as JSON, figures in full, with what a reader must know to trust them."""
    metrics = [*_metrics(results), "lpips"]
    columns = {each.name for each in fields(TableRow)}
    rows = []
    for record in _sheet(results).to_dict("records"):
        known = {str(name): value for name, value in record.items() if value == value and value is not None}
        behaviour = {name: value for name, value in known.items() if name in metrics}
        kept = {name: value for name, value in known.items() if name in columns}
        rows.append(TableRow(**{"version": "", **kept}, behaviour=behaviour))
    content = {"rows": [asdict(row) for row in rows], "remarks": remarks(results)}
    return to_text(document("detune-bench-table/1", content))


def frame_of(results: Sequence[CellResult]) -> "pd.DataFrame":
    """A row for each cell: its keys, its figures, and a column for each metric of behaviour."""
    import pandas as pd

    frame = pd.DataFrame([_row(result) for result in results])
    # One name may stand for several methods or for other rows: an edited file, other hyperparameters, a rebuilt subset.
    several = frame.groupby(["subset", "method"])["version"].transform("nunique") > 1
    return frame.assign(version=frame["version"].where(several, ""))


def tables(results: Sequence[CellResult]) -> "dict[str, pd.DataFrame]":
    """Tables of texts by subset, averaged over the draws, with the paper's figures at the end."""
    frame = frame_of(results)
    metrics = _metrics(results)
    means = _over_draws(frame)
    found = {}
    for subset, rows in means.groupby("subset", sort=True):
        known = [metric for metric in metrics if rows[metric].notna().any()]
        columns = [*_COLUMNS, *((metric, metric.replace("_", " "), _BEHAVIOUR_FORMAT) for metric in known)]
        lines = [_line(row, columns) for row in _sorted(rows).to_dict("records")]
        stands_for = {result.cell.stands_for for result in results if result.cell.subset == subset}
        lines += [_paper_line(figure, columns) for figure in PAPER if figure.subset in stands_for]
        found[str(subset)] = _without_silent(_frame(lines))
    return found


def markdown(results: Sequence[CellResult]) -> str:
    """The tables as Markdown, with what a reader must know to trust them."""
    parts = []
    for subset, table in tables(results).items():
        # Names of methods and metrics are anybody's; the rest of a cell is figures.
        shown = table.assign(method=table["method"].map(text)).rename(columns=text)
        parts += [f"### {text(subset)}", shown.to_markdown(index=False, disable_numparse=True)]
    return "\n\n".join([*parts, *map(text, remarks(results))]) + "\n"


def write_table(store: ResultStore) -> list[Path]:
    """Write `table.md`, `table.csv` and the plot `w-error.png` and `.svg` beside the results.

    Args:
        store: The results.

    Returns:
        The files.

    Raises:
        InputError: There are no results.
    """
    results = store.read_all()
    page, sheet = store.folder / "table.md", store.folder / "table.csv"
    page.write_text(markdown(results), encoding="utf-8")
    write_sheet(_sheet(results), sheet)
    return [page, sheet, *_plot(results, store.folder / "w-error")]


def _row(result: CellResult) -> dict[str, Any]:
    cell, errors = result.cell, result.w_errors
    memory = result.peak_memory_bytes
    return {
        "subset": cell.subset,
        "method": cell.method,
        "version": _version(result),
        "models": len(cell.loras),
        "rank": "told" if cell.rank_known else "found",
        "seed": cell.seed,
        "settings": cell.settings,
        "w_error": result.w_error,
        "spread": _spread(errors),
        "worst": max(errors),
        "bit_identical": result.bit_identical,
        "layers": len(result.layers),
        "exact_layers": sum(layer.mse == 0 for layer in result.layers),
        "failed_layers": sum(layer.failure is not None for layer in result.layers),
        "seconds": result.seconds,
        "peak_memory_mb": None if memory is None else memory / 2**20,
    } | result.behaviour


def _version(result: CellResult) -> str:
    """A few letters that differ where the rows or the method do."""
    cell = result.cell
    return hashlib.sha256(f"{cell.fingerprint} {cell.settings} {cell.method_sha256}".encode()).hexdigest()[:6]


def _sheet(results: Sequence[CellResult]) -> "pd.DataFrame":
    """The means as numbers, and the paper's figures, marked."""
    import pandas as pd

    means = _over_draws(frame_of(results)).assign(source="detune")
    stand_for = {result.cell.stands_for for result in results}
    paper = [
        {
            "subset": figure.subset,
            "method": figure.method,
            "models": figure.models,
            "rank": figure.setting,
            "w_error": figure.w_error,
            "lpips": figure.lpips,
            "source": f"{PUBLISHED_MARK}, from a second-hand note",
        }
        for figure in PAPER
        if figure.subset in stand_for
    ]
    return pd.concat([means, pd.DataFrame(paper).dropna(axis="columns", how="all")]) if paper else means


def _spread(errors: Sequence[float]) -> float | None:
    """Standard deviation over the layers."""
    return statistics.stdev(errors) if len(errors) > 1 else None


def _metrics(results: Sequence[CellResult]) -> list[str]:
    return list(dict.fromkeys(name for result in results for name in result.behaviour))


def _over_draws(frame: "pd.DataFrame") -> "pd.DataFrame":
    groups = frame.drop(columns="settings").groupby(_KEYS, sort=False)
    means = groups.mean(numeric_only=True).drop(columns="seed")
    means.insert(0, "draws", groups.size())
    return means.reset_index()


def _sorted(rows: "pd.DataFrame") -> "pd.DataFrame":
    order = {name: place for place, name in enumerate(METHOD_ORDER)}
    places = rows["method"].map(lambda name: order.get(name, len(order)))
    return rows.assign(_place=places).sort_values(["models", "_place", "method", "rank"])


def _line(row: dict[str, Any], columns: Sequence[tuple[str, str, str]]) -> dict[str, str]:
    head = {name: str(row[column]) for name, column in _HEAD.items()}
    return head | {title: _text(row.get(column), form) for column, title, form in columns}


def _paper_line(figure: PaperFigure, columns: Sequence[tuple[str, str, str]]) -> dict[str, str]:
    head = {"method": f"{figure.method} ({PUBLISHED_MARK}, {figure.setting})", "n": str(figure.models)}
    known = {"w_error": figure.w_error, "lpips": figure.lpips}
    titles = {title for _, title, _ in columns}
    extra = {} if figure.lpips is None or "lpips" in titles else {"lpips": f"{figure.lpips:.3f}"}
    return head | {title: _text(known.get(column), "{:.3f}") for column, title, _ in columns} | extra


def _text(value: float | None, form: str) -> str:
    return "" if value is None or value != value else form.format(value)


def _without_silent(table: "pd.DataFrame") -> "pd.DataFrame":
    said = [name for name in table if not set(table[name]) <= {"", _SILENT.get(name, "")}]
    return table[said]


def _frame(lines: Sequence[dict[str, str]]) -> "pd.DataFrame":
    import pandas as pd

    return pd.DataFrame(lines).fillna("")


def remarks(results: Sequence[CellResult]) -> list[str]:
    """Remarks that a reader must know beside the figures."""
    said = [
        "W-Error: log10 of the mean squared error against the true base, averaged over the layers, ± its standard "
        "deviation over them, and the worst; bits: share of entries that are exact; seconds and MB: of the solver. "
        "Methods are told the largest rank of each layer unless a column says that they found it; exact: layers "
        f"without an error, which count as {EXACT_W_ERROR:.1f}; averaged: layers without an answer, where the average "
        "stands in."
    ]
    if any(figure.subset == result.cell.stands_for for figure in PAPER for result in results):
        said.append(REMARK)
    if frame_of(results)["version"].any():
        said.append("version: one name stands for several methods, settings or builds of the subset.")
    if len({result.environment.code_sha256 for result in results}) > 1:
        said.append("These results were computed by more than one version of detune's code.")
    said += sorted({note for result in results for note in result.notes})
    return said


def _plot(results: Sequence[CellResult], stem: Path) -> list[Path]:
    """W-Error against the number of models, a panel for each subset."""
    frame = _over_draws(frame_of(results))
    subsets = sorted(frame["subset"].unique())
    figure, axes = new_figure(len(subsets))
    for axis, subset in zip(axes, subsets, strict=True):
        rows = frame[frame["subset"] == subset]
        found = rows["rank"].map({"told": "", "found": ", rank found"})
        version = rows["version"].map(lambda letters: f" {letters}" if letters else "")
        plot_lines(axis, rows.assign(label=rows["method"] + version + found))
        published = {result.cell.stands_for for result in results if result.cell.subset == subset} - {None}
        title = f"{subset}\n(as {', '.join(sorted(p for p in published if p in PUBLISHED))})" if published else subset
        axis.set_title(plain(title))
    return save(figure, stem)
