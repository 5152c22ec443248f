"""What there is to run on: the published subsets and the recipes."""

from rich.console import Console
from rich.table import Table

from detune.bench.recipes import RECIPES
from detune.bench.subsets import PUBLISHED, PUBLISHED_LORAS, REPOSITORY

__all__ = ["show_catalogue"]


def show_catalogue() -> None:
    """Print the published subsets and the recipes."""
    console = Console(markup=False, highlight=False)
    table = _table("published", "layers", "rank", "n", "iterations", "base")
    for name, subset in PUBLISHED.items():
        numbers = (subset.layers, subset.rank, subset.models, subset.iterations)
        table.add_row(name, *map(str, numbers), subset.base)
    console.print(table)
    console.print(
        f"n and iterations are the paper's. {PUBLISHED_LORAS} LoRAs each, streamed from the Hub dataset\n"
        f"{REPOSITORY}, or from a local copy with --data DIR:\n"
        f"  hf download {REPOSITORY} --repo-type dataset --local-dir DIR\n",
        soft_wrap=True,
    )
    table = _table("recipe", "rank", "stands for", "what it is")
    for name, recipe in RECIPES.items():
        table.add_row(name, str(recipe().rank), recipe.stands_for or "", recipe.about)
    console.print(table)
    console.print("15 LoRAs each, trained here: detune bench build RECIPE --out DIR")


def _table(name: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(name, no_wrap=True)
    for column in columns[:-1]:
        table.add_column(column, no_wrap=True)
    table.add_column(columns[-1], overflow="fold")
    return table
