"""English texts that any Python carries: its language reference and the docstrings of its library.

A domain is one subject, so that models trained on two of them learn different things. Source files are
parsed, never imported, and read in sorted order: one Python always gives the same passages.
"""

import ast
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import MappingProxyType

from detune.errors import InputError

__all__ = ["DEMO_DOMAINS", "DOMAINS", "passages"]

_SHORTEST_WORDS = 8  # below that a paragraph is a heading, a signature or an item of a list

# The modules and packages of each domain. Those that some Python lacks are skipped.
_LIBRARY = MappingProxyType(
    {
        "networking": (
            "email ftplib http imaplib mailbox nntplib poplib smtplib socket socketserver ssl urllib wsgiref xmlrpc"
        ),
        "arithmetic": (
            "_pydatetime _pydecimal bisect calendar cmath colorsys datetime fractions heapq ipaddress "
            "numbers operator random statistics uuid"
        ),
        "concurrency": (
            "_threading_local asyncio concurrent multiprocessing queue sched selectors signal subprocess threading"
        ),
        "files": (
            "_pyio bz2 filecmp fileinput fnmatch genericpath glob gzip lzma ntpath os pathlib "
            "posixpath shelve shutil stat tarfile tempfile zipfile"
        ),
        "testing": ("bdb cProfile cmd doctest pdb profile pstats timeit trace traceback tracemalloc unittest warnings"),
        "text": (
            "argparse codecs configparser csv difflib encodings gettext html json locale optparse "
            "plistlib pprint quopri reprlib shlex string textwrap tokenize xml"
        ),
        "introspection": (
            "abc ast collections contextlib copy dataclasses dis enum functools importlib inspect "
            "modulefinder pickle pickletools pkgutil pydoc symtable sysconfig types typing weakref "
            "zipimport"
        ),
    }
)

DOMAINS = ("language", *_LIBRARY)
"""Every domain, each with some hundreds of passages."""

DEMO_DOMAINS = DOMAINS[:3]
"""The three that the demonstration trains on."""


def passages(domain: str) -> list[str]:
    """Return the paragraphs of a domain.

    Args:
        domain: One of `DOMAINS`.

    Returns:
        Paragraphs of at least eight words, each on one line, none twice, in a fixed order.

    Raises:
        InputError: The domain is unknown.

    Example:
        >>> len(passages("language")) > 500
        True
    """
    if domain not in DOMAINS:
        raise InputError(f"no text is called {domain!r}", f"expected one of {', '.join(DOMAINS)}")
    documents = _topics() if domain == "language" else _docstrings(_LIBRARY[domain].split())
    return list(dict.fromkeys(_paragraphs(documents)))


def _topics() -> Iterator[str]:
    """Yield the language reference as `help()` shows it."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]


def _docstrings(names: Iterable[str]) -> Iterator[str]:
    """Yield the docstrings of standard modules and packages."""
    library = Path(sysconfig.get_path("stdlib"))
    for name in names:
        package = library / name
        files = sorted(package.rglob("*.py")) if package.is_dir() else [package.with_suffix(".py")]
        for file in files:
            if file.exists() and not {"test", "tests"}.intersection(file.relative_to(library).parts):
                yield from _docstrings_of(file.read_text(encoding="utf-8"))


def _docstrings_of(source: str) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own invalid escapes, say, are no concern of ours
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


def _paragraphs(documents: Iterable[str]) -> Iterator[str]:
    for document in documents:
        for paragraph in re.split(r"\n\s*\n", document):
            words = paragraph.split()
            if len(words) >= _SHORTEST_WORDS and words[0] != ">>>":
                yield " ".join(words)
