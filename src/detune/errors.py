"""The exceptions detune raises for anything a user can cause, and the one way from those of others to them."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["DetuneError", "InputError", "OutputError", "cannot_read", "cure_of", "parsing", "printable", "reason_of"]

# A path has at most some 4000 characters; whatever is longer was made to be.
MAX_PART_LENGTH = 5000

logger = logging.getLogger(__name__)


class DetuneError(Exception):
    """A failure the user can act on, told in one line.

    The line has three parts: what happened; what was found against what was expected, with the tensor and the
    file; what to try. Parts may be passed one by one or as one string.

    Args:
        *parts: The parts of the message, joined by semicolons. Line breaks become spaces, `printable` makes the rest
            so, and what is longer than `MAX_PART_LENGTH` loses its middle.

    Example:
        >>> str(DetuneError("model has no weights", "found no *.safetensors in 'a/'", "give its directory"))
        "model has no weights; found no *.safetensors in 'a/'; give its directory"
    """

    def __init__(self, *parts: str) -> None:
        super().__init__("; ".join(_shortened(printable(" ".join(part.split()))) for part in parts))


class InputError(DetuneError):
    """A model or checkpoint cannot be read, or does not fit the others."""


class OutputError(DetuneError):
    """The output directory cannot be written."""


@contextmanager
def parsing(what: object, cure: str = "download or copy it again") -> Iterator[None]:
    """Turn whatever reading a file raises into the error for that file; ours passes as it is.

    What anybody may write makes parsers raise what their authors did not foresee: every kind is caught.

    Args:
        what: The file, or the part of it.
        cure: What to try where its content is at fault.

    Raises:
        InputError: The block raised anything but an error of ours, an interrupt or an exit.

    Example:
        >>> with parsing("numbers.txt", "write one number a line"):
        ...     int("one")
        Traceback (most recent call last):
        detune.errors.InputError: numbers.txt is damaged; ValueError: invalid literal for ... write one number a line
    """
    try:
        yield
    except DetuneError:
        raise
    except OSError as error:
        raise cannot_read(what, error) from error
    except Exception as error:
        logger.debug("cannot read %s", what, exc_info=True)
        raise InputError(f"{what} is damaged", f"{type(error).__name__}: {reason_of(error)}", cure) from error


def cannot_read(what: object, error: OSError) -> InputError:
    """Make the error for a file that the system refuses.

    Args:
        what: The file, or the part of it.
        error: What the system said.

    Example:
        >>> print(cannot_read("a/config.json", PermissionError(13, "Permission denied")))
        cannot read a/config.json; Permission denied; change its permissions, or ask its owner
    """
    return InputError(f"cannot read {what}", error.strerror or str(error), cure_of(error, "check the path"))


def cure_of(error: OSError, otherwise: str) -> str:
    """Say what to try where the system refuses a file: permissions, or something else."""
    return "change its permissions, or ask its owner" if isinstance(error, PermissionError) else otherwise


def printable(text: str) -> str:
    r"""Text as one line that a terminal shows and does not obey.

    Names in files may hold anything: sequences that colour a terminal or set its title, line breaks, characters that
    turn the direction of writing.

    Args:
        text: Any.

    Returns:
        The same, with what is no letter, mark or space written as Python would.

    Example:
        >>> print(printable("layer\n0\x1b[31m \u202eweight, größer"))
        layer\n0\x1b[31m \u202eweight, größer
    """
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def _shortened(text: str) -> str:
    half = MAX_PART_LENGTH // 2
    return text if len(text) <= MAX_PART_LENGTH else f"{text[:half]} … {text[-half:]}"


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
