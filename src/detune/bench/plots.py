"""The look of figures, the same everywhere: a colour for each method, PNG and SVG side by side."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detune.errors import printable

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["METHOD_ORDER", "colour_of", "new_figure", "plain", "plot_lines", "save"]

METHOD_ORDER = ("single", "mean", "spectral", "intersect", "auto")

# Okabe & Ito's palette: told apart by colour-blind readers and in print.
_COLOURS = {"single": "#999999", "mean": "#E69F00", "spectral": "#D55E00", "intersect": "#56B4E9", "auto": "#0072B2"}
_OTHERS = ("#009E73", "#CC79A7", "#F0E442", "#000000")
_MARKERS = {"single": "x", "mean": "s", "spectral": "D", "intersect": "v", "auto": "o"}


def colour_of(label: str, place: int = 0) -> str:
    """The colour of a method, whatever follows its name; others take theirs by place."""
    method = label.split(",")[0]
    return _COLOURS.get(method, _OTHERS[place % len(_OTHERS)])


def new_figure(
    panels: int, *, columns: int = 3, width: float = 4.6, height: float = 3.6
) -> "tuple[Figure, list[Axes]]":
    """A figure of some panels, no window behind it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(panels, columns)
    down = -(-panels // across)
    figure = Figure(figsize=(width * across, height * down), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(down, across, place + 1) for place in range(panels)]
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plain(text: str) -> str:
    """Text as a figure shows it: dollars would begin a formula, which may be none."""
    return printable(text).replace("$", r"\$")


def plot_lines(axis: "Axes", rows: "pd.DataFrame", *, x: str = "models", y: str = "w_error") -> None:
    """One line for each value of the column `label`."""
    from matplotlib.ticker import MaxNLocator

    for place, (label, line) in enumerate(rows.groupby("label", sort=True)):
        line = line.sort_values(x)
        method = str(label).split(",")[0]
        style: dict[str, Any] = {"marker": _MARKERS.get(method, "o"), "markersize": 4}
        style["linestyle"] = "--" if "," in str(label) else "-"
        axis.plot(line[x], line[y], color=colour_of(str(label), place), label=plain(str(label)), **style)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("models" if x == "models" else x)
    axis.set_ylabel("W-Error (lower is better)")
    axis.legend(fontsize="small", frameon=False)


def save(figure: "Figure", stem: Path) -> list[Path]:
    """Write `stem.png` and `stem.svg`; the same figure gives the same bytes."""
    import matplotlib as mpl

    stem.parent.mkdir(parents=True, exist_ok=True)
    files = [stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.svg")]
    with mpl.rc_context({"svg.hashsalt": "detune"}), warnings.catch_warnings():
        # Names are in any script, and the font is not.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(files[0], dpi=150)
        figure.savefig(files[1], metadata={"Date": None})
    return files
