"""Repositories of the Hub, through huggingface_hub: what is in one, and its files in the local cache.

The client's cache is used as it is: downloads resume, and other libraries find the same files. A file that another
cached repository has too, by its SHA-256, is not downloaded again: a family's untouched text encoder comes once.
"""

import logging
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from detune.checkpoints.formats import WEIGHT_SUFFIXES
from detune.checkpoints.layout import component_dirs, is_index, pick_weights, weight_map
from detune.checkpoints.side_files import CARD, MAX_CARD_BYTES, MAX_SIDE_FILE_BYTES, is_side_file
from detune.errors import InputError, reason_of

__all__ = [
    "HubFile",
    "Repository",
    "cached_snapshot",
    "fetch",
    "find_repository",
    "is_hub_id",
    "is_on_hub",
    "locate",
    "without_secrets",
]

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")


def is_hub_id(text: str) -> bool:
    """Say whether a text has the form of a Hub id, `org/name` or `org/name@revision`."""
    return _HUB_ID.fullmatch(text) is not None


def is_on_hub(spec: str | Path) -> bool:
    """Whether a spec is a Hub id, and no path that exists."""
    text = os.fspath(spec)
    return is_hub_id(text) and not Path(text).expanduser().exists()


@dataclass(frozen=True)
class HubFile:
    """One file of a repository.

    Attributes:
        size_bytes: Its size.
        sha256: Of its content, in hexadecimal; None for small files, of which the Hub does not say.
    """

    size_bytes: int
    sha256: str | None


@dataclass(frozen=True)
class Repository:
    """A repository at one commit.

    Attributes:
        hub_id: As the user typed it.
        name: `org/name`.
        revision: The branch, tag or commit asked for; None is the default branch.
        commit: The commit that this was at the time of asking.
        files: What is in it, by path.
    """

    hub_id: str
    name: str
    revision: str | None
    commit: str
    files: Mapping[str, HubFile]

    def download(self, wanted: Collection[str], *, quietly: bool = False) -> Path:
        """Bring files into the local cache.

        Args:
            wanted: Their paths.
            quietly: Without a bar of progress, which a terminal shows otherwise.

        Returns:
            The directory of the snapshot.

        Raises:
            InputError: They cannot be downloaded.
        """
        import huggingface_hub
        from huggingface_hub.utils.tqdm import tqdm

        class Bar(tqdm):
            def __init__(self, *args: Any, **options: Any) -> None:
                # None is: where there is a terminal.
                super().__init__(*args, **{**options, "disable": quietly or None})  # type: ignore[no-untyped-call]

        self._share(wanted)
        try:
            # The name is the one that was given: the cache knows it when there is no network.
            path = huggingface_hub.snapshot_download(
                self.name,
                revision=self.revision,
                allow_patterns=list(wanted),
                tqdm_class=Bar,
            )
        except Exception as error:
            raise _explain(self.hub_id, error) from error
        return Path(path)

    def download_side_files(self) -> Path:
        """Download the small files: configuration, indices of shards, tokenizer."""
        small = [path for path in self.files if _is_small(PurePosixPath(path).name)]
        for path in small:
            if self.files[path].size_bytes > MAX_SIDE_FILE_BYTES:
                raise InputError(
                    f"{path} of {self.hub_id} is too large to be what it is called",
                    f"it has {self.files[path].size_bytes} bytes, expected at most {MAX_SIDE_FILE_BYTES}",
                    "do not trust this model",
                )
        return self.download(small, quietly=True)

    def weights(self, root: Path) -> list[str]:
        """Choose the weight files that a loader would read.

        Args:
            root: What `download_side_files` returned.

        Returns:
            Their paths.

        Raises:
            InputError: The choice is ambiguous.
        """
        if "adapter_config.json" in self.files:
            return [name for name in ("adapter_model.safetensors", "adapter_model.bin") if name in self.files][:1]
        needed: list[str] = []
        for component in component_dirs(root):
            prefix = f"{component}/" if component else ""
            here = {name.removeprefix(prefix) for name in self.files if name.startswith(prefix)}
            chosen = pick_weights({name for name in here if "/" not in name}, f"{self.hub_id}/{component}".rstrip("/"))
            if chosen is None:
                continue
            files = sorted(set(weight_map(root / prefix / chosen).values())) if chosen.endswith(".json") else [chosen]
            needed += [prefix + name for name in files]
        return needed

    def _share(self, wanted: Iterable[str]) -> None:
        """Give this repository's part of the cache the files that another part has: hard links, by SHA-256."""
        import huggingface_hub
        from huggingface_hub.file_download import repo_folder_name

        cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
        ours = cache / repo_folder_name(repo_id=self.name, repo_type="model") / "blobs"
        for name in wanted:
            file = self.files[name]
            if file.sha256 is None or (ours / file.sha256).exists():
                continue
            for known in cache.glob(f"models--*/blobs/{file.sha256}"):
                if known.stat().st_size == file.size_bytes:
                    _link(known, ours / file.sha256)
                    break


def find_repository(hub_id: str) -> Repository:
    """Ask the Hub what a repository holds. `HF_ENDPOINT` and the other variables of huggingface_hub are honoured.

    Args:
        hub_id: `org/name` or `org/name@revision`.

    Returns:
        The repository at its present commit.

    Raises:
        InputError: There is no such repository or revision, it is private or gated, or the Hub cannot be reached.
    """
    import huggingface_hub

    name, _, revision = hub_id.partition("@")
    try:
        info = huggingface_hub.HfApi().model_info(name, revision=revision or None, files_metadata=True)
    except Exception as error:
        raise _explain(hub_id, error) from error
    files = {
        file.rfilename: HubFile(file.size or 0, file.lfs.sha256 if file.lfs else None) for file in info.siblings or []
    }
    return Repository(hub_id, name, revision or None, info.sha or revision, files)


def fetch(hub_id: str) -> Path:
    """Download the needed files of a repository, or find them in the local cache.

    `HF_HUB_OFFLINE`, `HF_HOME` and the other variables of huggingface_hub are honoured. Only the weights that
    `pick_weights` would choose are downloaded, with the files that travel with them and the card.

    Args:
        hub_id: `org/name` or `org/name@revision`.

    Returns:
        The directory of the snapshot.

    Raises:
        InputError: The repository cannot be had from the Hub and is not in the cache.
    """
    try:
        repository = find_repository(hub_id)
    except InputError as why:
        return cached_snapshot(hub_id, why)
    root = repository.download_side_files()
    weights = repository.weights(root)
    card = [CARD for file in repository.files if file == CARD and repository.files[file].size_bytes <= MAX_CARD_BYTES]
    return repository.download([*weights, *card]) if weights else root


def locate(spec: str) -> Path:
    """Find a path or fetch a Hub id.

    Args:
        spec: What the user typed.

    Returns:
        An existing file or directory.

    Raises:
        InputError: There is neither such a path nor such a repository.
    """
    if is_on_hub(spec):
        return fetch(spec)
    path = Path(spec).expanduser()
    if path.exists():
        return path
    raise InputError(f"no such model: {spec!r}", "neither an existing path nor a Hub id org/name", "check the spelling")


def cached_snapshot(hub_id: str, why: InputError) -> Path:
    """Find a repository in the local cache.

    Args:
        hub_id: `org/name` or `org/name@revision`.
        why: The reason for not asking the Hub, raised where the cache has no weights of it.

    Returns:
        The directory of the snapshot.

    Raises:
        InputError: As given.
    """
    import huggingface_hub

    name, _, revision = hub_id.partition("@")
    logger.debug("%s; trying the cache", why)
    try:
        root = Path(huggingface_hub.snapshot_download(name, revision=revision or None, local_files_only=True))
    except Exception:
        raise why from None
    # A repository that was read in part has left its small files there, and no more.
    if not any(file.suffix in WEIGHT_SUFFIXES for file in root.rglob("*")):
        raise why
    return root


def _is_small(name: str) -> bool:
    return name == "adapter_config.json" or is_side_file(name) or is_index(name)


def _link(known: Path, new: Path) -> None:
    try:
        new.parent.mkdir(parents=True, exist_ok=True)
        os.link(known.resolve(), new)
    except OSError as error:
        # Then it is downloaded, as it would have been.
        logger.debug("cannot link %s to %s: %s", new, known, error)


def _explain(hub_id: str, error: Exception) -> InputError:
    """Explain an exception of the client to the user; those of its HTTP library all mean the same."""
    from huggingface_hub import errors

    name, _, revision = hub_id.partition("@")
    if isinstance(error, errors.GatedRepoError):
        return InputError(
            f"{name!r} is gated on the Hub",
            _answer(error),
            "accept its terms on its page, and log in with `hf auth login`",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(
            f"{name!r} has no revision {revision!r} on the Hub",
            _answer(error),
            "give a branch, a tag or a commit",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return InputError(
            f"{hub_id!r} is not an existing path, and the Hub shows no such repository",
            _answer(error),
            "check the spelling; if it is private, log in with `hf auth login` or set HF_TOKEN",
        )
    return InputError(
        f"{hub_id!r} is not an existing path, and cannot be fetched from the Hub",
        without_secrets(f"{type(error).__name__}: {reason_of(error)}"),
        "check the connection and HF_HUB_OFFLINE, or give a local directory",
    )


def _answer(error: Exception) -> str:
    """The Hub's answer, in its own words where it has any."""
    status = getattr(getattr(error, "response", None), "status_code", "an error")
    said = getattr(error, "server_message", None)
    return f"it answered {status}" + (f", {without_secrets(said)}" if said else "")


def without_secrets(said: str) -> str:
    """A text without what lets others in: signatures and passwords in addresses, and the token of the Hub.

    Example:
        >>> without_secrets("403 for https://ada:pw@cdn.example/a?Expires=9&Signature=abc")
        '403 for https://cdn.example/a?...'
    """
    from huggingface_hub import get_token

    token = get_token()
    said = re.sub(r"(\w://)[^/\s'\"@]*@", r"\1", re.sub(r"\?[^\s'\"]+", "?...", said))
    return said.replace(token, "...") if token else said
