"""docs/security.md states the limits that the code has, and where."""

from pathlib import Path

import pytest

from detune import files
from detune.audit import behaviour
from detune.checkpoints import entries, module_patterns, pickles, safetensors_file, side_files, torch_archive
from detune.checkpoints.pretrained import MOST
from detune.packing import archive, unpacker

ROOT = Path(__file__).parents[1]
MIB, GIB = 2**20, 2**30

ROWS = dict(
    line.strip("| ").split(" | ", 1)
    for line in (ROOT / "docs" / "security.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ")
)


@pytest.mark.parametrize(
    ("what", "stated"),
    [
        ("header of a safetensors file", f"{safetensors_file.MAX_HEADER_BYTES // MIB} MiB"),
        ("index of shards, configuration of a model or an adapter", f"{files.MAX_JSON_BYTES // MIB} MiB"),
        (
            "pickle in an archive",
            f"{torch_archive.MAX_PICKLE_BYTES // MIB} MiB, {pickles.MAX_OPERATIONS:,} operations",
        ),
        ("tensor that repeats its elements (`expand`)", f"{torch_archive.MAX_REPEATED_BYTES // MIB} MiB"),
        ("name of a tensor", f"{entries.MAX_NAME_LENGTH} characters"),
        ("dimensions, elements of a tensor", f"{entries.MAX_DIMENSIONS}, 2⁶³ − 1"),
        (
            "expressions in `rank_pattern` and `alpha_pattern`",
            f"{module_patterns.MAX_EXPRESSIONS}, of {module_patterns.MAX_EXPRESSION_LENGTH} characters, "
            f"{module_patterns.MAX_SECONDS:.0f} s in all",
        ),
        (
            "layers, experts, labels, positions in a `config.json`",
            ", ".join(str(most) if most < 10_000 else f"{most:,}" for most in list(MOST.values())[:3]) + ", 2²⁴",
        ),
        ("manifest of a pack", f"{archive.MAX_MANIFEST_BYTES // MIB} MiB"),
        ("what a pack grows to", f"{unpacker.MAX_GROWTH} times its size"),
        ("a file that travels with the weights", f"{side_files.MAX_SIDE_FILE_BYTES // MIB} MiB"),
        (
            "running models in `audit`",
            f"{behaviour.MEMORY_COPIES} times the weights and {behaviour.MEMORY_BYTES // GIB} GiB; "
            f"{behaviour.SECONDS / 60:.0f} min and {behaviour.SECONDS_PER_GB / 60:.0f} min a GB",
        ),
    ],
)
def test_the_page_states_the_limit_that_holds(what: str, stated: str) -> None:
    assert stated in ROWS[what]


def test_the_page_names_files_that_there_are() -> None:
    named = [name.strip("`") for row in ROWS.values() for name in row.rpartition(" | ")[2].split(", ") if "`" in name]
    assert len(named) > 10
    for name in named:
        assert list((ROOT / "src" / "detune").rglob(name)), name


def test_numbers_written_as_powers_are_the_constants() -> None:
    assert entries.MAX_ELEMENTS == 2**63 - 1
    assert MOST[r"position|^n_ctx$"] == 2**24
