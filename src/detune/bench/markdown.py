"""Text in Markdown that stays text: no tags, links, code, cells or comments of its own."""

from urllib.parse import quote

from detune.errors import printable

__all__ = ["code", "link", "text"]

_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_MARKS = frozenset("\\`*_[]|~#$")
# What begins a list or a heading where it stands first.
_LEADING = frozenset("-+=")


def text(plain: str) -> str:
    r"""Text as Markdown shows it: one line, in a cell, a heading or a paragraph.

    Args:
        plain: Any text.

    Example:
        >>> print(text("a|b <!-- [x](https://example.org) *c*"))
        a\|b &lt;!-- \[x\](https:&#47;&#47;example.org) \*c\*
    """
    shown = "".join(f"\\{each}" if each in _MARKS else _ENTITIES.get(each, each) for each in printable(plain))
    # A bare address would become a link.
    shown = shown.replace("://", ":&#47;&#47;").replace("www.", "www&#46;")
    return f"\\{shown}" if shown[:1] in _LEADING else shown


def code(plain: str) -> str:
    """Text as code; backquotes in it become apostrophes.

    Args:
        plain: Any text.

    Example:
        >>> code("layer.0.`weight`")
        "`layer.0.'weight'`"
    """
    shown = printable(plain).replace("`", "'")
    return f"`{shown or ' '}`"


def link(plain: str, target: str) -> str:
    """A link.

    Args:
        plain: What is shown.
        target: A path or an address.

    Example:
        >>> link("a", "entries/a b).json")
        '[a](entries/a%20b%29.json)'
    """
    return f"[{text(plain)}]({quote(target, safe=':/?#@!&+,;=%~.-_')})"
