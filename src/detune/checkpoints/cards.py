"""Model cards: what those of the inputs say, and README.md with the metadata that the Hub reads.

A card is what a stranger's model says of itself. Its metadata is read without aliases, by which a few lines of YAML
become gigabytes. A card that cannot be read is left out, with a word in the log: it keeps no model from being used.
"""

import logging
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from detune.checkpoints.hub import is_on_hub
from detune.checkpoints.layout import read_json
from detune.checkpoints.paths import folded, plain_name
from detune.checkpoints.private_paths import PrivatePaths
from detune.checkpoints.side_files import CARD, MAX_CARD_BYTES, read_side_file
from detune.checkpoints.source import Checkpoint
from detune.checkpoints.view import raw
from detune.errors import InputError, parsing, printable
from detune.markdown import code, fenced, table

__all__ = [
    "CARD",
    "InputCard",
    "Licence",
    "agreed_licence",
    "command_block",
    "kept_cards",
    "library_of",
    "licence_section",
    "models_table",
    "read_card",
    "render_card",
]

logger = logging.getLogger(__name__)

MAX_METADATA_CHARACTERS = 2**16
_METADATA = re.compile(r"\ufeff?\s*---[ \t]*\r?\n(?P<yaml>.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
# Licences as the Hub lists them: apache-2.0, cc-by-nc-4.0, bigscience-bloom-rail-1.0.
_LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}")
_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
# Keys are files that only this library's models have.
_LIBRARIES = {
    "model_index.json": "diffusers",
    "modules.json": "sentence-transformers",
    "open_clip_config.json": "open_clip",
}
# Keys are what the library writes into config.json.
_KEYS = {"_diffusers_version": "diffusers", "model_type": "transformers", "architectures": "transformers"}


@dataclass(frozen=True)
class Licence:
    """A licence as the metadata of a card states it.

    Attributes:
        license: Its identifier on the Hub.
        license_name: Its name, where the identifier is "other".
        license_link: The address of its text, where the identifier is "other".
    """

    license: str
    license_name: str | None = None
    license_link: str | None = None

    def __str__(self) -> str:
        return self.license_name or self.license

    @property
    def is_telling(self) -> bool:
        """Whether two models that state it have the same licence: "other" without a name or a link is any."""
        return self.license != "other" or bool(self.license_name or self.license_link)


@dataclass(frozen=True)
class InputCard:
    """A model as a card names it, and what its own card says.

    Attributes:
        name: The Hub id, or the last part of the path; of BASE+ADAPTER both.
        hub_id: The Hub id without a revision; None of a model on disk.
        licences: Licences of the model, or of base and adapter; None where one states none.
        bases: What it was made from, by its own account.
        texts: The cards.
    """

    name: str
    hub_id: str | None
    licences: tuple[Licence | None, ...]
    bases: tuple[str, ...]
    texts: tuple[str, ...]


def read_card(model: Checkpoint) -> InputCard:
    """Read what a model's own card says: README.md in its directory, or in those of base and adapter.

    Args:
        model: The model, or a view of it. A single file has no card.
    """
    spec, folders = model.spec, [path for path in raw(model).paths if path.is_dir()]
    texts = [_read(folder) for folder in folders]
    stated = [{} if text is None else _metadata(text, folder) for text, folder in zip(texts, folders, strict=True)]
    bases = [base for each in stated for base in _bases(each.get("base_model"))]
    return InputCard(
        _shown(spec),
        spec.partition("@")[0] if is_on_hub(spec) else None,
        tuple(_licence(each) for each in stated) or (None,),
        tuple(dict.fromkeys(bases)),
        tuple(text for text in texts if text is not None),
    )


def agreed_licence(cards: Iterable[InputCard]) -> Licence | None:
    """The licence that all models state; None where one states another, or none."""
    stated = {licence for card in cards for licence in card.licences}
    if len(stated) != 1:
        return None
    (licence,) = stated
    return licence if licence is not None and licence.is_telling else None


def library_of(model: Checkpoint) -> str | None:
    """The library that loads a model, by its files; None where they do not tell."""
    names = {path.as_posix() for path in model.side_files()}
    by_file = next((library for file, library in _LIBRARIES.items() if file in names), None)
    if by_file is not None or "config.json" not in names:
        return by_file
    try:
        config = read_json(model.root / "config.json")
    except InputError:
        return None
    by_key = (library for key, library in _KEYS.items() if isinstance(config, dict) and key in config)
    return next(by_key, None)


def kept_cards(cards: Sequence[InputCard], places: PrivatePaths) -> dict[str, bytes]:
    """The models' own cards under other names: `README.NAME.md`.

    Args:
        cards: The models.
        places: What paths of this machine become in them.

    Returns:
        Content by file name.
    """
    kept: dict[str, bytes] = {}
    for card in cards:
        stem = plain_name(re.sub(r"[^\w.-]+", "-", card.name.rpartition("/")[2]).strip(".-") or "model")
        for text in card.texts:
            names = (f"README.{stem}{f'-{k}' * (k > 1)}.md" for k in range(1, len(cards) * len(card.texts) + 2))
            file = next(name for name in names if folded(name) not in map(folded, kept))
            kept[file] = str(places.within(text)).encode()
    return kept


def render_card(body: str, licence: Licence | None, **metadata: Any) -> bytes:
    """A card as the Hub reads it: metadata in YAML, then Markdown.

    Args:
        body: The Markdown.
        licence: What it states.
        metadata: More of it; None and empty lists are left out.
    """
    from huggingface_hub import ModelCard, ModelCardData

    stated = {} if licence is None else vars(licence)
    known = {key: value for key, value in (stated | metadata).items() if value not in (None, [])}
    data = ModelCardData(**known)
    # Parts that are empty leave no empty lines behind.
    shown = re.sub(r"\n{3,}", "\n\n", body).strip()
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{shown}\n")).encode()


def models_table(cards: Iterable[InputCard]) -> str:
    """The models, and what each says of itself, as Markdown."""
    rows = [
        (
            card.name,
            ", ".join(dict.fromkeys("none stated" if each is None else str(each) for each in card.licences)),
            ", ".join(card.bases),
        )
        for card in cards
    ]
    return table(("model", "licence", "made from, by its own card"), rows)


def command_block(words: Sequence[str], function: str, places: PrivatePaths) -> str:
    """The command that made something, as Markdown: places of this machine by their last name.

    Args:
        words: The command line.
        function: What a program of somebody's called instead.
        places: What else is rewritten.
    """
    program, *rest = words
    if Path(program).name not in ("detune", "__main__.py"):
        return f"{code(function)}, called from Python.\n"
    return fenced([shlex.join(["detune", *places.within([_without_place(word) for word in rest])])])


def licence_section(licence: Licence | None, whose: str) -> str:
    """A card's words on the licence, as Markdown.

    Args:
        licence: The one that all inputs state, if they do.
        whose: Whose licence the weights stay under.
    """
    said = (
        f"All models above state {code(str(licence))}, and so does this card."
        if licence
        else "The models above do not all state one licence, so this card states none."
    )
    stays = f"The weights stay under the licence of {whose}: use them only if you have the right to."
    return f"## Licence\n\n{said} {stays}\n"


def _without_place(word: str) -> str:
    option, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
    parts = [value] if Path(value).expanduser().exists() else value.split("+")
    named = (Path(part).name if Path(part).expanduser().is_absolute() else part for part in parts)
    return f"{option}{equals}{'+'.join(named)}"


class _PlainLoader(yaml.SafeLoader):  # type: ignore[misc] # it ships no types
    """YAML without aliases."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases, which cards do without")
        return super().compose_node(parent, index)


def _read(folder: Path) -> str | None:
    path = folder / CARD
    if not os.path.lexists(path):
        return None
    try:
        with parsing(path):
            if path.stat().st_size > MAX_CARD_BYTES:
                raise InputError(f"{path} is no card", f"it has more than {MAX_CARD_BYTES} bytes")
            return read_side_file(folder, CARD).decode()
    except InputError as error:
        logger.warning("the card of a model is left out: %s", error)
        return None


def _metadata(text: str, folder: Path) -> Mapping[str, Any]:
    match = _METADATA.match(text)
    if match is None:
        return {}
    try:
        with parsing(folder / CARD):
            if len(match["yaml"]) > MAX_METADATA_CHARACTERS:
                raise InputError(f"{folder / CARD} has too much metadata", f"over {MAX_METADATA_CHARACTERS} characters")
            found = yaml.load(match["yaml"], _PlainLoader)
    except InputError as error:
        logger.warning("the metadata of a card is left out: %s", error)
        return {}
    return found if isinstance(found, dict) else {}


def _licence(metadata: Mapping[str, Any]) -> Licence | None:
    licence, name, link = (metadata.get(key) for key in ("license", "license_name", "license_link"))
    if not isinstance(licence, str) or not _LICENCE.fullmatch(licence):
        return None
    if licence != "other":
        return Licence(licence)
    return Licence(
        licence,
        name if isinstance(name, str) and _LICENCE.fullmatch(name) else None,
        # A file beside the card, which does not travel, is no link.
        link if isinstance(link, str) and re.fullmatch(r"https?://[\w./~%+-]{1,500}", link) else None,
    )


def _bases(value: Any) -> list[str]:
    """Ids on the Hub; a place on somebody's machine is nobody's business."""
    named = value if isinstance(value, list) else [value]
    return [name for name in named if isinstance(name, str) and _NAME.fullmatch(name)]


def _shown(spec: str) -> str:
    if is_on_hub(spec):
        return spec
    parts = [spec] if Path(spec).expanduser().exists() else spec.split("+")
    return "+".join(part if is_on_hub(part) else printable(Path(part).expanduser().resolve().name) for part in parts)
