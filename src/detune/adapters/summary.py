"""An extraction for people, in the terminal and on the cards."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from detune.compatibility.name_patterns import by_pattern, span

if TYPE_CHECKING:
    # It brings torch along, which tables do without.
    from detune.adapters.changes import AdapterRow

__all__ = ["adapter_sentence", "adapter_table"]


def adapter_table(rows: Sequence["AdapterRow"]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The tensors that were changed, by kind.

    Args:
        rows: Rows of an extraction.

    Returns:
        The names of the columns, and a row for each kind.
    """
    columns = ("tensor", "shape", "kept", "ranks", "identical bits", "largest ulp")
    lines: list[tuple[str, ...]] = [
        (
            pattern,
            "×".join(map(str, kind[0].shape)),
            str(kind[0].kept),
            span(row.rank for row in kind if row.rank),
            f"{100 * sum(row.identical for row in kind) / len(kind):.2f} %",
            f"{max(row.largest_ulps for row in kind)}",
        )
        for (pattern, _), kind in by_pattern(rows, lambda row: (row.kept, row.shape)).items()
    ]
    return columns, lines


def adapter_sentence(figures: Mapping[str, Any]) -> str:
    """The content of an adapter, and what PEFT's merge of it gives back.

    Args:
        figures: Figures of `Extraction.summary`.
    """
    whole = f", {figures['whole']} tensors whole" * bool(figures["whole"])
    lost = f", {figures['left out']} LEFT OUT" * bool(figures["left out"])
    shares = (f"{100 * figures[key]:.2f} %" for key in ("identical_of_changed", "identical"))
    layers = _layers(figures["LoRA"], figures["ranks"])
    return (
        f"{layers}{whole}{lost}; merged by PEFT, "
        f"{' of the changed entries and '.join(shares)} of all have the model's bits, "
        f"largest deviation {figures['largest_deviation']:.1e} ({figures['largest_ulps']} ulp)"
    )


def _layers(count: int, ranks: Sequence[int]) -> str:
    return f"{count} LoRA layer{'s' * (count > 1)} of rank {span(ranks)}" if count else "no LoRA"
