"""The catalogue of the benchmark: the published subsets, and the recipes to build one's own."""

from dataclasses import asdict, dataclass

from detune.bench.recipes import RECIPES
from detune.bench.subsets import PUBLISHED, PUBLISHED_LORAS, REPOSITORY, Published
from detune.documents import document
from detune.documents import to_json as to_text

__all__ = ["Catalogue", "RecipeEntry"]


@dataclass(frozen=True)
class RecipeEntry:
    """A recipe.

    Attributes:
        layers: Rows of the subset that it builds.
        rank: LoRA rank.
        stands_for: The published subset whose settings apply; None for none.
        about: What it is, in a line.
    """

    layers: int
    rank: int
    stands_for: str | None
    about: str


@dataclass(frozen=True)
class Catalogue:
    """The subsets that the benchmark can run on.

    Attributes:
        repository: The Hub dataset of the published subsets.
        loras: How many LoRAs each subset has.
        published: The published subsets by name.
        recipes: The recipes by name.
    """

    repository: str
    loras: int
    published: dict[str, Published]
    recipes: dict[str, RecipeEntry]

    @classmethod
    def now(cls) -> "Catalogue":
        """All that there is."""
        recipes = {
            name: RecipeEntry(each.layers, each().rank, each.stands_for, each.about) for name, each in RECIPES.items()
        }
        return cls(REPOSITORY, PUBLISHED_LORAS, dict(PUBLISHED), recipes)

    def to_json(self) -> str:
        """All of it as JSON."""
        return to_text(document("detune-bench-list/1", asdict(self)))
