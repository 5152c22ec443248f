"""The exceptions detune raises for anything a user can cause."""

__all__ = ["DetuneError", "InputError", "OutputError", "reason_of"]


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


def reason_of(error: BaseException) -> str:
    r"""Return the first line of an error's text, or the first two where the first ends in a colon.

    Errors of torch and of the Hub run over many lines: every weight of another shape, every place that was tried.

    Args:
        error: Anything raised.

    Returns:
        One line with single spaces; the error's class where it says nothing.

    Example:
        >>> reason_of(RuntimeError("no connection\n\nTried: a, b"))
        'no connection'
        >>> reason_of(RuntimeError("Error(s) in loading:\n\tsize mismatch for a\n\tsize mismatch for b"))
        'Error(s) in loading: size mismatch for a'
    """
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
