"""Where the rows come from: the published subsets by name, or a folder of parquet files; a layer at a time."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detune.errors import InputError
from detune.training import needs_extra

if TYPE_CHECKING:
    from detune.bench.layers import Layer

__all__ = ["CARD", "PUBLISHED", "Published", "Subset", "nearest", "open_subset"]

REPOSITORY = "Eliahu/LoWRA-Bench"
CARD = "subset.json"
"""Beside the rows of a subset that was built here: what it is."""

_BLOCK_BYTES = 1 << 24


@dataclass(frozen=True)
class Published:
    """A subset of the published benchmark, with the settings of the paper.

    Attributes:
        layers: Rows.
        rank: LoRA rank.
        models: LoRAs that the paper uses.
        iterations: Of Spectral DeTuning.
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
        source: A folder, or `repository@revision`.
        fingerprint: SHA-256 over the parquet files, or the commit of the published dataset: the same rows, the same
            fingerprint.
        stands_for: The published subset whose settings apply; None for none.
        base: The base's checkpoint beside the rows, if it is there.
        inputs: What the base's behaviour is compared on, if it is there.
        rows: Number of layers, where it is known without reading them.
    """

    name: str
    source: str
    fingerprint: str
    stands_for: str | None
    base: Path | None
    inputs: Path | None
    rows: int | None
    _arguments: dict[str, Any]

    @property
    def iterations(self) -> int:
        """Iterations of Spectral DeTuning that the paper uses for subsets like this."""
        return PUBLISHED[self.stands_for].iterations if self.stands_for else 300

    @property
    def paper_models(self) -> int:
        """Number of models that the paper uses for subsets like this; five for others."""
        return PUBLISHED[self.stands_for].models if self.stands_for else 5

    def layers(self) -> "Iterator[Layer]":
        """Read the rows, one at a time.

        Raises:
            InputError: A row is damaged; it is named with its layer. Or the network fails.
        """
        from detune.bench.layers import layer_of

        with _from_hub() if self._arguments["path"] == REPOSITORY else _from_disk(self.source):
            for index, table in enumerate(_stream(self._arguments)):
                yield layer_of(table, index, self.source)

    def first(self) -> "Layer":
        """Read the first row: names and number of the LoRAs.

        Raises:
            InputError: There is none, or it is damaged.
        """
        for layer in self.layers():
            return layer
        raise InputError(f"{self.source} has no rows", "expected a layer each", "build the subset again")


def open_subset(name: str, *, data: Path | None = None, revision: str = "main") -> Subset:
    """Find a subset, without reading its rows.

    Args:
        name: The folder of a subset, or the name of a published one.
        data: A local copy of the published dataset, as `hf download` makes it.
        revision: Of the published dataset: a commit, or a branch, which is resolved to the commit it is at.

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
    commit = _resolve(revision)
    arguments = {"path": REPOSITORY, "name": name, "revision": commit}
    rows = PUBLISHED[name].layers
    return Subset(name, f"{REPOSITORY}@{commit}", commit, name, None, None, rows, arguments)


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
    path = folder / CARD
    card = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    stands_for = card.get("stands_for") or (folder.name if folder.name in PUBLISHED else None)
    base, inputs = folder / "base", folder / "inputs"
    return Subset(
        card.get("name", folder.resolve().name),
        str(folder),
        _hash(files),
        stands_for,
        base if base.is_dir() else None,
        inputs if inputs.is_dir() else None,
        _check_files(files),
        {"path": "parquet", "data_files": {"train": [str(file) for file in files]}},
    )


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
    arguments = {"path": "parquet", "data_files": {"train": [str(file) for file in files]}}
    return Subset(name, str(data), _hash(files), name, None, None, _check_files(files), arguments)


def _check_files(files: list[Path]) -> int:
    """Look at the columns before the first row is read: the number of rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from detune.bench.layers import count_loras

    rows = 0
    for file in files:
        try:
            metadata = pq.read_metadata(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"{file} is no parquet file", str(error), "copy or build it again") from None
        count_loras(metadata.schema.to_arrow_schema().names, str(file))
        rows += metadata.num_rows
    return rows


def _hash(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()


def _stream(arguments: dict[str, Any]) -> "Iterator[Any]":
    """Arrow tables of one row. Batches of one keep a single layer in memory, however the files group their rows."""
    from datasets import load_dataset

    rows = load_dataset(**arguments, split="train", streaming=True, batch_size=1)
    yield from rows.with_format("arrow").iter(batch_size=1)


def _resolve(revision: str) -> str:
    from huggingface_hub import HfApi

    with _from_hub():
        commit = HfApi().dataset_info(REPOSITORY, revision=revision).sha
    assert commit is not None, "the Hub names the commit of a revision"
    return commit


@contextmanager
def _from_disk(source: str) -> Iterator[None]:
    """Turn what Arrow raises into one line."""
    import pyarrow as pa

    try:
        yield
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"{source} is damaged", str(error).splitlines()[0], "copy or build it again") from error


@contextmanager
def _from_hub() -> Iterator[None]:
    """Turn connections that fail, the Hub's refusals and its offline mode into one line."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # its HTTP client's, whichever that is

    try:
        yield
    except (OSError, HTTPError) as error:
        raise InputError(
            f"cannot read {REPOSITORY} from the Hub",
            f"{type(error).__name__}: {str(error).splitlines()[0]}",
            f"elsewhere: hf download {REPOSITORY} --repo-type dataset --local-dir DIR; and here: --data DIR",
        ) from error
