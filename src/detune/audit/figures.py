"""The charts of the page, as plotly figures."""

import math
from dataclasses import dataclass

from detune._runtime import needs_extra
from detune.audit.drawing import DASHES, SERIES, SYMBOLS, Chart, label, minus, new_figure, to_json
from detune.audit.naming import short_names
from detune.audit.record import AuditReport, Outcome, TensorEntry

__all__ = ["charts", "error_of"]

# Cells of a map of more blocks are too narrow for their figures.
MOST_LABELLED = 12
# The prediction is meant to be this close, in log10.
CLOSE = 0.3


def charts(report: AuditReport) -> tuple[Chart, ...]:
    """The charts that a report has figures for, in the order of the page.

    Raises:
        DetuneError: The extra `audit` is not installed.
    """
    with needs_extra("audit"):
        made = [_curve(report), _heat_map(report), _spectra(report), _scatter(report)]
    return tuple(chart for chart in made if chart is not None)


def error_of(report: AuditReport, outcome: Outcome) -> float | None:
    """The W-Error against the base, or else the predicted one; None where there is none, or the error is zero."""
    return outcome.predicted_w_error if report.base is None else outcome.w_error


def _is_exact(report: AuditReport, outcome: Outcome) -> bool:
    return outcome.is_exact(measured=report.base is not None)


def _curve(report: AuditReport) -> Chart | None:

    curve, matrices = report.curve, len(report.matrices)
    if not matrices:
        return None
    x = [point.models for point in curve]
    errors = [point.w_error for point in curve]
    predicted = [point.predicted_w_error for point in curve]
    started = _fine_tuned(report)
    known = [value for value in (*errors, *predicted, started) if value is not None]
    figure = new_figure(height=400)
    if report.base is not None:
        spread = [point for point in curve if point.best is not None and point.worst is not None]
        figure.add_scatter(
            x=[point.models for point in spread] + [point.models for point in reversed(spread)],
            y=[point.best for point in spread] + [point.worst for point in reversed(spread)],
            mode="lines",
            fill="toself",
            fillcolor="var(--band)",
            line={"width": 0},
            hoverinfo="skip",
            name="best to worst matrix",
        )
        figure.add_scatter(
            x=x,
            y=errors,
            mode="lines+markers",
            line={"color": "var(--accent)", "width": 3},
            marker={"size": 9},
            name="measured against the base",
            hovertemplate="%{x} releases: %{y:.2f}<extra></extra>",
        )
    if any(value is not None for value in predicted):
        figure.add_scatter(
            x=x,
            y=predicted,
            mode="lines+markers" if report.base is None else "markers",
            line={"color": "var(--series-1)", "width": 2.5},
            marker={"size": 12, "symbol": "diamond-open", "color": "var(--series-1)", "line": {"width": 2}},
            name="predicted without it",
            hovertemplate="%{x} releases: %{y:.2f} predicted<extra></extra>",
        )
    if started is not None:
        figure.add_hline(y=started, line={"color": "var(--muted)", "dash": "dot", "width": 1.5})
        figure.add_annotation(
            x=1, xref="paper", y=started, text="the fine-tuned weights themselves", yshift=10, xanchor="right"
        )
    for point in curve:
        exact = sum(_is_exact(report, entry.outcomes[point.models - 1]) for entry in report.matrices)
        if exact == matrices:
            low = min(known, default=-20.0)
            figure.add_annotation(x=point.models, y=low, text="exact", font={"color": "var(--accent)"}, yshift=10)
    release = report.verdict.one_too_many
    if release is not None:
        figure.add_vline(x=release, line={"color": "var(--accent)", "width": 1.5, "dash": "dash"})
        figure.add_annotation(
            x=release,
            y=0.55,
            yref="paper",
            text=f"release {release}: one too many",
            xanchor="right" if release == len(curve) else "left",
            xshift=-6 if release == len(curve) else 6,
            font={"color": "var(--accent)"},
        )
    labels = [f"{point.models}<br>{point.given_away} of {matrices}" for point in curve]
    figure.update_xaxes(
        title_text="releases used, and matrices given away", tickvals=x, ticktext=labels, range=[0.7, len(x) + 0.3]
    )
    figure.update_yaxes(title_text="W-Error (log10 of mean squared error)")
    told = "; ".join(
        f"{point.models}: {point.given_away} of {matrices}"
        + (f", W-Error {minus(error)}" if (error := point.w_error if report.base else point.predicted_w_error) else "")
        for point in curve
    )
    caption = f"Matrices given away by the number of releases: {told}. Lower is closer to the base."
    return Chart("curve", "How many releases does it take?", caption, to_json(figure))


def _heat_map(report: AuditReport) -> Chart | None:
    import plotly.graph_objects as go

    placed = [entry for entry in report.matrices if entry.depth is not None]
    if not placed:
        return None
    names = short_names(dict.fromkeys(entry.kind for entry in placed))
    depths = sorted({entry.depth for entry in placed if entry.depth is not None})
    cells = {(entry.kind, entry.depth): entry for entry in placed}
    every = [
        error for entry in placed for outcome in entry.outcomes if (error := error_of(report, outcome)) is not None
    ]
    started = _fine_tuned(report)
    low, high = min(every, default=-20.0), max([*every, *([started] if started is not None else [])], default=0.0)
    figure = new_figure(height=196 + 46 * len(names))
    figure.update_layout(margin_b=76)
    labelled = len(depths) <= MOST_LABELLED
    gap = 3 if labelled else 1
    for models in range(1, len(report.curve) + 1):
        rows = [[_cell(report, cells.get((kind, depth)), models, low) for depth in depths] for kind in names]
        figure.add_trace(
            go.Heatmap(
                x=[str(depth) for depth in depths],
                y=[label(name) for name in names.values()],
                z=[[cell.value for cell in row] for row in rows],
                text=[[cell.text for cell in row] for row in rows],
                customdata=[[cell.told for cell in row] for row in rows],
                texttemplate="%{text}" if labelled else "",
                hovertemplate="%{customdata}<extra></extra>",
                colorscale=[
                    [0, "var(--heat-3)"],
                    [0.35, "var(--heat-2)"],
                    [0.7, "var(--heat-1)"],
                    [1, "var(--heat-0)"],
                ],
                zmin=low,
                zmax=high if high > low else low + 1,
                xgap=gap,
                ygap=gap,
                visible=models == len(report.curve),
                colorbar={
                    "orientation": "h",
                    "thickness": 10,
                    "len": 0.6,
                    "y": 0,
                    "yref": "container",
                    "yanchor": "bottom",
                    "title": {"text": "W-Error: left is closer to the base", "side": "bottom", "font": {"size": 12}},
                    "tickfont": {"size": 12},
                    "outlinewidth": 0,
                },
            )
        )
    figure.update_xaxes(title_text="depth (block)", type="category", showgrid=False, side="top")
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False, automargin=True)
    worst = max(
        (error for entry in placed if (error := error_of(report, entry.outcomes[-1])) is not None), default=None
    )
    kinds = ", ".join(names.values())
    caption = f"W-Error of each fine-tuned matrix, by block and kind ({kinds})" + (
        f"; with all releases {minus(worst)} at most." if worst is not None else "."
    )
    choices = tuple(str(models) for models in range(1, len(report.curve) + 1))
    return Chart("map", "Where in the model?", caption, to_json(figure), choices)


@dataclass(frozen=True)
class _Cell:
    """One matrix of the heat map."""

    value: float | None
    text: str
    told: str


def _cell(report: AuditReport, entry: TensorEntry | None, models: int, exact: float) -> _Cell:
    if entry is None:
        return _Cell(None, "", "not fine-tuned")
    outcome = entry.outcomes[models - 1]
    error = exact if _is_exact(report, outcome) else error_of(report, outcome)
    text = "exact" if _is_exact(report, outcome) else "–" if error is None else minus(error)
    # A range, where there is one and nothing was measured.
    shown = (report.base is None and outcome.expected.replace("-", "−")) or text
    told = f"{label(entry.name, 80)}<br>{shown}, {outcome.verdict}, by {label(outcome.method)}"
    return _Cell(error, text, told)


def _spectra(report: AuditReport) -> Chart | None:
    shown = [entry for entry in report.matrices if entry.spectrum is not None]
    if not shown:
        return None
    figure = new_figure(height=420)
    names = short_names(dict.fromkeys(entry.kind for entry in shown))
    noise = 0.0
    for k, entry in enumerate(shown):
        spectrum = entry.spectrum
        assert spectrum is not None
        noise = max(noise, spectrum.noise)
        named = label(names[entry.kind] if entry.depth is None else f"{entry.depth}, {names[entry.kind]}")
        colour = SERIES[k % len(SERIES)]
        figure.add_scatter(
            x=list(range(1, len(spectrum.values) + 1)),
            y=[value if value > 0 else None for value in spectrum.values],
            mode="lines",
            line={"color": colour, "width": 2, "dash": DASHES[k % len(DASHES)]},
            name=named,
            legendgroup=str(k),
            hovertemplate=f"{named}<br>singular value %{{x}}: %{{y:.2e}}<extra></extra>",
        )
        if spectrum.rank and spectrum.rank <= len(spectrum.values):
            figure.add_scatter(
                x=[spectrum.rank],
                y=[spectrum.values[spectrum.rank - 1]],
                mode="markers",
                marker={"color": colour, "size": 11, "symbol": "circle-open", "line": {"width": 2.5}},
                legendgroup=str(k),
                showlegend=False,
                hovertemplate=f"{named}<br>ranks add up to {spectrum.rank}<extra></extra>",
            )
    figure.add_hline(y=noise, line={"color": "var(--muted)", "dash": "dot", "width": 1.5})
    figure.add_annotation(
        x=1,
        xref="paper",
        y=math.log10(noise) if noise else 0,
        text="what rounding alone reaches",
        yshift=10,
        xanchor="right",
    )
    ranks = sorted({entry.spectrum.rank for entry in shown if entry.spectrum is not None and entry.spectrum.rank})
    figure.update_xaxes(title_text="singular value, by size")
    figure.update_yaxes(title_text="size", type="log", exponentformat="power", dtick=2)
    cliff = f" The rings are where the ranks found add up: {', '.join(map(str, ranks))}." * bool(ranks)
    caption = f"Singular values of the second release minus the first, in {len(shown)} of the matrices.{cliff}"
    return Chart("spectra", "What gives the ranks away?", caption, to_json(figure))


def _scatter(report: AuditReport) -> Chart | None:
    points = [
        (models, entry.name, outcome.predicted_w_error, outcome.w_error)
        for models in range(1, len(report.curve) + 1)
        for entry in report.matrices
        if (outcome := entry.outcomes[models - 1]).predicted_w_error is not None and outcome.w_error is not None
    ]
    if report.base is None or not points:
        return None
    figure = new_figure(height=420)
    values = [value for _, _, predicted, true in points for value in (predicted, true)]
    low, high = min(values) - 0.4, max(values) + 0.4
    figure.add_scatter(
        x=[low, high, high, low],
        y=[low - CLOSE, high - CLOSE, high + CLOSE, low + CLOSE],
        mode="lines",
        fill="toself",
        fillcolor="var(--band)",
        line={"width": 0},
        hoverinfo="skip",
        name=f"within {CLOSE}",
    )
    for k, models in enumerate(dict.fromkeys(models for models, *_ in points)):
        chosen = [point for point in points if point[0] == models]
        figure.add_scatter(
            x=[predicted for _, _, predicted, _ in chosen],
            y=[true for *_, true in chosen],
            customdata=[label(name, 80) for _, name, _, _ in chosen],
            mode="markers",
            marker={"size": 9, "symbol": SYMBOLS[k % len(SYMBOLS)], "color": SERIES[k % len(SERIES)], "opacity": 0.85},
            name=f"{models} release{'s' * (models > 1)}",
            hovertemplate="%{customdata}<br>predicted %{x:.2f}, true %{y:.2f}<extra></extra>",
        )
    figure.update_xaxes(title_text="predicted W-Error", range=[low, high])
    figure.update_yaxes(title_text="true W-Error", range=[low, high])
    close = sum(abs(predicted - true) <= CLOSE for _, _, predicted, true in points)
    worst = max(abs(predicted - true) for _, _, predicted, true in points)
    caption = (
        f"What the certificate predicts without the base, against the truth: {close} of {len(points)} within {CLOSE}, "
        f"all within {worst:.2f}."
    )
    return Chart("scatter", "Would an outsider know how close it is?", caption, to_json(figure))


def _fine_tuned(report: AuditReport) -> float | None:
    """The W-Error of the releases themselves."""
    changes = [2 * math.log10(entry.change) for entry in report.matrices if entry.change]
    return sum(changes) / len(changes) if changes else None
