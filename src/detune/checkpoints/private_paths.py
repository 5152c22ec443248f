"""Places on this machine as files name them that may be given away: from where the file lies, or by name alone."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["PrivatePaths", "from_out"]


def from_out(place: str | Path, out: Path) -> str:
    """Write a path as it is found from a directory.

    Args:
        place: A path of this machine.
        out: The directory, resolved.

    Returns:
        The relative path; the last name alone where the way would lead through directories that only this machine has,
        such as the user's home.

    Example:
        >>> from_out("/models/llama", Path("/models/out")), from_out("/home/ada/llama", Path("/tmp/out"))
        ('../llama', 'llama')
    """
    path = Path(os.path.abspath(_expanded(place)))
    common = Path(os.path.commonpath((path, out)))
    if common == Path(common.anchor) or common in Path.home().parents:
        return path.name
    return Path(os.path.relpath(path, out)).as_posix()


class PrivatePaths:
    """Rewrites what names places on this machine, in anything that JSON can hold.

    Args:
        out: The directory that the file will be in, resolved.
        places: What may be named: models as the user gave them, directories, words of the command line. Only paths that
            name a place by themselves, from the root or the home directory, are rewritten.
    """

    def __init__(self, out: Path, places: Iterable[str | Path]) -> None:
        names: dict[str, str] = {}
        for place in (part for each in map(str, places) for part in _parts(each)):
            path = _expanded(place)
            if path.is_absolute() and path.name:
                shown = from_out(path, out)
                names |= dict.fromkeys((place, str(path), os.path.realpath(path)), shown)
        for home in (str(Path.home()), os.path.realpath(Path.home())):
            if len(home) > 1:
                names.setdefault(home, "~")
        self._names = names
        # The longest first: a model may lie in another's directory. A place ends where its last name does, and begins
        # with its first one: "/a" is no part of "unet/attn", nor of "/ab".
        longest = "|".join(re.escape(place) for place in sorted(names, key=len, reverse=True))
        # The common beginning of all is looked for first: a text may be long, and places many.
        self._pattern = re.compile(rf"(?=[/~])(?<![\w.-])(?:{longest})(?![\w-]|\.\w)") if names else None

    def within(self, content: Any) -> Any:
        """Rewrite every place, wherever it stands in a text."""
        if isinstance(content, dict):
            return {self.within(key): self.within(value) for key, value in content.items()}
        if isinstance(content, list | tuple):
            return [self.within(each) for each in content]
        if isinstance(content, str) and self._pattern is not None:
            return self._pattern.sub(lambda match: self._names[match[0]], content)
        return content


def _parts(place: str) -> list[str]:
    """BASE+ADAPTER names two places."""
    return [place] if os.path.exists(_expanded(place)) else place.split("+")


def _expanded(place: str | Path) -> Path:
    # A word of the command line may begin with "~" and name nobody's home.
    return Path(os.path.expanduser(place))
