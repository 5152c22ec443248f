"""Models by their Hub id, through huggingface_hub."""

import logging
import re
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from detune.checkpoints.layout import SIDE_SUFFIXES, component_dirs, pick_weights, weight_map
from detune.errors import InputError

__all__ = ["fetch", "is_hub_id"]

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")


def is_hub_id(text: str) -> bool:
    """Say whether a text has the form of a Hub id, `org/name` or `org/name@revision`."""
    return _HUB_ID.fullmatch(text) is not None


def fetch(hub_id: str) -> Path:
    """Download the needed files of a Hub repository, or find them in the local cache.

    `HF_HUB_OFFLINE`, `HF_HOME` and the other variables of huggingface_hub are honoured. Only the weights that
    `pick_weights` would choose are downloaded, with the files that travel with them.

    Args:
        hub_id: `org/name` or `org/name@revision`.

    Returns:
        The directory of the snapshot.

    Raises:
        InputError: The repository cannot be reached and is not in the cache.
    """
    import huggingface_hub

    repo, _, revision = hub_id.partition("@")
    # The client has exceptions of its own and of its HTTP library; all mean the same here.
    try:
        names = huggingface_hub.HfApi().list_repo_files(repo, revision=revision or None)
    except Exception as error:
        logger.debug("cannot list %s: %s; trying the cache", hub_id, error)
        try:
            return Path(huggingface_hub.snapshot_download(repo, revision=revision or None, local_files_only=True))
        except Exception:
            raise InputError(
                f"{hub_id!r} is not an existing path, and cannot be fetched from the Hub",
                f"{type(error).__name__}: {error}",
                "check the spelling, the connection and HF_HUB_OFFLINE, or give a local directory",
            ) from error
    return _download(hub_id, names)


def _download(hub_id: str, names: list[str]) -> Path:
    import huggingface_hub

    repo, _, revision = hub_id.partition("@")

    def download(wanted: list[str]) -> Path:
        try:
            path = huggingface_hub.snapshot_download(repo, revision=revision or None, allow_patterns=wanted)
        except Exception as error:
            raise InputError(f"cannot download {hub_id!r}", str(error), "try again, or give a directory") from error
        return Path(path)

    small = [name for name in names if PurePosixPath(name).suffix in SIDE_SUFFIXES]
    root = download(small)
    return download(small + _needed_weights(root, names, hub_id))


def _needed_weights(root: Path, names: Collection[str], where: str) -> list[str]:
    """Choose the weight files to download.

    Args:
        root: A directory that already holds the repository's JSON files.
        names: Every file of the repository.
        where: The repository, for messages.

    Returns:
        The relative names of the weight files.
    """
    if "adapter_config.json" in names:
        return [name for name in ("adapter_model.safetensors", "adapter_model.bin") if name in names][:1]
    needed: list[str] = []
    for component in component_dirs(root):
        prefix = f"{component}/" if component else ""
        here = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        chosen = pick_weights({name for name in here if "/" not in name}, f"{where}/{component}".rstrip("/"))
        if chosen is None:
            continue
        files = sorted(set(weight_map(root / prefix / chosen).values())) if chosen.endswith(".json") else [chosen]
        needed += [prefix + name for name in files]
    return needed
