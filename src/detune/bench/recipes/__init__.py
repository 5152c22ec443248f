"""Subsets that anybody can build, on two cores and without a network. `RECIPES` names them."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from detune._runtime import OnPart, OnStart, telling
from detune.bench.recipes.base import Recipe
from detune.bench.recipes.diffusion import SdMini
from detune.bench.recipes.minilm import MiniLM
from detune.bench.recipes.mistral import MistralMiniDpo, MistralMiniSft
from detune.bench.recipes.vit import VitMini
from detune.errors import InputError, OutputError

if TYPE_CHECKING:
    from detune.bench.subsets import Subset

__all__ = ["RECIPES", "Recipe", "build_recipe", "find_recipe", "whole"]

RECIPES: dict[str, type[Recipe]] = {
    recipe.name: recipe for recipe in (VitMini, SdMini, MistralMiniSft, MistralMiniDpo, MiniLM)
}


def build_recipe(
    recipe: Recipe,
    out: Path,
    *,
    seeds: Literal["shared", "different"] = "shared",
    seed: int = 0,
    ranks: Sequence[int] = (),
    name: str | None = None,
    on_start: OnStart | None = None,
    on_part: OnPart | None = None,
) -> "Subset":
    """Make the base, train the LoRAs and write the rows.

    `out` gets `base/`, `adapters/TASK/`, `inputs/`, the rows in `data/`, and a card. What is there already is kept, so
    an interrupted build goes on with the adapter that it was at.

    Args:
        recipe: What to build; with other hyperparameters, another subset.
        out: The folder to fill.
        seeds: Whether all LoRAs start from one seed, as those of one script do, or each from its own.
        seed: The first seed.
        ranks: Ranks that the LoRAs take in turn; empty for the recipe's own.
        name: What the subset is called; by default as the recipe, with what departs from it.
        on_start: For progress: called once with what is still to be made.
        on_part: Called with the name of each of these when it is begun, and when it is done.

    Returns:
        The subset.

    Raises:
        InputError: A rank is not positive.
        OutputError: `out` holds another build.
        DetuneError: The extra `bench` is not installed.
    """
    from detune.bench.build import build_subset

    for rank in ranks:
        if rank < 1:
            raise InputError(f"no LoRA has rank {rank}", "expected positive numbers", "give others with --ranks")
    _claim(out, f"{recipe!r} seeds={seeds} seed={seed} ranks={tuple(ranks)}")
    base, inputs = out / "base", out / "inputs"
    adapters = {task: out / "adapters" / task for task in recipe.tasks}
    if on_start:
        made = {"base": base, **adapters, "inputs": inputs}
        on_start(dict.fromkeys([*(part for part, path in made.items() if not path.is_dir()), "rows"], 1))
    with whole(base) as partial:
        if partial:
            with telling(on_part, "base"):
                recipe.make_base(partial)
    for i, (task, adapter) in enumerate(adapters.items()):
        rank = ranks[i % len(ranks)] if ranks else recipe.rank
        with whole(adapter) as partial:
            if partial:
                with telling(on_part, task):
                    own_seed = seed + i if seeds == "different" else seed
                    recipe.train_adapter(base, task, partial, rank=rank, seed=own_seed)
    with whole(inputs) as partial:
        if partial:
            with telling(on_part, "inputs"):
                partial.mkdir()
                recipe.write_inputs(partial)
    usual = recipe.name + ("-different-seeds" if seeds == "different" else "")
    usual += f"-r{'-'.join(map(str, ranks))}" if ranks else ""
    with telling(on_part, "rows"):
        return build_subset(
            base,
            list(adapters.values()),
            out,
            name=name or usual,
            pre_ft_name=f"{recipe.name}/base",
            stands_for=recipe.stands_for,
            about=recipe.about,
        )


def _claim(out: Path, settings: str) -> None:
    """Keep what is found in a folder only if it was made with the same settings."""
    mark = out / "recipe.txt"
    if mark.is_file() and mark.read_text(encoding="utf-8").strip() != settings:
        raise OutputError(
            f"{out} holds another build",
            f"it was made by {mark.read_text(encoding='utf-8').strip()}, expected {settings}",
            "choose another directory, or remove it",
        )
    if not mark.is_file() and out.is_dir() and any(out.iterdir()):
        raise OutputError(f"{out} is not empty", "and holds no build to go on with", "choose another directory")
    out.mkdir(parents=True, exist_ok=True)
    mark.write_text(settings + "\n", encoding="utf-8")


@contextmanager
def whole(path: Path) -> Iterator[Path | None]:
    """Make a directory that appears whole or not at all; None where it is there already."""
    if path.is_dir():
        yield None
        return
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    yield partial
    partial.rename(path)


def find_recipe(name: str, *, quick: bool = False) -> Recipe:
    """The recipe of a name.

    Raises:
        InputError: There is none.
    """
    from detune.bench.subsets import nearest

    if name not in RECIPES:
        raise InputError(
            f"no recipe {name!r}", f"expected one of {', '.join(RECIPES)}", f"did you mean {nearest(name, RECIPES)}?"
        )
    return RECIPES[name].quick() if quick else RECIPES[name]()
