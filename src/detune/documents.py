"""Reports as JSON: their format's name and version first, and no number that JSON does not have.

docs/json.md lists the formats, and docs/schemas has the schema of each.
"""

import json
import math
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

__all__ = ["document", "to_json"]


def document(format: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """Put a report's format before its content.

    Args:
        format: Its name and version: "detune-compare/1".
        content: As `dataclasses.asdict` makes it. A number that is not finite becomes None, a path text.

    Returns:
        What JSON can hold.

    Example:
        >>> document("detune-compare/1", {"rows": ({"w_error": -math.inf},)})
        {'format': 'detune-compare/1', 'rows': [{'w_error': None}]}
    """
    return {"format": format, **{key: _plain(value) for key, value in content.items()}}


def to_json(document: Mapping[str, Any]) -> str:
    """Write a document as text, a field on each line."""
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, PurePath):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
