"""The plan of a command: what it would read and write, and the parts of the time."""

from dataclasses import asdict, dataclass

from detune.documents import document, to_json

__all__ = ["Made", "Plan", "Read", "Spent"]


@dataclass(frozen=True)
class Read:
    """A model that would be read.

    Attributes:
        spec: As given.
        files: Number of weight files.
        tensors: Number of tensors.
        size_bytes: Their size.
        download_bytes: How much of it would come from the Hub.
        left_out: Why it would not be used; None where it would.
    """

    spec: str
    files: int
    tensors: int
    size_bytes: int
    download_bytes: int
    left_out: str | None = None


@dataclass(frozen=True)
class Made:
    """Something that would be written.

    Attributes:
        what: In one word: "checkpoint", "adapters", "mask", "pack", "upload".
        path: Where.
        files: Number of files.
        size_bytes: Its size.
        how_sure: "exactly", "about" or "at most".
    """

    what: str
    path: str
    files: int
    size_bytes: int
    how_sure: str


@dataclass(frozen=True)
class Spent:
    """A part of the time.

    Attributes:
        what: On what.
        seconds: How long.
        source: Where the figure comes from.
    """

    what: str
    seconds: float
    source: str


@dataclass(frozen=True)
class Plan:
    """The plan of a command: what it reads and writes, and how long it takes.

    Attributes:
        command: Its name.
        reads: The models.
        changed: Tensors that would be computed, as far as the rows that were looked at tell.
        copied: Tensors that would be copied.
        writes: What would be made.
        free_bytes: What the disk of the first of them has free; None where nothing is written to one.
        time: The parts of the estimate.
    """

    command: str
    reads: tuple[Read, ...]
    changed: int
    copied: int
    writes: tuple[Made, ...]
    free_bytes: int | None
    time: tuple[Spent, ...]

    @property
    def seconds(self) -> float:
        """The estimate."""
        return sum(part.seconds for part in self.time)

    def to_json(self) -> str:
        """The plan as JSON."""
        return to_json(document("detune-plan/1", asdict(self) | {"seconds": self.seconds}))
