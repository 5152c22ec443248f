"""Files of a Hub repository that are read in part, by range requests, and not stored."""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from detune.checkpoints.entries import Header
from detune.checkpoints.hub import Repository, without_secrets
from detune.checkpoints.safetensors_file import parse_safetensors
from detune.checkpoints.storage import ByteRange
from detune.errors import InputError, reason_of

__all__ = ["HubFiles"]

AT_A_TIME = 4


class HubFiles:
    """The files of a repository: small ones in the local cache, weights where they are.

    Args:
        repository: At the commit whose files are read, whatever becomes of the branch meanwhile.
        root: The small files, as `Repository.download_side_files` left them.
    """

    def __init__(self, repository: Repository, root: Path) -> None:
        from huggingface_hub import HfFileSystem

        self.root = root
        self._repository = repository
        self._hub = HfFileSystem()

    def names(self, directory: str) -> list[str] | None:
        """See `Storage.names`."""
        prefix = f"{directory}/" if directory else ""
        below = [name.removeprefix(prefix) for name in self._repository.files if name.startswith(prefix)]
        return [name for name in below if "/" not in name] if below else None

    def where(self, file: str) -> str:
        """See `Storage.where`."""
        return f"{self._repository.hub_id}/{file}"

    def header(self, file: str) -> Header:
        """See `Storage.header`; of safetensors files only."""

        def read(start: int, length: int) -> bytes:
            return self._range(file, start, length, "the header")

        return parse_safetensors(self.where(file), self._repository.files[file].size_bytes, read)

    def read(self, file: str, parts: Iterable[ByteRange], name: str) -> None:
        """See `Storage.read`; a request for each part, several at a time."""

        def fill(part: ByteRange) -> None:
            part.memory[:] = self._range(file, part.offset, len(part.memory), f"tensor {name!r}")

        wanted = [part for part in parts if len(part.memory)]
        with ThreadPoolExecutor(AT_A_TIME, thread_name_prefix="detune-hub") as pool:
            for _ in pool.map(fill, wanted):
                pass

    def sha256(self, file: str) -> str:
        """See `Storage.sha256`; the Hub says it of all but small files."""
        size_bytes = self._repository.files[file].size_bytes
        return self.known_sha256(file) or hashlib.sha256(self._range(file, 0, size_bytes, "the whole")).hexdigest()

    def known_sha256(self, file: str) -> str | None:
        """See `Storage.known_sha256`."""
        return self._repository.files[file].sha256

    def _range(self, file: str, start: int, length: int, what: str) -> bytes:
        path = f"{self._repository.name}@{self._repository.commit}/{file}"
        stop = min(start + length, self._repository.files[file].size_bytes)
        try:
            # The cache of fsspec would read ahead.
            content: bytes = self._hub.cat_file(path, start=start, end=stop, cache_type="none")
        except Exception as error:
            raise InputError(
                f"cannot read {what} of {self.where(file)} from the Hub",
                without_secrets(f"{type(error).__name__}: {reason_of(error)}"),
                f"try again, or download it with `hf download {self._repository.name}`",
            ) from error
        if len(content) != stop - start:
            raise InputError(
                f"the server of {self.where(file)} does not answer range requests",
                f"got {len(content)} bytes, expected the {stop - start} asked for",
                "download the whole with --rows all",
            )
        return content
