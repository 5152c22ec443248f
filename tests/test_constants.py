"""A constant that decides something says where it comes from: derived, cited or measured."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "detune"

# Packages in which every constant has a source.
SOURCED = (
    *("numerics", "problem", "fitting", "identifiability", "lattice", "source_models", "methods", "certificate"),
    *("compatibility", "lineage", "adapters", "recovery"),
)

# Sources that leave no choice.
FOLLOWS = re.compile(r"\b(derived|arXiv|doi|definition of the (format|rounding)|malloc\.h)", re.IGNORECASE)
# What bounds time or memory, and what lies between cases that are far apart, decides nothing.
DECIDES_NOTHING = re.compile(r"\bany (small |odd )?(number|numbers|share) (does|do)\b", re.IGNORECASE)
CHOSEN = re.compile(r"\b(measured|definitions?)\b", re.IGNORECASE)

# Numbers that were chosen, by a measurement or by what is meant, in all these packages. One more needs a reason.
MOST_CHOSEN = 64


def constants(file: Path) -> Iterator[tuple[str, str]]:
    """Yield the name of each numeric constant of a module, and the comment above it or above its neighbour."""
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    comment, last = "", 0
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None and is_number(node.value):
            above = []
            while lines[node.lineno - 2 - len(above)].startswith("#"):
                above.insert(0, lines[node.lineno - 2 - len(above)].removeprefix("#").strip())
            # Constants in a row share the comment above the first.
            comment = " ".join(above) or (comment if node.lineno == last + 1 else "")
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield ast.unparse(targets[0]), comment
            last = node.end_lineno or node.lineno


def is_number(node: ast.expr) -> bool:
    """Whether an expression is made of numbers alone, or of some by a key."""
    if isinstance(node, ast.Dict):
        return all(map(is_number, node.values))
    parts = [part for part in ast.walk(node) if isinstance(part, ast.expr)]
    allowed = (ast.Constant, ast.BinOp, ast.UnaryOp, ast.Tuple)
    return all(isinstance(part, allowed) for part in parts) and any(
        isinstance(part, ast.Constant) and isinstance(part.value, int | float) and not isinstance(part.value, bool)
        for part in parts
    )


def constants_of(package: str) -> dict[str, str]:
    """Return the comment of each constant of a package."""
    files = {str(file.relative_to(SOURCE)): file for file in sorted((SOURCE / package).rglob("*.py"))}
    return {f"{path}: {name}": comment for path, file in files.items() for name, comment in constants(file)}


@pytest.mark.parametrize("package", SOURCED)
def test_every_constant_has_a_source(package):
    found = constants_of(package)
    assert found
    sources = (FOLLOWS, DECIDES_NOTHING, CHOSEN)
    assert [name for name, comment in found.items() if not any(source.search(comment) for source in sources)] == []


def test_few_constants_were_chosen():
    chosen = [
        name
        for package in SOURCED
        for name, comment in constants_of(package).items()
        if not FOLLOWS.search(comment) and not DECIDES_NOTHING.search(comment)
    ]
    assert len(chosen) <= MOST_CHOSEN, chosen


def test_a_constant_without_a_source_is_found(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        "# Noise ends here (measured).\nFIRST = 2.0\nSECOND = 1 << 3\n\n# Enough.\nTHIRD = (1, -0.5)\nNAME = 'x'\n"
    )
    assert list(constants(file)) == [
        ("FIRST", "Noise ends here (measured)."),
        ("SECOND", "Noise ends here (measured)."),
        ("THIRD", "Enough."),
    ]
