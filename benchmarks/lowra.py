"""The mini subsets of LoWRA Bench: build them, run the methods and the studies, and put the figures on their page.

python benchmarks/lowra.py                    # everything: some hours on two cores
python benchmarks/lowra.py vit-mini minilm    # these subsets; the rest of the page stays

Subsets and results are kept in `benchmarks/.cache/lowra`; what is there is not made again. The page is
docs/studies.md: its prose is written by hand, everything between two `<!-- name -->` marks by this script.
"""

import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from detune.bench.methods import find_method
from detune.bench.recipes import build_recipe, find_recipe
from detune.bench.results import CellResult, ResultStore
from detune.bench.run import Task, plan, run_all
from detune.bench.studies import Bench, run_study
from detune.bench.subsets import Subset, open_subset
from detune.bench.table import frame_of, markdown

HERE = Path(__file__).parent
CACHE = HERE / ".cache" / "lowra"
PAGE = HERE.parent / "docs" / "studies.md"
FIGURES = HERE.parent / "docs" / "studies"
THREADS = 1  # of the solvers: two processes of this script fill two cores
ALL = 15

# Numbers of models that Spectral DeTuning is not run with: 264 layers, or 1000 iterations at rank 64.
SLOW = {"sd-mini": {3}, "mistral-mini-sft": {3, 5}, "mistral-mini-dpo": {3, 5}}

# The largest distance at which a recovered model counts as the original: activation distance, SBERT distance, levels of
# an 8-bit image.
SAME = {"activation": 1e-10, "sbert": 1e-6, "levels": 1}


class Build(NamedTuple):
    """A subset: its recipe, and how it departs from it."""

    recipe: str
    seeds: str = "shared"
    ranks: tuple[int, ...] = ()


SUBSETS = {
    "vit-mini": Build("vit-mini"),
    "minilm": Build("minilm"),
    "sd-mini": Build("sd-mini"),
    "mistral-mini-sft": Build("mistral-mini-sft"),
    "mistral-mini-dpo": Build("mistral-mini-dpo"),
    "vit-mini-different-seeds": Build("vit-mini", seeds="different"),
    "vit-mini-r4": Build("vit-mini", ranks=(4,)),
    "vit-mini-r8": Build("vit-mini", ranks=(8,)),
    "vit-mini-r32": Build("vit-mini", ranks=(32,)),
    "vit-mini-r4-8-16-32": Build("vit-mini", ranks=(4, 8, 16, 32)),
}
TABLES = ("vit-mini", "sd-mini", "mistral-mini-sft", "mistral-mini-dpo", "minilm", "vit-mini-different-seeds")
# Study, its subsets, and the numbers of models where they are not the study's own.
STUDIES = (
    ("models", ("vit-mini", "vit-mini-different-seeds"), ()),
    ("models", ("minilm",), (2, 3, 5, 8, 15)),
    ("scheduler", ("vit-mini", "minilm"), (ALL,)),
    ("ranks", ("vit-mini", "vit-mini-r4-8-16-32"), ()),
    ("depth", ("vit-mini", "sd-mini"), (5,)),
    ("rank-by-models", ("vit-mini-r4", "vit-mini-r8", "vit-mini", "vit-mini-r32"), ()),
)


def main() -> None:
    chosen = sys.argv[1:] or list(SUBSETS)
    unknown = set(chosen) - set(SUBSETS)
    if unknown:
        raise SystemExit(f"no subset {', '.join(unknown)}: expected {', '.join(SUBSETS)}")
    torch.set_num_threads(THREADS)
    store = ResultStore(CACHE / "results")
    for name in chosen:
        subset = build(name)
        if name in TABLES:
            run_methods(subset, store)
            keep(f"table {name}", markdown(of_table(store, subset)))
            keep(f"target {name}", target(of_table(store, subset)))
    for study, subsets, models in STUDIES:
        if set(subsets) & set(chosen) and all((CACHE / name / "subset.json").is_file() for name in subsets):
            opened = tuple(open_subset(str(CACHE / name)) for name in subsets)
            result = run_study(study, Bench(opened, store, models))
            for file in result.files:
                FIGURES.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, FIGURES / file.name)
            print(f"{study}: {', '.join(file.name for file in result.files)}", flush=True)


def build(name: str) -> Subset:
    """Train what is not there yet."""
    recipe, seeds, ranks = SUBSETS[name]
    return build_recipe(
        find_recipe(recipe),
        CACHE / name,
        seeds=seeds,
        ranks=ranks,
        on_step=lambda what: print(f"{name}: {what}", flush=True),
    )


def tasks_of(subset: Subset) -> list[Task]:
    """Three models, five, and all; the published method is left out where it would take hours and decide nothing."""
    tasks = []
    for name in ("single", "mean", "spectral", "intersect", "auto"):
        skipped = SLOW.get(subset.name, set()) if name == "spectral" else set()
        counts = [n for n in (3, 5, ALL) if n not in skipped]
        tasks += plan(subset, [find_method(name, subset)], counts)
    return tasks


def run_methods(subset: Subset, store: ResultStore) -> None:
    run_all(subset, tasks_of(subset), store)


def of_table(store: ResultStore, subset: Subset) -> list[CellResult]:
    return [store.read(task.cell) for task in tasks_of(subset)]


def target(results: list[CellResult]) -> str:
    """What must hold: three models by ours at or below fifteen by Spectral DeTuning, and the same behaviour."""
    frame = frame_of(results)

    def cell(method: str, models: int):
        return frame[(frame["method"] == method) & (frame["models"] == models)].iloc[0]

    spectral, lines = cell("spectral", ALL), []
    for method in ("intersect", "auto"):
        ours = cell(method, 3)
        lines.append(
            f"- W-Error, {method} with 3 models {ours['w_error']:.2f}, spectral with {ALL} {spectral['w_error']:.2f}: "
            + ("met" if ours["w_error"] <= spectral["w_error"] else "MISSED")
        )
    ours = cell("auto", 3)
    for metric, limit in SAME.items():
        if metric in frame:
            met = ours[metric] <= limit and ours[metric] <= max(spectral[metric], limit)
            lines.append(
                f"- {metric.replace('_', ' ')}, auto with 3 models {ours[metric]:.2g} (at most {limit:g}), "
                f"spectral with {ALL} {spectral[metric]:.2g}: " + ("met" if met else "MISSED")
            )
    return "\n".join(lines) + "\n"


def keep(name: str, text: str) -> None:
    """Replace what stands on the page between two marks of this name."""
    mark = f"<!-- {name} -->"
    page = PAGE.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(mark)}.*?{re.escape(mark)}", re.S)
    if not pattern.search(page):
        raise SystemExit(f"{PAGE} has no pair of marks {mark}")
    PAGE.write_text(pattern.sub(lambda _: f"{mark}\n\n{text.strip()}\n\n{mark}", page), encoding="utf-8")
    print(f"{name}\n{text}", flush=True)


if __name__ == "__main__":
    main()
