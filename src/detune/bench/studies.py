"""Studies: questions that readers of the paper ask next, each answered by a run, a plot and a CSV file.

A study lays out cells for the same runner, so what one study has computed another finds. `STUDIES` names them.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from detune._runtime import OnPart, OnStart
from detune.bench.layers import Layer
from detune.bench.methods import Method, find_method
from detune.bench.plots import colour_of, new_figure, plain, plot_lines, save
from detune.bench.results import CellResult, LayerResult, ResultStore
from detune.bench.run import draw, plan, run
from detune.bench.sheets import write_sheet
from detune.bench.subsets import Subset, nearest
from detune.bench.table import frame_of
from detune.errors import InputError
from detune.methods import Spectral
from detune.methods.spectral import Iteration
from detune.problem import Stack
from detune.problem.stack import matricise

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["STUDIES", "Bench", "Study", "StudyResult", "find_study", "run_study"]


@dataclass(frozen=True)
class Bench:
    """The bench that a study runs on.

    Attributes:
        subsets: The subsets, in the order given.
        store: Where cells are kept.
        models: Numbers of models; empty for the study's own.
        seeds: Draws of the LoRAs.
        on_start: For progress, see `detune.bench.run.run`.
        on_part: See there.
    """

    subsets: tuple[Subset, ...]
    store: ResultStore
    models: tuple[int, ...] = ()
    seeds: tuple[int, ...] = (0,)
    on_start: OnStart | None = None
    on_part: OnPart | None = None

    def cells(
        self,
        methods: Callable[[Subset], Sequence[Method]],
        models: Callable[[Subset], Sequence[int]],
        rank_known: Sequence[bool] = (True,),
    ) -> list[CellResult]:
        """Run methods over every subset."""
        results = []
        for subset in self.subsets:
            numbers = self.models or models(subset)
            tasks = [
                task
                for known in rank_known
                for task in plan(subset, methods(subset), numbers, self.seeds, rank_known=known)
            ]
            results += run(subset, tasks, self.store, on_start=self.on_start, on_part=self.on_part)
        return results


@dataclass(frozen=True)
class StudyResult:
    """The outcome of a study.

    Attributes:
        name: The study.
        frame: Its figures.
        files: The CSV file and the plots.
    """

    name: str
    frame: "pd.DataFrame"
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Study:
    """A question and how it is answered.

    Attributes:
        question: In one line.
        answer: Runs what is needed; the figures and the plot.
    """

    question: str
    answer: "Callable[[Bench], tuple[pd.DataFrame, Figure]]"


def find_study(name: str) -> Study:
    """The study of a name.

    Raises:
        InputError: There is none.
    """
    if name not in STUDIES:
        expected = f"expected one of {', '.join(STUDIES)}"
        raise InputError(f"no study {name!r}", expected, f"did you mean {nearest(name, STUDIES)}?")
    return STUDIES[name]


def run_study(name: str, bench: Bench) -> StudyResult:
    """Answer one question and write `studies/NAME.SUBSET.csv`, `.png` and `.svg` beside the results.

    Args:
        name: A key of `STUDIES`.
        bench: Subsets and where their results are kept.

    Raises:
        InputError: No such study, no subset, or two of one name.
    """
    study = find_study(name)
    names = [subset.name for subset in bench.subsets]
    if not names or len(set(names)) < len(names):
        raise InputError(f"subsets {', '.join(names) or 'none'}", "expected one or more, each once", "name them once")
    frame, figure = study.answer(bench)
    stem = bench.store.folder / "studies" / f"{name}.{'+'.join(names)}"
    files = save(figure, stem)
    sheet = stem.with_name(f"{stem.name}.csv")
    write_sheet(frame, sheet)
    return StudyResult(name, frame, (sheet, *files))


def study_models(bench: Bench) -> "tuple[pd.DataFrame, Figure]":
    """W-Error against the number of models, from two to all."""
    results = bench.cells(
        lambda subset: [find_method(name, subset) for name in ("mean", "spectral", "auto")],
        lambda subset: range(2, len(subset.first().loras) + 1),
    )
    frame = frame_of(results)
    figure, axes = new_figure(len(bench.subsets))
    for axis, (subset, rows) in zip(axes, frame.groupby("subset", sort=False), strict=True):
        means = rows.groupby(["method", "models"], as_index=False)["w_error"].mean()
        plot_lines(axis, means.rename(columns={"method": "label"}))
        axis.set_title(plain(str(subset)))
    return frame, figure


def study_scheduler(bench: Bench) -> "tuple[pd.DataFrame, Figure]":
    """Spectral DeTuning with its rank scheduler and without: at the end, and on the way there."""
    import pandas as pd

    def methods(subset: Subset) -> list[Method]:
        return [
            find_method("spectral", subset),
            Method.of(Spectral(iterations=subset.iterations, schedule=False), "spectral, full rank at once"),
        ]

    results = bench.cells(methods, lambda subset: [_paper_models(subset)])
    frame = frame_of(results)
    figure, axes = new_figure(2 * len(bench.subsets), columns=2)
    traces = []
    for place, subset in enumerate(bench.subsets):
        n = (bench.models or [_paper_models(subset)])[0]
        layers = _spread_layers(subset, 4)
        trace = pd.concat([_trace(subset, layers, n, bench.seeds[0], schedule) for schedule in (True, False)])
        traces.append(trace)
        for axis, column, title in zip(
            axes[2 * place :], ("w_error", "loss"), ("error of the base", "loss"), strict=False
        ):
            for i, (label, line) in enumerate(trace.groupby("label")):
                axis.plot(line["iteration"], line[column], label=plain(str(label)), color=colour_of(str(label), i))
            axis.set_title(plain(f"{subset.name}, n={n}: {title}"))
            axis.set_xlabel("iteration")
            axis.set_ylabel("log10, mean over layers")
            axis.legend(fontsize="small", frameon=False)
    columns = ["subset", "label", "iteration", "rank", "loss", "w_error"]
    return pd.concat([frame, pd.concat(traces)[columns]], ignore_index=True), figure


def study_ranks(bench: Bench) -> "tuple[pd.DataFrame, Figure]":
    """Ranks told against ranks found from the data; give a subset of mixed ranks to see those."""
    looks_for_ranks = {"spectral": False, "auto": True}
    results = bench.cells(
        lambda subset: [find_method(name, subset) for name in looks_for_ranks],
        lambda subset: sorted({3, _paper_models(subset)}),
        rank_known=(True, False),
    )
    frame = frame_of(results)
    frame["ranks_exact"] = [
        _ranks_exact(result, bench.subsets) if looks_for_ranks[result.cell.method] else None for result in results
    ]
    figure, axes = new_figure(len(bench.subsets))
    for axis, (subset, rows) in zip(axes, frame.groupby("subset", sort=False), strict=True):
        labels, values, colours = [], [], []
        for (n, method, rank), cell in rows.groupby(["models", "method", "rank"]):
            labels.append(f"{method}, n={n}, rank {rank}")
            values.append(cell["w_error"].mean())
            colours.append(colour_of(method))
        axis.barh(labels, values, color=colours)
        axis.invert_yaxis()
        axis.set_title(plain(str(subset)))
        axis.set_xlabel("W-Error (lower is better)")
        axis.tick_params(axis="y", labelsize="small")
    return frame, figure


def study_depth(bench: Bench) -> "tuple[pd.DataFrame, Figure]":
    """W-Error against depth and kind of layer, for Spectral DeTuning and for auto."""
    import pandas as pd

    results = bench.cells(
        lambda subset: [find_method(name, subset) for name in ("spectral", "auto")],
        lambda subset: [_paper_models(subset)],
    )
    rows = []
    for result in results:
        places = _places(result.layers)
        for layer in result.layers:
            rows.append(
                {
                    "subset": result.cell.subset,
                    "method": result.cell.method,
                    "models": len(result.cell.loras),
                    "seed": result.cell.seed,
                    "layer": layer.name,
                    "model": layer.model,
                    "kind": layer.kind,
                    "depth": places[layer.index],
                    "w_error": layer.w_error,
                }
            )
    frame = pd.DataFrame(rows)
    figure, axes = new_figure(2 * len(bench.subsets), columns=2)
    panels = [(subset, method) for subset in frame["subset"].unique() for method in ("spectral", "auto")]
    for axis, (subset, method) in zip(axes, panels, strict=True):
        part = frame[(frame["subset"] == subset) & (frame["method"] == method)]
        for (model, kind), line in part.groupby(["model", "kind"]):
            means = line.groupby("depth", as_index=False)["w_error"].mean()
            label = f"{model} {kind}" if part["model"].nunique() > 1 else kind
            axis.plot(means["depth"], means["w_error"], marker="o", markersize=3, label=plain(str(label)))
        axis.set_title(plain(f"{subset}, {method}, n={part['models'].iloc[0]}"))
        axis.set_xlabel("block, from the input on")
        axis.set_ylabel("W-Error (lower is better)")
        axis.legend(fontsize="xx-small", frameon=False, ncols=2)
    return frame, figure


def study_rank_by_models(bench: Bench) -> "tuple[pd.DataFrame, Figure]":
    """Rank against number of models; give subsets that differ in their rank."""
    results = bench.cells(
        lambda subset: [find_method(name, subset) for name in ("spectral", "auto")],
        lambda subset: [n for n in (3, 5, 8, 10, 15) if n <= len(subset.first().loras)],
    )
    frame = frame_of(results)
    first = {subset.name: subset.first() for subset in bench.subsets}
    frame["r"] = [first[result.cell.subset].rank(result.cell.loras) for result in results]
    figure, axes = new_figure(2)
    lowest, highest = frame["w_error"].min(), frame["w_error"].max()
    for axis, method in zip(axes, ("spectral", "auto"), strict=True):
        grid = frame[frame["method"] == method].pivot_table(index="r", columns="models", values="w_error")
        image = axis.imshow(grid, cmap="viridis", vmin=lowest, vmax=highest, aspect="auto")
        for (i, j), value in _entries(grid):
            bright = value > (lowest + highest) / 2
            axis.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=8, color="black" if bright else "white")
        axis.set_xticks(range(len(grid.columns)), [str(n) for n in grid.columns])
        axis.set_yticks(range(len(grid.index)), [str(r) for r in grid.index])
        axis.set_xlabel("models")
        axis.set_ylabel("rank")
        axis.grid(visible=False)
        axis.set_title(plain(method))
    figure.colorbar(image, ax=axes, label="W-Error (lower is better)")
    return frame, figure


STUDIES: Mapping[str, Study] = {
    "models": Study("How many models does it take?", study_models),
    "scheduler": Study("What does the rank scheduler of Spectral DeTuning do?", study_scheduler),
    "ranks": Study("Must the rank be known, and may ranks differ?", study_ranks),
    "depth": Study("Which layers are hard?", study_depth),
    "rank-by-models": Study("How many models does a rank take?", study_rank_by_models),
}


def _paper_models(subset: Subset) -> int:
    """The number of models that the paper takes for a subset, or five, or all."""
    return min(subset.paper_models, len(subset.first().loras))


def _trace(subset: Subset, layers: Sequence[Layer], n: int, seed: int, schedule: bool) -> "pd.DataFrame":
    """Loss and error of every iteration, `log10`, averaged over a few layers spread over the model."""
    import pandas as pd

    solver = Spectral(iterations=subset.iterations, schedule=schedule, on_core=False)
    steps = [_watch(layer, solver, n, seed) for layer in layers]
    rows = pd.concat(steps).groupby("iteration", as_index=False).mean()
    label = "with the scheduler" if schedule else "full rank at once"
    return rows.assign(subset=subset.name, label=label)


def _watch(layer: Layer, solver: Spectral, n: int, seed: int) -> "pd.DataFrame":
    import pandas as pd

    loras = draw(len(layer.loras), n, seed)
    stack = Stack.of([matricise(layer.merged(i)) for i in loras], torch.float32)
    models = torch.stack(stack.matrices).to(stack.dtype)
    truth = matricise(layer.weight).to(stack.dtype)
    rows: list[dict[str, Any]] = []

    def note(step: Iteration) -> None:
        error = float((step.W - truth).square().mean())
        rows.append(
            {
                "iteration": len(rows),
                "rank": step.rank,
                "loss": math.log10(max(step.loss, 1e-300)),
                "w_error": math.log10(max(error, 1e-300)),
            }
        )

    solver.alternate(models, layer.rank(loras), note)
    return pd.DataFrame(rows)


def _spread_layers(subset: Subset, count: int) -> list[Layer]:
    """Some layers spread over the model."""
    rows = len(subset.ranks)
    wanted = {round(i * (rows - 1) / max(1, count - 1)) for i in range(count)}
    return [layer for layer in islice(subset.layers(), max(wanted) + 1) if layer.index in wanted]


def _ranks_exact(result: CellResult, subsets: Sequence[Subset]) -> float:
    """Share of the layers in which every model's rank is that of the LoRA."""
    (subset,) = (subset for subset in subsets if subset.name == result.cell.subset)
    exact = [layer.ranks == tuple(subset.ranks[layer.index][i] for i in result.cell.loras) for layer in result.layers]
    return sum(exact) / len(exact)


def _places(layers: Sequence[LayerResult]) -> dict[int, int]:
    """Each layer's block in the order of the forward pass: by all numbers in its name, down before mid before up."""

    def key(layer: LayerResult) -> tuple[int, ...]:
        stage = next((i for i, part in enumerate(("down_blocks", "mid_block", "up_blocks")) if part in layer.name), 0)
        return (stage, *(int(number) for number in re.findall(r"\.(\d+)(?=\.)", layer.name)))

    order: dict[str, dict[tuple[int, ...], int]] = {}
    for model in {layer.model for layer in layers}:
        keys = sorted({key(layer)[:3] for layer in layers if layer.model == model})
        order[model] = {found: place for place, found in enumerate(keys)}
    return {layer.index: order[layer.model][key(layer)[:3]] for layer in layers}


def _entries(grid: "pd.DataFrame") -> "list[tuple[tuple[int, int], float]]":
    values = grid.to_numpy()
    return [((i, j), float(values[i, j])) for i in range(values.shape[0]) for j in range(values.shape[1])]
