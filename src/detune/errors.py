"""The exceptions detune raises for anything a user can cause."""

__all__ = ["DetuneError", "InputError", "OutputError"]


class DetuneError(Exception):
    """A failure the user can act on, told in one line.

    The line has three parts: what happened; what was found against what was expected, with the tensor and the
    file; what to try. Parts may be passed one by one or as one string.

    Args:
        *parts: The parts of the message, joined by semicolons. Line breaks become spaces.

    Example:
        >>> str(DetuneError("model has no weights", "found no *.safetensors in 'a/'", "give its directory"))
        "model has no weights; found no *.safetensors in 'a/'; give its directory"
    """

    def __init__(self, *parts: str) -> None:
        super().__init__("; ".join(" ".join(part.split()) for part in parts))


class InputError(DetuneError):
    """A model or checkpoint cannot be read, or does not fit the others."""


class OutputError(DetuneError):
    """The output directory cannot be written."""
