"""The protocol of defences: changes of a checkpoint before it is released."""

from collections.abc import Callable, Container
from typing import Any, ClassVar, Protocol

from torch import Tensor

from detune.checkpoints import Checkpoint

__all__ = ["Change", "Defence", "only", "option"]

Change = Callable[[str, Tensor], Tensor]
"""The release of one tensor, from its name and its values as stored: of the same shape and dtype."""


def option(help: str, least: int = 0) -> dict[str, Any]:
    """The metadata of a setting that the command has an option for, whose form follows from the field's type.

    Args:
        help: A few words.
        least: The smallest number that it can be.
    """
    return {"help": help, "least": least}


class Defence(Protocol):
    """A change of a merged fine-tune's weights: a frozen dataclass of its settings; see `option`.

    It changes one tensor at a time, so that a model of any size streams through it; what several tensors must have in
    common, a permutation for instance, is drawn from the seed by `prepare`.

    Attributes:
        name: What the command calls it.
        about: One line: what is done to the weights.
        preserves_function: Whether the outputs stay the same but for rounding; `defend` then verifies that they do.
        draws: Whether another seed gives another release, with the settings as they are.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    preserves_function: ClassVar[bool]
    draws: ClassVar[bool]

    def prepare(self, model: Checkpoint, seed: int) -> Change:
        """Look at a model's names, shapes and config, and lay down how each tensor is changed.

        Args:
            model: The fine-tune, opened.
            seed: For all that is drawn; releases of one base take different seeds, unless the defence says otherwise.

        Returns:
            The change; it is called once for each tensor, in any order.

        Raises:
            InputError: The model is of no kind that this defence knows.
        """
        ...


def only(names: Container[str], change: Change) -> Change:
    """A change of these tensors, which leaves all others as they are."""
    return lambda name, tensor: change(name, tensor) if name in names else tensor
