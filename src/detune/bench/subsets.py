"""Subsets: the published ones by name, or a folder of parquet files, read a layer at a time."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError, field_validator

from detune._runtime import needs_extra
from detune.bench.sources import REPOSITORY, DatasetFiles, FolderFiles, RowFiles, check_files, resolve_commit
from detune.errors import InputError, cannot_read

if TYPE_CHECKING:
    from detune.bench.layers import Layer

__all__ = [
    "CARD",
    "PUBLISHED",
    "PUBLISHED_LORAS",
    "REPOSITORY",
    "Card",
    "Published",
    "Subset",
    "clean_name",
    "is_name",
    "nearest",
    "open_subset",
]

CARD = "subset.json"
"""Beside the rows of a subset that was built here: what it is."""


@dataclass(frozen=True)
class Published:
    """A subset of the published benchmark, with the settings of the paper.

    Attributes:
        layers: Rows.
        rank: LoRA rank.
        models: LoRAs that the paper uses.
        iterations: Iterations of Spectral DeTuning.
        base: The model before fine-tuning.
    """

    layers: int
    rank: int
    models: int
    iterations: int
    base: str


# Horwitz et al. 2024, Section 5, and the commands of the published code. Each subset has 15 LoRAs.
PUBLISHED = {
    "vit": Published(24, 16, 5, 300, "google/vit-base-patch16-224"),
    "stable-diffusion-1.5": Published(264, 32, 5, 300, "runwayml/stable-diffusion-v1-5"),
    "mistral-7b-v0.1-sft": Published(128, 64, 12, 1000, "mistralai/Mistral-7B-v0.1"),
    "mistral-7b-v0.1-dpo": Published(128, 64, 8, 1000, "a Mistral-7B-v0.1 after supervised fine-tuning"),
}
PUBLISHED_LORAS = 15


@dataclass(frozen=True)
class Subset:
    """Rows of LoWRA Bench, not yet read.

    Attributes:
        name: What the results call it.
        source: A folder, or `repository@commit`.
        stands_for: The published subset whose settings apply; None for none.
        base: The base's checkpoint beside the rows, if it is there.
        inputs: What the base's behaviour is compared on, if it is there.
        rows: Number of layers, where it is known without reading them.
    """

    name: str
    source: str
    stands_for: str | None
    base: Path | None
    inputs: Path | None
    rows: int | None
    _files: RowFiles

    @property
    def iterations(self) -> int:
        """Iterations of Spectral DeTuning that the paper uses for subsets like this."""
        return PUBLISHED[self.stands_for].iterations if self.stands_for else 300

    @property
    def paper_models(self) -> int:
        """Number of models that the paper uses for subsets like this; five for others."""
        return PUBLISHED[self.stands_for].models if self.stands_for else 5

    @property
    def fingerprint(self) -> str:
        """A fingerprint of the rows.

        On the Hub it is the commit of the dataset. For a folder it is a SHA-256 over the bytes of the parquet files,
        taken when it is first asked for, and kept: the same rows in files that are split or compressed in another way
        have another one, and so has a local copy of a published subset.
        """
        return self._files.fingerprint

    @cached_property
    def ranks(self) -> tuple[tuple[int, ...], ...]:
        """The rank of each LoRA in each row. Only the names of layers and the ranks are read.

        Raises:
            InputError: A rank is missing or no positive integer. Or the network fails.
        """
        from detune.bench.layers import rank_columns, ranks_of

        n = len(self.first().loras)
        return ranks_of(self._files.read(rank_columns(n)), self.source)

    def layers(self) -> "Iterator[Layer]":
        """Read the rows, one at a time.

        Raises:
            InputError: A row is damaged; it is named with its layer. Or the network fails.
        """
        from detune.bench.layers import layer_of

        for index, table in enumerate(self._files.tables()):
            yield layer_of(table, index, self.source)

    def first(self) -> "Layer":
        """The first row: names and number of the LoRAs. It is read once.

        Raises:
            InputError: There is none, or it is damaged.
        """
        return self._first

    @cached_property
    def _first(self) -> "Layer":
        for layer in self.layers():
            return layer
        raise InputError(f"{self.source} has no rows", "expected a layer each", "build the subset again")


class Card(BaseModel):
    """The content of `subset.json`: what a subset that was built here is.

    Attributes:
        name: What the results call it; used in names of files.
        stands_for: The published subset whose settings apply.
        about: A line.
        base: What the rows call the base.
        layers: Number of rows.
        ranks: Every rank that a LoRA has.
        loras: Their names.
        left_out: For LoRAs with tensors trained in full beside the factors: their names, which no row holds.
    """

    name: str | None = None
    stands_for: str | None = None
    about: str = ""
    base: str = ""
    layers: int | None = None
    ranks: list[int] = []
    loras: list[str] = []
    left_out: dict[str, list[str]] = {}

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, name: str | None) -> str | None:
        if name is not None and not is_name(name):
            raise ValueError(f"expected letters, digits and any of '+-_. ', got {name!r}")
        return name

    @field_validator("stands_for")
    @classmethod
    def _is_published(cls, stands_for: str | None) -> str | None:
        if stands_for is not None and stands_for not in PUBLISHED:
            raise ValueError(f"expected one of {', '.join(PUBLISHED)}, got {stands_for!r}")
        return stands_for


def is_name(text: str) -> bool:
    """Whether a subset may be called so: its name is part of the names of files, on every system."""
    return re.fullmatch(r"[\w+-]([\w.+ -]*[\w+-])?", text) is not None


def clean_name(text: str) -> str:
    """A text with whatever `is_name` refuses replaced by hyphens."""
    text = re.sub(r"[^\w.+ -]", "-", text)
    return re.sub(r"^[. ]+|[. ]+$", "", text) or "unnamed"


def open_subset(name: str, *, data: Path | None = None, revision: str = "main") -> Subset:
    """Find a subset, without reading its rows.

    Args:
        name: The folder of a subset, or the name of a published one.
        data: A local copy of the published dataset, as `hf download` makes it.
        revision: Revision of the published dataset: a commit, or a branch or tag, which is resolved to the commit that
            it is at now. All rows are read from this commit, and `source` and `fingerprint` record it, so that it can
            be given again. There is no commit built in: `main` is whatever the authors have published last.

    Returns:
        The subset.

    Raises:
        InputError: There is no such subset, or no network to fetch it by.
        DetuneError: The extra `bench` is not installed.
    """
    with needs_extra("bench"):
        import datasets  # noqa: F401
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _open_folder(folder)
    if name not in PUBLISHED:
        raise InputError(
            f"no subset {name!r}",
            f"expected a folder with parquet files or one of {', '.join(PUBLISHED)}",
            f"did you mean {nearest(name, PUBLISHED)}?",
        )
    if data is not None:
        return _open_copy(name, data)
    commit = resolve_commit(revision)
    rows = PUBLISHED[name].layers
    return Subset(name, f"{REPOSITORY}@{commit}", name, None, None, rows, DatasetFiles(name, commit))


def nearest(word: str, words: Any) -> str:
    """The word that looks most like a mistyped one."""
    return repr(get_close_matches(word, list(words), 1, cutoff=0.0)[0])


def _open_folder(folder: Path) -> Subset:
    files = sorted(folder.glob("*.parquet")) or sorted(folder.glob("data/*.parquet"))
    if not files:
        below = sorted({str(path.parent) for path in folder.rglob("*.parquet")})
        raise InputError(
            f"{folder} holds no parquet files",
            f"found some in {', '.join(below[:3])}" if below else "expected them there or in its folder 'data'",
            "give the folder of one subset",
        )
    card = _read_card(folder / CARD)
    rows = check_files(files)
    if card.layers not in (None, rows):
        raise InputError(
            f"{folder} holds {rows} rows",
            f"expected {card.layers}, as its {CARD} says",
            "if its build was interrupted, run it again",
        )
    stands_for = card.stands_for or (folder.name if folder.name in PUBLISHED else None)
    name = card.name or clean_name(folder.resolve().name)
    base, inputs = (path if path.is_dir() else None for path in (folder / "base", folder / "inputs"))
    return Subset(name, str(folder), stands_for, base, inputs, rows, FolderFiles(str(folder), tuple(files)))


def _read_card(path: Path) -> Card:
    if not path.is_file():
        return Card()
    try:
        return Card.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise InputError(
            f"{path} is no card of a subset",
            f"{where + ': ' if where else ''}{problem['msg']}",
            "mend it, or build the subset again",
        ) from error
    except OSError as error:
        raise cannot_read(path, error) from error


def _open_copy(name: str, data: Path) -> Subset:
    """A subset in a local copy of the whole dataset: its card says which files are whose."""
    files = sorted(path for path in data.rglob("*.parquet") if name in path.relative_to(data).parts[:-1]) or sorted(
        data.rglob(f"{name}*.parquet")
    )
    if not files:
        raise InputError(
            f"{data} holds no parquet files of {name!r}",
            f"expected {data / name}/*.parquet",
            f"fetch them: hf download {REPOSITORY} --repo-type dataset --local-dir {data}",
        )
    return Subset(name, str(data), name, None, None, check_files(files), FolderFiles(str(data), tuple(files)))
