"""The charts' common style: an empty figure, colours, and labels that carry no HTML.

Colours are the names of the page's CSS variables, so that its script can give them their values in light, in dark and
on paper. Every text that comes from a model is escaped: plotly takes some HTML in labels.
"""

import html
import json
from dataclasses import dataclass
from typing import Any

from detune.errors import printable

__all__ = ["DASHES", "SERIES", "SYMBOLS", "Chart", "label", "minus", "new_figure", "to_json"]

# The most characters of a label.
LONGEST = 40
# Told apart without their colours too.
SERIES = tuple(f"var(--series-{k})" for k in range(1, 7))
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x")


@dataclass(frozen=True)
class Chart:
    """One chart of the page.

    Attributes:
        id: Id of its element.
        title: Its heading.
        caption: What it shows, for those who do not see it too.
        figure: For plotly.js: data and layout.
        choices: Labels of the traces of which one is shown at a time; empty where all are.
    """

    id: str
    title: str
    caption: str
    figure: dict[str, Any]
    choices: tuple[str, ...] = ()


def new_figure(height: int) -> Any:
    """An empty figure in the page's colours.

    Args:
        height: In pixels.

    Returns:
        A `plotly.graph_objects.Figure`.
    """
    import plotly.graph_objects as go

    axis = {
        "gridcolor": "var(--line)",
        "linecolor": "var(--line)",
        "zeroline": False,
        "fixedrange": True,
        "title": {"font": {"size": 13}, "standoff": 12},
        "automargin": True,
        "ticks": "",
    }
    return go.Figure(
        layout={
            "template": {"layout": {"annotationdefaults": {"showarrow": False}}},
            "height": height,
            "autosize": True,
            "margin": {"l": 8, "r": 12, "t": 34, "b": 8},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"color": "var(--ink-soft)", "size": 13, "family": "var(--font)"},
            "hoverlabel": {"bgcolor": "var(--ink)", "bordercolor": "var(--ink)", "font": {"color": "var(--paper)"}},
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "bgcolor": "rgba(0,0,0,0)"},
            "dragmode": False,
            "xaxis": axis,
            "yaxis": axis,
        }
    )


def to_json(figure: Any) -> dict[str, Any]:
    """A figure as plotly.js takes it."""
    made: dict[str, Any] = json.loads(figure.to_json())
    return made


def minus(error: float) -> str:
    """A W-Error with a minus sign as print has it."""
    return f"{error:.1f}".replace("-", "−")


def label(text: str, longest: int = LONGEST) -> str:
    """A text of a model's as plotly shows it: shortened in the middle, in one line, and without HTML."""
    text = printable(text)
    if len(text) > longest:
        text = f"{text[: longest // 2]}…{text[-longest // 2 :]}"
    # Templates of hovering take "%{" for a variable.
    return html.escape(text).replace("%{", "%&#123;")
