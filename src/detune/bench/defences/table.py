"""The table of defences in Markdown, in JSON and as a figure."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from detune.attacks import ATTACKS
from detune.bench.defences.result import DefenceOutcome, RowResult
from detune.bench.plots import plain
from detune.documents import document
from detune.documents import to_json as to_text
from detune.markdown import text

__all__ = ["draw", "markdown", "to_json", "write"]

# Places of the columns beside the map, in its cells.
_BESIDE = (-0.4, 0.5, 1.3)

# More than that is all of it.
_MANY = 1e4

_COLOURS: dict[str, str] = {
    DefenceOutcome.SURVIVES: "#0072B2",
    DefenceOutcome.PARTLY: "#E69F00",
    DefenceOutcome.BROKEN: "#D55E00",
}


def write(rows: Sequence[RowResult], out: Path) -> tuple[Path, Path]:
    """Write `defences.md` and `defences.png`.

    Args:
        rows: The results.
        out: An existing folder.

    Returns:
        Both files.
    """
    table, figure = out / "defences.md", out / "defences.png"
    table.write_text(markdown(rows), encoding="utf-8")
    draw(rows, figure)
    return table, figure


def markdown(rows: Sequence[RowResult]) -> str:
    """One line for each defence, one column for each attack; the attack that came closest in bold."""
    attacks = _attacks(rows)
    header = ["defence", "n", *attacks, "embeddings", "times closer", "task accuracy", "outcome"]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        found = {attack.name: attack for attack in row.attacks}
        figures = []
        for attack in attacks:
            cell = found.get(attack)
            if cell is None:
                figures.append("")
            elif cell.w_error is None:
                figures.append("none")
            else:
                figures.append(f"**{cell.w_error:.2f}**" if cell is row.best else f"{cell.w_error:.2f}")
        closest = min((cell.embeddings for cell in row.answers if cell.embeddings is not None), default=None)
        lines.append(
            [
                text(row.name),
                str(row.models),
                *figures,
                DefenceOutcome.NO_ANSWER if closest is None else f"{closest:.1e}",
                _times(row.times_closer),
                f"{row.accuracy:.3f} ({_change(row)})",
                row.outcome,
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def to_json(rows: Sequence[RowResult]) -> str:
    """The table as JSON: each row with what follows from it."""
    content = [
        asdict(row) | {"cost": row.cost, "times_closer": row.times_closer, "outcome": row.outcome} for row in rows
    ]
    return to_text(document("detune-bench-defences/2", {"rows": content}))


def draw(rows: Sequence[RowResult], file: Path) -> None:
    """A heat map: W-Error by defence and attack, with the cost and the outcome beside it.

    Args:
        rows: The results.
        file: The PNG to write.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    attacks = _attacks(rows)
    values = np.full((len(rows), len(attacks)), np.nan)
    for i, row in enumerate(rows):
        for cell in row.attacks:
            if cell.w_error is not None:
                values[i, attacks.index(cell.name)] = cell.w_error
    figure = Figure(figsize=(3.4 + 0.85 * len(attacks) + 3.0, 1.3 + 0.36 * len(rows)), facecolor="white")
    FigureCanvasAgg(figure)
    axis = figure.add_axes((3.0 / figure.get_figwidth(), 0.03, 0.85 * len(attacks) / figure.get_figwidth(), 0.85))
    axis.imshow(values, cmap="YlOrRd_r", aspect="auto", vmin=-20, vmax=-4)
    for i, row in enumerate(rows):
        for cell in row.attacks:
            light = cell.w_error is not None and cell.w_error < -11.5
            told = DefenceOutcome.NO_ANSWER if cell.w_error is None else f"{cell.w_error:.1f}"
            size = 7 if cell.w_error is None else 9
            weight = "bold" if cell is row.best else "normal"
            label = axis.text(attacks.index(cell.name), i, told, ha="center", va="center", fontsize=size)
            label.set(fontweight=weight, color="white" if light else "black")
        closer = "" if row.times_closer is None else f"{_times(row.times_closer)}×"
        beside = (closer, _change(row), row.outcome)
        for place, told in zip(_BESIDE, beside, strict=True):
            colour = _COLOURS.get(told, "black")
            axis.text(len(attacks) + place, i, told, va="center", fontsize=9, color=colour)
    for place, told in zip(_BESIDE, ("closer", "task", "outcome"), strict=True):
        axis.text(len(attacks) + place, -0.85, told, va="center", fontsize=9, color="#555555")
    axis.set_xticks(range(len(attacks)), attacks, rotation=0)
    axis.set_yticks(range(len(rows)), [f"{plain(row.name)}, n={row.models}" for row in rows])
    axis.xaxis.tick_top()
    axis.tick_params(length=0, labelsize=9)
    axis.spines[:].set_visible(False)
    axis.set_xticks(np.arange(-0.5, len(attacks)), minor=True)
    axis.set_yticks(np.arange(-0.5, len(rows)), minor=True)
    axis.grid(which="minor", color="white", linewidth=1.5)
    axis.tick_params(which="minor", length=0)
    figure.suptitle("What each attack makes of each defence: W-Error, lower is closer to the base", fontsize=11)
    figure.savefig(file, dpi=150)


def _attacks(rows: Sequence[RowResult]) -> list[str]:
    tried = {cell.name for row in rows for cell in row.attacks}
    return [name for name in ATTACKS if name in tried]


def _times(times: float | None) -> str:
    if times is None:
        return DefenceOutcome.NO_ANSWER
    if times >= _MANY:
        return f"> {_MANY:.0e}".replace("e+0", "e")
    return f"{times:.1f}" if times < 100 else f"{times:.0f}"


def _change(row: RowResult) -> str:
    # Adding zero turns -0.0 into 0.0.
    return f"{round(-row.cost, 3) + 0.0:+.1%}"
