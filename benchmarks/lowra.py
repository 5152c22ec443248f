"""The mini subsets of LoWRA Bench: build them, run the methods and the studies, and put the figures on their page.

python benchmarks/lowra.py                    # everything: some hours on two cores
python benchmarks/lowra.py vit-mini minilm    # these subsets; the rest of the page stays

Subsets and results are kept in `benchmarks/.cache/lowra`; what is there is not made again. The page is
docs/studies.md: its prose is written by hand, everything between two `<!-- name -->` marks by this script.
"""

import re
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from filelock import FileLock

from detune.bench.methods import find_method
from detune.bench.recipes import RECIPES, Recipe, build_recipe, find_recipe
from detune.bench.recipes.vit import VitMini
from detune.bench.results import CellResult, ResultStore
from detune.bench.run import Task, plan, run_all
from detune.bench.studies import Bench, run_study
from detune.bench.subsets import Subset, open_subset
from detune.bench.table import markdown

HERE = Path(__file__).parent
CACHE = HERE / ".cache" / "lowra"
PAGE = HERE.parent / "docs" / "studies.md"
FIGURES = HERE.parent / "docs" / "studies"
THREADS = 1  # of the solvers: two processes of this script fill two cores
ALL = 15

# Where a method is not run with 3, 5 and 15 models: 264 layers, or 1000 iterations at rank 64, take hours.
COUNTS = {
    ("sd-mini", "spectral"): (ALL,),
    ("sd-mini", "auto"): (),
    ("sd-mini", "intersect"): (3, ALL),
    ("mistral-mini-sft", "spectral"): (ALL,),
    ("mistral-mini-dpo", "spectral"): (ALL,),
}

# The largest distance at which a recovered model counts as the original: activation distance, SBERT distance, levels of
# an 8-bit image.
SAME = {"activation": 1e-10, "sbert": 1e-6, "levels": 1}


class Build(NamedTuple):
    """A subset: its recipe, and how it departs from it."""

    recipe: Recipe
    seeds: Literal["shared", "different"] = "shared"
    ranks: tuple[int, ...] = ()


# Small enough to be built several times, for the studies of ranks: matrices 64x64, of an image of four patches.
NARROW = VitMini(
    rank=8, alpha=8, hidden=64, heads=1, mlp=128, image_pixels=16, base_steps=150, steps=40, batch=16, threads=1
)
SUBSETS = {
    **{name: Build(find_recipe(name)) for name in RECIPES},
    "vit-mini-different-seeds": Build(find_recipe("vit-mini"), seeds="different"),
    "narrow-r2": Build(NARROW, ranks=(2,)),
    "narrow-r4": Build(NARROW, ranks=(4,)),
    "narrow-r8": Build(NARROW, ranks=(8,)),
    "narrow-r16": Build(NARROW, ranks=(16,)),
    "narrow-r2-4-8-16": Build(NARROW, ranks=(2, 4, 8, 16)),
}
TABLES = (*RECIPES, "vit-mini-different-seeds")
# Study, its subsets, and the numbers of models where they are not the study's own.
STUDIES = (
    ("models", ("vit-mini", "vit-mini-different-seeds"), (2, 3, 4, 5, 6, 8, 10, 12, ALL)),
    ("scheduler", ("vit-mini", "narrow-r8"), (5,)),
    ("ranks", ("vit-mini", "narrow-r2-4-8-16"), ()),
    ("depth", ("vit-mini", "minilm"), ()),
    ("rank-by-models", ("narrow-r2", "narrow-r4", "narrow-r8", "narrow-r16"), ()),
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
            keep(f"table {name}", markdown(of_table(store, subset)).partition("\n")[2])  # the page has the heading
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
    say = partial(print, f"{name}:", flush=True)
    return build_recipe(recipe, CACHE / name, seeds=seeds, ranks=ranks, name=name, on_step=say)


def tasks_of(subset: Subset) -> list[Task]:
    """Three models, five, and all."""
    tasks = []
    for name in ("single", "mean", "spectral", "intersect", "auto"):
        counts = COUNTS.get((subset.name, name), (3, 5, ALL))
        tasks += plan(subset, [find_method(name, subset)], counts) if counts else []
    return tasks


def run_methods(subset: Subset, store: ResultStore) -> None:
    run_all(subset, tasks_of(subset), store)


def of_table(store: ResultStore, subset: Subset) -> list[CellResult]:
    return [store.read(task.cell) for task in tasks_of(subset)]


def target(results: list[CellResult]) -> str:
    """What must hold: three models by ours at or below fifteen by Spectral DeTuning, and the same behaviour."""
    cells = {(result.cell.method, len(result.cell.loras)): result for result in results}
    spectral, lines = cells["spectral", ALL], []
    for method in ("intersect", "auto"):
        ours = cells.get((method, 3))
        if ours is None:
            lines.append(f"- {method} with 3 models: not run")
            continue
        lines.append(
            f"- W-Error: {method} with 3 models {ours.w_error:.2f}, spectral with {ALL} {spectral.w_error:.2f}: "
            + ("met" if ours.w_error <= spectral.w_error else "MISSED")
        )
        for metric, limit in SAME.items():
            if metric in ours.behaviour:
                value, theirs = ours.behaviour[metric], spectral.behaviour[metric]
                met = value <= limit and value <= max(theirs, limit)
                lines.append(
                    f"- {metric}: {method} with 3 models {value:.2g} (at most {limit:g}), "
                    f"spectral with {ALL} {theirs:.2g}: " + ("met" if met else "MISSED")
                )
    return "\n".join(lines) + "\n"


def keep(name: str, text: str) -> None:
    """Replace what stands on the page between two marks of this name."""
    mark = f"<!-- {name} -->"
    with FileLock(CACHE / "page.lock"):  # of two processes of this script
        _keep(name, mark, text)


def _keep(name: str, mark: str, text: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(mark)}.*?{re.escape(mark)}", re.S)
    if not pattern.search(page):
        raise SystemExit(f"{PAGE} has no pair of marks {mark}")
    PAGE.write_text(pattern.sub(lambda _: f"{mark}\n\n{text.strip()}\n\n{mark}", page), encoding="utf-8")
    print(f"{name}\n{text}", flush=True)


if __name__ == "__main__":
    main()
