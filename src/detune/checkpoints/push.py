"""Publishing on the Hub: a model, or adapters, with the card, and nothing else that lies in the directory.

Repositories are made private unless it is said otherwise. One commit puts everything there, after the big files have
been uploaded. Those that the Hub has already are not sent again: a push that was cut off is finished by the same call.
"""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from detune import __version__
from detune.checkpoints.formats import WEIGHT_SUFFIXES, read_header
from detune.checkpoints.hub import is_hub_id, without_secrets
from detune.checkpoints.layout import pick_weights, read_json
from detune.checkpoints.mark import MARK, missing_files
from detune.checkpoints.opening import open_checkpoint
from detune.checkpoints.side_files import CARD, is_side_file, require_own
from detune.documents import document, to_json
from detune.errors import DetuneError, InputError, OutputError, parsing, reason_of

__all__ = ["Publication", "Pushed", "check_repository", "push", "what_to_push"]

_CONFIG = "adapter_config.json"
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
# Names of the files that `kept_cards` makes.
_OWN_CARD = re.compile(r"README\.[\w.-]+\.md")
# Files that the Hub puts into a repository itself.
_HUBS_OWN = frozenset({".gitattributes"})
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN, with a token that may write there"


@dataclass(frozen=True)
class Publication:
    """The content of a directory that can be published.

    Attributes:
        directory: The directory.
        kind: "model", "adapter" or "adapters".
        files: What is uploaded, relative to it, with the size of each in bytes.
        left_out: What else lies in it: the names of files, and of directories with nothing that is uploaded.
    """

    directory: Path
    kind: str
    files: dict[str, int]
    left_out: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        """Size of all files."""
        return sum(self.files.values())


@dataclass(frozen=True)
class Pushed:
    """The outcome of `push`.

    Attributes:
        repository: Its name, `org/name`.
        url: URL of its page.
        commit: The commit that has the files.
        private: Whether others cannot see it.
        kind: "model", "adapter" or "adapters".
        files: Number of files.
        total_bytes: Their size.
        left_out: What lies in the directory and was not uploaded.
        seconds: Wall time.
    """

    repository: str
    url: str
    commit: str
    private: bool
    kind: str
    files: int
    total_bytes: int
    left_out: tuple[str, ...]
    seconds: float

    def to_json(self) -> str:
        """The report as JSON."""
        return to_json(document("detune-push/1", asdict(self)))


def what_to_push(directory: str | Path) -> Publication:
    """Find what a directory holds that can be published: a model, an adapter, or what `extract` made.

    Args:
        directory: The directory.

    Raises:
        InputError: It holds none of them, or not all of one.
    """
    root = Path(directory).expanduser()
    if not root.is_dir():
        raise InputError(
            f"cannot push {directory}",
            "it is a file, expected a directory" if root.exists() else "there is no such directory",
            "give what recover or extract made, or the directory of a model",
        )
    with parsing(root):
        kind, names = _content(root)
        missing = missing_files(root)
        if missing:
            raise InputError(f"{root} is not whole", f"{missing[0]} of the recovery is missing", "recover it again")
        beside = [path.name for path in root.iterdir() if path.is_file() and _travels_along(path.name)]
        sizes = {}
        for name in sorted({*names, *beside}):
            if not name.endswith(WEIGHT_SUFFIXES):
                # Weights may lie elsewhere, on a larger disk.
                require_own(root, name)
            sizes[name] = (root / name).stat().st_size
        first = {Path(name).parts[0] for name in sizes}
        left_out = sorted(path.name for path in root.iterdir() if path.name not in first)
    return Publication(root, kind, sizes, tuple(left_out))


def push(directory: str | Path, repository: str, *, public: bool = False, message: str | None = None) -> Pushed:
    """Publish a model or adapters on the Hub, with the card.

    `HF_TOKEN`, `HF_ENDPOINT` and the other variables of huggingface_hub are honoured.

    Args:
        directory: What `recover` or `extract` made, or the directory of a model or of an adapter. Of what lies in it,
            what a loader reads goes along, `detune.json` and cards, and nothing else.
        repository: `org/name`; it is made where there is none.
        public: Whether everybody is to see it. A repository that is there already stays as it is: one that is public is
            refused without this, one that is private with it.
        message: Message of the commit.

    Returns:
        What was pushed where.

    Raises:
        InputError: The directory holds nothing that can be published.
        OutputError: The Hub refuses, or the repository has other files.

    Example:
        >>> push("recovered", "org/recovered").private  # doctest: +SKIP
        True
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    started = time.perf_counter()
    found = what_to_push(directory)
    private = check_repository(repository, public, found)
    api = HfApi()
    with _explained(repository):
        if private is None:
            api.create_repo(repository, private=not public, exist_ok=True)
        operations = [CommitOperationAdd(name, found.directory / name) for name in found.files]
        said = message or f"Upload with detune {__version__}"
        commit = api.create_commit(repository, operations, commit_message=said).oid
        info = api.model_info(repository, revision=commit, files_metadata=True)
    there = {file.rfilename: file.size for file in info.siblings or []}
    for name, size_bytes in found.files.items():
        if there.get(name) != size_bytes:
            raise OutputError(
                f"{name} did not arrive in {repository}", f"it has {there.get(name)} bytes there, expected {size_bytes}"
            )
    return Pushed(
        repository,
        f"{without_secrets(api.endpoint)}/{repository}",
        commit,
        bool(info.private),
        found.kind,
        len(found.files),
        found.total_bytes,
        found.left_out,
        time.perf_counter() - started,
    )


def check_repository(repository: str, public: bool, found: Publication | None = None) -> bool | None:
    """Ask the Hub whether something may be pushed to a repository; nothing is made or changed there.

    Args:
        repository: Its name.
        public: Whether everybody is to see it.
        found: What is to be pushed; None where it is not known yet.

    Returns:
        Whether it is private; None where there is none yet.

    Raises:
        InputError: It is no name of a repository.
        OutputError: The Hub cannot be reached, or the repository is not what it should be.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if not is_hub_id(repository) or "@" in repository:
        raise InputError(f"{repository!r} is no repository", "expected org/name or user/name", "check the spelling")
    with _explained(repository):
        api = HfApi()
        # Whoever may not write is told so before hours of work.
        who = api.whoami()
        spaces = [who["name"], *(org["name"] for org in who.get("orgs", ()))]
        try:
            info = api.model_info(repository)
        except RepositoryNotFoundError as error:
            if isinstance(error, GatedRepoError):
                raise
            info = None
    if info is None:
        if repository.partition("/")[0] not in spaces:
            raise OutputError(f"cannot make {repository!r}", f"the token is of {', '.join(spaces)}", _LOG_IN)
        return None
    if info.private == public:
        raise OutputError(
            f"{repository} is {'private' if info.private else 'public'} on the Hub",
            f"--public {'makes new repositories public and changes none' if public else 'was not given'}",
            "change that on its page" if public else "give --public if everybody may see it, or another name",
        )
    ours = _HUBS_OWN if found is None else {*found.files, *_HUBS_OWN}
    others = [file.rfilename for file in info.siblings or [] if file.rfilename not in ours]
    if others and found is not None:
        raise OutputError(
            f"{repository} has other files",
            f"{others[0]!r} is not in {found.directory}, and together they would be no model",
            "push to a new repository, or remove them there",
        )
    return bool(info.private)


def _content(root: Path) -> tuple[str, list[str]]:
    """The kind of a directory, and the files that a loader reads."""
    if any(root.glob(_CONFIG)):
        return "adapter", _adapter(root, Path())
    if (root / MARK).is_file() and _field(root / MARK, "format").startswith("detune-extract/"):
        configs = [path for depth in ("*", "*/*") for path in root.glob(f"{depth}/{_CONFIG}")]
        adapters = sorted(path.parent.relative_to(root) for path in configs)
        if not adapters:
            raise InputError(f"{root} holds no adapters", f"{MARK} speaks of some", "extract them again")
        cards = [path.relative_to(root).as_posix() for path in root.glob("*/README*.md") if _travels_along(path.name)]
        return "adapters", [*cards, *(name for folder in adapters for name in _adapter(root, folder))]
    if components := _component_adapters(root):
        return "adapter", [name for folder in components for name in _adapter(root, folder)]
    with open_checkpoint(root) as model:
        weights = [file.file for file in model.weight_files]
        return "model", [*weights, *model.index_files, *(path.as_posix() for path in model.side_files())]


def _component_adapters(root: Path) -> list[Path]:
    """The adapters of one pipeline that `extract` made, each in a directory named as the component that it is for.

    Empty where there are none, where one is for something else, as among the runs of a trainer, and where weights lie
    beside them: that is a model.
    """
    folders = sorted(path.parent for path in root.glob(f"*/{_CONFIG}"))
    bases = [_field(folder / _CONFIG, "base_model_name_or_path") for folder in folders]
    names = [path.name for path in root.iterdir() if path.is_file()]
    is_model = "model_index.json" in names or pick_weights(names, str(root)) is not None
    if is_model or any(PurePosixPath(base).name != folder.name for base, folder in zip(bases, folders, strict=True)):
        return []
    return [folder.relative_to(root) for folder in folders]


def _field(path: Path, key: str) -> str:
    """The text of a file at a key; empty where there is none, or no table."""
    content = read_json(path)
    return str(content.get(key)) if isinstance(content, dict) else ""


def _adapter(root: Path, folder: Path) -> list[str]:
    """The files of an adapter.

    Raises:
        InputError: It is damaged.
    """
    read_json(root / folder / _CONFIG)
    weights = next((name for name in _ADAPTERS if (root / folder / name).is_file()), None)
    if weights is None:
        raise InputError(f"{root / folder} is no whole adapter", f"it lacks {_ADAPTERS[0]}", "make it again")
    read_header(root / folder / weights)
    travelling = [path.name for path in (root / folder).iterdir() if path.is_file() and is_side_file(path.name)]
    return [(folder / name).as_posix() for name in (_CONFIG, weights, *travelling)]


def _travels_along(name: str) -> bool:
    return name in (CARD, MARK) or _OWN_CARD.fullmatch(name) is not None


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Explain an exception of the client to the user, without what it signed its requests with.

    Raises:
        OutputError: The block raised anything but an error of ours.
    """
    from huggingface_hub import errors

    try:
        yield
    except DetuneError:
        raise
    except errors.LocalTokenNotFoundError:
        raise OutputError(f"cannot push to {repository!r}", "there is no token for the Hub", _LOG_IN) from None
    except Exception as error:
        status = _status(error)
        found = without_secrets(f"{type(error).__name__}: {reason_of(error.__cause__ or error)}")
        if status in (401, 403):
            raise OutputError(f"cannot push to {repository!r}", f"the Hub answered {status}", _LOG_IN) from error
        raise OutputError(
            f"cannot push to {repository!r}",
            found,
            "check the connection and HF_HUB_OFFLINE, and push again: what has arrived is not sent twice",
        ) from error


def _status(error: BaseException | None) -> int | None:
    """The Hub's answer, of the exception or of what caused it."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return int(status)
        error = error.__cause__
    return None
