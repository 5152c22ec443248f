"""What a library's error says, in one line."""

__all__ = ["reason_of"]


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
