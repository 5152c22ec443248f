"""`detune bench defences`: which defences keep a base hidden, against attacks that know them, and what each costs."""

from collections.abc import Sequence
from pathlib import Path

from detune._runtime import OnPart, OnStart
from detune.bench.defences.families import FAMILIES, given_family, trained_families
from detune.bench.defences.result import AttackResult, DefenceOutcome, RowResult
from detune.bench.defences.rows import MODELS, Row, rows_of
from detune.bench.defences.run import run_rows
from detune.bench.defences.table import write
from detune.demo.texts import DOMAINS, passages
from detune.demo.train import base_model
from detune.errors import InputError

__all__ = ["AttackResult", "DefenceOutcome", "Row", "RowResult", "bench_defences", "run_rows", "write"]

# Passages of each domain that the defences look at activations with; none of them is held out.
CALIBRATION = 24


def bench_defences(
    out: Path,
    *,
    base: Path | None = None,
    models: Sequence[Path] = (),
    only: Sequence[str] = (),
    quick: bool = False,
    on_start: OnStart | None = None,
    on_part: OnPart | None = None,
) -> tuple[RowResult, ...]:
    """Run the rows, and write the table and the figure.

    Args:
        out: The folder to fill: the fine-tunes in `models/`, one JSON file a defence in `rows/`, `defences.md` and
            `defences.png`. What is there already is not made again.
        base: The truth of `models`; None trains fine-tunes of all-MiniLM-L6-v2.
        models: Fine-tunes of it, encoders with tokenizers.
        only: Names of rows; empty runs all.
        quick: The smallest form: three fine-tunes of two steps, a few rows.
        on_start: For progress: called with the trainings that are still to be done, then with the attacks.
        on_part: Called with the name of each of these when it is begun, and when it is done.

    Returns:
        A result for each defence.

    Raises:
        InputError: Too few models, a base without models, or no such row.
        DetuneError: An extra is not installed.
    """
    if (base is None) != (not models):
        raise InputError(
            "the base and its fine-tunes go together",
            f"got {len(models)} models and {'no' if base is None else 'a'} base",
            "give both, or neither to train some",
        )
    out.mkdir(parents=True, exist_ok=True)
    texts = out / "texts.txt"
    texts.write_text(
        "\n".join(t for domain in DOMAINS for t in passages(domain)[:CALIBRATION]) + "\n", encoding="utf-8"
    )
    releases = min(MODELS, len(models)) if base is not None else 3 if quick else MODELS
    rows = rows_of(FAMILIES if base is None else ("given",), base or base_model(), texts, releases)
    wanted = only or (_QUICK if quick else [row.name for row in rows])
    unknown = set(wanted) - {row.name for row in rows}
    if unknown:
        raise InputError(
            f"no row {min(unknown)!r}", f"expected some of {', '.join(row.name for row in rows)}", "see --only"
        )
    rows = tuple(row for row in rows if row.name in wanted)
    # Rows are measured against ordinary fine-tunes, whatever they are of.
    needed = {"ordinary", *(row.family for row in rows)}
    releases = max(row.models for row in rows)
    if base is not None:
        families = {"given": given_family(base, models)}
    elif quick:
        families = trained_families(
            out / "models",
            needed,
            releases,
            domains=DOMAINS[:3],
            steps=2,
            held_out=16,
            on_start=on_start,
            on_part=on_part,
        )
    else:
        families = trained_families(out / "models", needed, releases, on_start=on_start, on_part=on_part)
    results = run_rows(rows, families, out, on_start=on_start, on_part=on_part)
    write(results, out)
    return results


_QUICK = ("none", "noise 1.0%", "permutation", "frozen A")
