"""The parquet files that rows come from, in a folder or on the Hub, read a row at a time."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from detune.errors import InputError, reason_of

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["REPOSITORY", "DatasetFiles", "FolderFiles", "RowFiles", "check_files", "resolve_commit"]

REPOSITORY = "Eliahu/LoWRA-Bench"

_BLOCK_BYTES = 1 << 24
_BUFFER_BYTES = 1 << 20


class RowFiles(Protocol):
    """A source of a subset's rows."""

    @property
    def fingerprint(self) -> str:
        """A key that equal rows share."""

    def tables(self) -> "Iterator[pa.Table]":
        """The rows, each a table of one."""

    def read(self, columns: Sequence[str]) -> "pa.Table":
        """Some columns of all rows."""


@dataclass(frozen=True)
class FolderFiles:
    """Parquet files on disk.

    Attributes:
        source: What errors call them.
        paths: In the order of the rows.
    """

    source: str
    paths: tuple[Path, ...]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the bytes of the files, as they are when this is first asked for."""
        digest = hashlib.sha256()
        with self._named():
            for path in self.paths:
                with path.open("rb") as stream:
                    while block := stream.read(_BLOCK_BYTES):
                        digest.update(block)
        return digest.hexdigest()

    def tables(self) -> "Iterator[pa.Table]":
        """The rows, each a table of one.

        Raises:
            InputError: A file is damaged.
        """
        with self._named():
            for path in self.paths:
                yield from _tables(path)

    def read(self, columns: Sequence[str]) -> "pa.Table":
        """Some columns of all rows, and of nothing else.

        Raises:
            InputError: A file is damaged.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        with self._named():
            return pa.concat_tables([pq.ParquetFile(path).read(list(columns)) for path in self.paths])

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Turn what Arrow raises into one line."""
        import pyarrow as pa

        try:
            yield
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{self.source} is damaged", reason_of(error), "copy or build it again") from error


@dataclass(frozen=True)
class DatasetFiles:
    """A subset of the published dataset, on the Hub.

    Attributes:
        name: Name of the subset.
        commit: Commit of the dataset.
    """

    name: str
    commit: str

    @property
    def fingerprint(self) -> str:
        """The commit: the Hub changes no file without another one."""
        return self.commit

    @cached_property
    def urls(self) -> tuple[str, ...]:
        """The files of the subset, found by `datasets` from the dataset's card.

        Raises:
            InputError: The Hub cannot be reached, or has no such subset at this commit.
        """
        from datasets import load_dataset_builder

        with _from_hub():
            builder = load_dataset_builder(REPOSITORY, self.name, revision=self.commit)
        urls = (builder.config.data_files or {}).get("train", ())
        if not urls:
            raise InputError(
                f"{REPOSITORY}@{self.commit} has no files of {self.name!r}",
                "expected parquet files in its split 'train'",
                "give another --revision",
            )
        return tuple(str(url) for url in urls)

    def tables(self) -> "Iterator[pa.Table]":
        """The rows, each a table of one, fetched as they are asked for.

        Raises:
            InputError: The connection fails.
        """
        for url in self.urls:
            with _from_hub(), _remote(url) as stream:
                yield from _tables(stream)

    def read(self, columns: Sequence[str]) -> "pa.Table":
        """Some columns of all rows; the others are not fetched.

        Raises:
            InputError: The connection fails.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        tables = []
        for url in self.urls:
            with _from_hub(), _remote(url) as stream:
                tables.append(pq.ParquetFile(stream).read(list(columns)))
        return pa.concat_tables(tables)


def resolve_commit(revision: str) -> str:
    """The commit of the published dataset that a branch or tag is at.

    Raises:
        InputError: The Hub cannot be reached, or has no such revision.
    """
    from huggingface_hub import HfApi

    with _from_hub():
        commit = HfApi().dataset_info(REPOSITORY, revision=revision).sha
    assert commit is not None, "the Hub names the commit of a revision"
    return commit


def check_files(files: Sequence[Path]) -> int:
    """Look at the columns before the first row is read.

    Args:
        files: The parquet files of one subset.

    Returns:
        The number of rows.

    Raises:
        InputError: One is no parquet file, lacks a column, or has another number of LoRAs than the first.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from detune.bench.layers import count_loras

    rows, loras = 0, 0
    for file in files:
        try:
            metadata = pq.read_metadata(file)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{file} is no parquet file", reason_of(error), "copy or build it again") from None
        found = count_loras(metadata.schema.to_arrow_schema().names, str(file))
        if loras and found != loras:
            raise InputError(
                f"{file} has rows of {found} LoRAs",
                f"expected {loras}, as {files[0]} has",
                "keep the files of one subset in a folder of their own",
            )
        loras = found
        rows += metadata.num_rows
    return rows


def _tables(file: Any) -> "Iterator[pa.Table]":
    """Tables of one row.

    Arrow's dataset scanner, on which the streaming of `datasets` stands, decodes whole row groups, and those may hold
    a whole subset. This reads each column through a small buffer, so that one row is in memory at a time.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER_BYTES) as parquet:
        for batch in parquet.iter_batches(batch_size=1):
            yield pa.Table.from_batches([batch])


@contextmanager
def _remote(url: str) -> Iterator[Any]:
    """A file on the Hub. Its own read-ahead is off: columns are read in turn, from places far apart."""
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]  # it has no types

    system, path = url_to_fs(url)
    with system.open(path, "rb", cache_type="none") as stream:
        yield stream


@contextmanager
def _from_hub() -> Iterator[None]:
    """Turn connections that fail, the Hub's refusals and its offline mode into one line."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # its HTTP client's, whichever that is

    try:
        yield
    # datasets says with a ValueError that it knows no such subset; Arrow's errors on damaged files are some too.
    except (OSError, ValueError, HTTPError, DatasetsError) as error:
        raise InputError(
            f"cannot read {REPOSITORY} from the Hub",
            f"{type(error).__name__}: {reason_of(error)}",
            f"elsewhere: hf download {REPOSITORY} --repo-type dataset --local-dir DIR; and here: --data DIR",
        ) from error
