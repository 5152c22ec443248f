"""An entry of the leaderboard: one defence, what each attack of a frozen set got out of it, and what it costs.

One JSON file an entry, `docs/leaderboard/entries/NAME.json`. The truth enters through the figures alone.
"""

import json
from datetime import date
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from detune.bench.leaderboard.attack_sets import ATTACK_SETS
from detune.errors import InputError, OutputError

__all__ = ["FORMAT", "Attacked", "Entry", "Making", "Task", "Utility", "read_entries", "read_entry", "write_entry"]

FORMAT: Literal["detune-leaderboard/1"] = "detune-leaderboard/1"

Text = Annotated[str, Field(min_length=1)]
Line = Annotated[str, Field(min_length=1, pattern=r"^[^\n|]*$")]
"""What goes into a cell of a table."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Task(_Record):
    """What was defended: entries are compared within one task.

    Attributes:
        base: The model that is to stay hidden.
        fine_tunes: How the releases were made.
        models: Number of releases.
        release_w_error: W-Error of a release as it is, undefended: what anybody has who does nothing.
    """

    base: Line
    fine_tunes: Line
    models: Annotated[int, Field(ge=1)]
    release_w_error: float


class Attacked(_Record):
    """What one attack got.

    Attributes:
        w_error: Over the matrices that were fine-tuned; None where the attack gave no answer.
        failure: Why it gave none.
    """

    w_error: float | None
    failure: str | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.w_error is None) == (self.failure is None):
            raise ValueError("give a W-Error or the reason why there is none")
        return self


class Utility(_Record):
    """What the defence costs.

    Attributes:
        metric: What is measured, on texts that were not trained on; more is better.
        undefended: Of the fine-tunes as they were.
        defended: Of the releases.
    """

    metric: Line
    undefended: Annotated[float, Field(gt=0)]
    defended: Annotated[float, Field(ge=0)]

    @property
    def loss(self) -> float:
        """The share that is lost; negative where the defended models are better."""
        return 1 - self.defended / self.undefended


class Making(_Record):
    """One computation of the figures.

    Attributes:
        date: Of the day.
        command: That computes them.
        versions: Of detune, Python and torch.
        code_sha256: Over detune's source files.
    """

    date: date
    command: Text
    versions: dict[str, str]
    code_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Entry(_Record):
    """A defence on the leaderboard.

    Attributes:
        format: Of this file.
        name: What the page calls it.
        about: One line.
        authors: Who answers for the entry.
        link: A paper, or the code.
        defence: Its name.
        settings: Its hyperparameters.
        attack_set: The frozen attacks that it was tried with, all of them.
        task: What was defended.
        utility: What it costs.
        attacks: What each attack of the set got.
        status: "verified" where the figures came out again, computed by the maintainers from the defence's code.
        made: Where the figures come from.
        verified: Where they came out again.
    """

    format: Literal["detune-leaderboard/1"] = FORMAT
    name: Line
    about: Line
    authors: Annotated[tuple[Line, ...], Field(min_length=1)]
    link: Annotated[str, Field(pattern=r"^https://\S+$")] | None = None
    defence: Line
    settings: Line
    attack_set: Text
    task: Task
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
        expected = ATTACK_SETS[self.attack_set].attacks
        if set(self.attacks) != set(expected):
            raise ValueError(f"expected all attacks of {self.attack_set} and no other: {', '.join(expected)}")
        if all(attacked.w_error is None for attacked in self.attacks.values()):
            raise ValueError("no attack gave an answer: the average of the releases is one")
        return self

    @property
    def worst_attack(self) -> str:
        """The one that comes closest to the base."""
        return min(self._w_errors, key=self._w_errors.__getitem__)

    @property
    def worst_w_error(self) -> float:
        """How close it comes."""
        return self._w_errors[self.worst_attack]

    @property
    def times_closer(self) -> float:
        """How many times closer to the base it comes than an undefended release is, in root mean square."""
        return float(10 ** ((self.task.release_w_error - self.worst_w_error) / 2))

    @property
    def _w_errors(self) -> dict[str, float]:
        return {name: attacked.w_error for name, attacked in self.attacks.items() if attacked.w_error is not None}


def read_entry(file: Path) -> Entry:
    """Read and check an entry.

    Raises:
        InputError: No such file, or it is no entry.
    """
    try:
        return Entry.model_validate_json(file.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {file}", str(error.strerror), "give an entry's JSON file") from None
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
        raise InputError(
            f"no folder {folder}", "expected one with entries", "run this in a checkout, or give --entries"
        )
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
