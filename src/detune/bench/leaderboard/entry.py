"""An entry of the leaderboard: one defence, what the attacks of a frozen set got out of it, and what it costs.

One JSON file an entry, `docs/leaderboard/entries/NAME.json`.
"""

import json
import re
from datetime import date
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from detune.bench.leaderboard.attack_sets import ATTACK_SETS
from detune.bench.results import EXACT_W_ERROR, Environment
from detune.errors import InputError, OutputError
from detune.files import read_regular

__all__ = ["FORMAT", "Attacked", "Entry", "Making", "Utility", "file_name", "read_entries", "read_entry", "write_entry"]

FORMAT: Literal["detune-leaderboard/1"] = "detune-leaderboard/1"

_MOST_BYTES = 2**20

Line = Annotated[str, Field(min_length=1, pattern=r"^[^\n|]*$")]
"""The content of a cell of a table."""

WError = Annotated[float, Field(ge=EXACT_W_ERROR, le=77)]
"""From no error at all to the square of the largest float32."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Attacked(_Record):
    """The result of one attack.

    Attributes:
        w_error: Over the matrices that were fine-tuned; None where the attack gave no answer.
        embeddings: Mean cosine distance of the recovered model's embeddings from the base's, over that of a
            fine-tune, undefended.
        failure: Why it gave no answer.
    """

    w_error: WError | None
    embeddings: Annotated[float, Field(ge=0, le=1e6)] | None
    failure: str | None = None

    @model_validator(mode="after")
    def _figures_or_reason(self) -> Self:
        if len({self.w_error is None, self.embeddings is None, self.failure is not None}) > 1:
            raise ValueError("give both figures, or the reason why there are none")
        return self


class Utility(_Record):
    """The cost of a defence: task accuracy on passages that were not trained on.

    Attributes:
        undefended: Accuracy of ordinary fine-tunes without a defence.
        defended: Accuracy of the releases.
    """

    undefended: Annotated[float, Field(gt=0, le=1)]
    defended: Annotated[float, Field(ge=0, le=1)]

    @property
    def loss(self) -> float:
        """The share that is lost; negative where the defended models are better."""
        return 1 - self.defended / self.undefended


class Making(_Record):
    """One computation of the figures.

    Attributes:
        date: The day.
        command: That computes them.
        environment: Versions, the hash of detune's code, and the machine.
    """

    date: date
    command: Annotated[str, Field(min_length=1)]
    environment: Environment


class Entry(_Record):
    """A defence on the leaderboard.

    Attributes:
        format: Format of this file.
        name: Name of its row in `detune bench defences`.
        defence: What is done to each release, with its settings.
        authors: Who answers for the entry.
        link: A paper, or the code.
        attack_set: The frozen attacks that it was tried with.
        models: Number of releases.
        average: The figures of averaging as many releases without a defence: what anybody has.
        utility: What it costs.
        attacks: What each attack got that the defence met.
        status: "verified" where the maintainers computed the figures from the defence's code.
        made: Where the figures come from.
        verified: Where they came out again.
    """

    format: Literal["detune-leaderboard/1"] = FORMAT
    name: Line
    defence: Line
    authors: Annotated[tuple[Line, ...], Field(min_length=1)]
    link: Annotated[str, Field(pattern=r"^https://\S+$")] | None = None
    attack_set: str
    models: Annotated[int, Field(ge=1)]
    average: Attacked
    utility: Utility
    attacks: dict[str, Attacked]
    status: Literal["verified", "claimed"]
    made: Making
    verified: Making | None = None

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        if (self.status == "verified") != (self.verified is not None):
            raise ValueError('status "verified" and the field "verified" belong together')
        if self.attack_set not in ATTACK_SETS:
            raise ValueError(f"no attack set {self.attack_set!r}; there are {', '.join(ATTACK_SETS)}")
        known = ATTACK_SETS[self.attack_set].attacks
        if unknown := set(self.attacks) - set(known):
            raise ValueError(f"{min(unknown)!r} is no attack of {self.attack_set}; it has {', '.join(known)}")
        if not (self.average.w_error and any(self.w_errors.values())):
            raise ValueError("no attack gave an answer, and the average of the releases is always one")
        return self

    @property
    def w_errors(self) -> dict[str, float]:
        """The W-Errors of the attacks that gave an answer."""
        return {name: attacked.w_error for name, attacked in self.attacks.items() if attacked.w_error is not None}

    @property
    def worst_attack(self) -> str:
        """The one that comes closest to the base."""
        return max(self.w_errors, key=lambda name: self._closer(self.attacks[name]))

    @property
    def times_closer(self) -> float:
        """The factor by which it comes closer to the base than averaging undefended releases.

        In root mean square, by the weights or by the embeddings, whichever shows more.
        """
        return self._closer(self.attacks[self.worst_attack])

    def _closer(self, attacked: Attacked) -> float:
        weights = 10 ** (((self.average.w_error or 0.0) - (attacked.w_error or 0.0)) / 2)
        function = ((self.average.embeddings or 0.0) / max(attacked.embeddings or 0.0, 1e-30)) ** 0.5
        return float(max(weights, function))


def file_name(name: str) -> str:
    """An entry's file, by its name.

    Example:
        >>> file_name("release one, bf16 base"), file_name("noise 0.1%")
        ('release-one-bf16-base.json', 'noise-0.1.json')
    """
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-") + ".json"


def read_entry(file: Path) -> Entry:
    """Read and check an entry.

    Raises:
        InputError: No such file, or it is no entry.
    """
    try:
        return Entry.model_validate_json(read_regular(file, _MOST_BYTES))
    except OSError as error:
        raise InputError(f"cannot read {file}", str(error.strerror), "give an entry's name or JSON file") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise InputError(
            f"{file} is no entry of the leaderboard", f"{where}: {first['msg']}", "see docs/leaderboard.md"
        ) from None


def read_entries(folder: Path) -> dict[Path, Entry]:
    """Every entry of a folder, by file.

    Raises:
        InputError: No such folder, or a file is no entry.
    """
    if not folder.is_dir():
        raise InputError(f"no folder {folder}", "expected one with entries", "go to a checkout, or give --entries")
    return {file: read_entry(file) for file in sorted(folder.glob("*.json"))}


def write_entry(entry: Entry, file: Path) -> None:
    """Write an entry, as a person would read it.

    Raises:
        OutputError: It cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(entry.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {file}", str(error.strerror), "choose another place") from None
