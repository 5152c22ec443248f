"""The protocol of recipes: a base model made on the spot, and fifteen LoRAs trained with the ecosystem's trainers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Protocol, Self

THREADS = 2  # a trained adapter depends on the number of threads to the last bit, so it is part of the recipe


class Recipe(Protocol):
    """A subset of LoWRA Bench that anybody can build: a frozen dataclass of hyperparameters.

    The same recipe, versions and machine give the same base and adapters to the bit.

    Attributes:
        name: What the command calls it, `vit-mini`.
        stands_for: The published subset whose modules, rank and LoRA placement it has; None for one of our own.
        about: One line: the base and the tasks.
        layers: How many layers each LoRA changes, so rows of the subset.
    """

    name: ClassVar[str]
    stands_for: ClassVar[str | None]
    about: ClassVar[str]
    layers: ClassVar[int]

    @property
    def rank(self) -> int:
        """LoRA rank r, that of the published subset."""
        ...

    @property
    def alpha(self) -> int:
        """The change is `alpha / rank · B A`."""
        ...

    @classmethod
    def quick(cls) -> Self:
        """The smallest form with the same code path: seconds of training, for tests."""
        ...

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the fifteen tasks, in order; each names its adapter: letters, digits and hyphens."""
        ...

    def make_base(self, out: Path) -> None:
        """Make the base model, in Hugging Face layout, float32, with tokenizer or processor.

        Args:
            out: The directory to fill; it does not exist yet.
        """
        ...

    def train_adapter(self, base: Path, task: str, out: Path, *, rank: int, seed: int) -> None:
        """Train one LoRA and save it in a format that `detune.checkpoints` reads.

        Args:
            base: What `make_base` made.
            task: One of `tasks`.
            out: The directory to fill; it does not exist yet.
            rank: LoRA rank; alpha goes with it, so that `alpha / rank` stays the recipe's.
            seed: For the initial A, the order of the examples and dropout: LoRAs of one seed start from one A.
        """
        ...

    def write_inputs(self, out: Path) -> None:
        """Write what the original and the recovered model are compared on, none of it seen in training.

        Args:
            out: An existing directory: `prompts.csv` with a column `prompt`, or images `0000.png`, `0001.png`, ...
        """
        ...


def write_losses(folder: Path, losses: Sequence[float]) -> None:
    """Write the loss of each step to `losses.json`."""
    (folder / "losses.json").write_text(json.dumps(list(losses)) + "\n", encoding="utf-8")
