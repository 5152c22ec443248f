"""`audit`: what a release would give away."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from detune.cli.loading import load_torch
from detune.cli.options import (
    METHODS,
    device_of,
    device_option,
    merge_dtype_of,
    merge_option,
    models_argument,
    rank_option,
)
from detune.cli.output import Output, output_options
from detune.cli.terminal import say, show_table

if TYPE_CHECKING:
    from detune.audit.record import AuditReport, Closeness


@click.command()
@models_argument
@click.option("--base", help="What they were fine-tuned from, to measure against. Without it, errors are predicted.")
@click.option(
    "--out", type=click.Path(path_type=Path, readable=False), help="A directory to make with audit.html and audit.json."
)
@click.option("--html", type=click.Path(path_type=Path, readable=False), help="A file to make: the page alone.")
@click.option(
    "--sarif", type=click.Path(path_type=Path, readable=False), help="A file to make: the findings, for code scanning."
)
@click.option(
    "--fail-on",
    type=click.Choice(["exact", "floor", "approximate"]),
    default="floor",
    show_default=True,
    help="What makes the exit code 1: weights that come back to the last bit; to the rounding; or in part.",
)
@click.option(
    "--inputs", type=click.Path(path_type=Path, readable=False), help="What to run the models on; see docs/bench.md."
)
@click.option("--weights-only", is_flag=True, help="Do not run the models.")
@click.option("--method", type=click.Choice(METHODS), default="auto", show_default=True, help="From three releases on.")
@click.option(
    "--trained",
    type=click.Path(path_type=Path, readable=False),
    help="A CSV file of adapters whose training is known: adapter, examples, group. Estimates each release's.",
)
@rank_option
@device_option
@merge_option
@output_options
def audit(
    models: tuple[str, ...],
    base: str | None,
    out: Path | None,
    html: Path | None,
    sarif: Path | None,
    fail_on: "Closeness",
    inputs: Path | None,
    weights_only: bool,
    method: str,
    trained: Path | None,
    rank: int | None,
    device: str,
    merge_dtype: str,
    output: Output,
) -> None:
    """Show what releases of one base give of it away: by how many of them, how closely, and why.

    Give them in the order in which they go out. The recovery is run as an outsider would, with the first release, with
    the first two, and so on. Needs pip install 'detune[audit]'.

    The exit code is 0 where nothing is given away, 1 where something is, 2 after an error.
    """
    from detune._runtime import needs_extra

    load_torch()
    from detune.checkpoints import new_directory, new_file, require_apart, resolved

    require_apart(out, html, sarif)
    with ExitStack() as opened:
        # A file that cannot be written is refused before anything is computed.
        folder = opened.enter_context(new_directory(out)) if out is not None else None
        page = opened.enter_context(new_file(html)) if html is not None else None
        log = opened.enter_context(new_file(sarif)) if sarif is not None else None
        shown = opened.enter_context(output.progress())
        with needs_extra("audit"):
            from detune.audit import audit as run
            from detune.audit.page import render

            if log is not None:
                from detune.audit.sarif import to_sarif
            if folder is not None or page is not None:
                # A missing library of the page is reported before anything is computed.
                import jinja2  # noqa: F401
                import plotly.graph_objects  # noqa: F401
        report = run(
            models,
            base,
            method=method,
            rank=rank,
            inputs=inputs,
            weights_only=weights_only,
            device=device_of(device),
            merge_dtype=merge_dtype_of(merge_dtype),
            trained=trained,
            on_start=shown.start,
            on_tensor=shown,
        )
        if folder is not None and out is not None:
            published = report.as_published(resolved(out))
            (folder / "audit.json").write_text(published.to_json(), encoding="utf-8")
            (folder / "audit.html").write_text(render(published), encoding="utf-8")
        if page is not None and html is not None:
            page.write_text(render(report.as_published(resolved(html).parent)), encoding="utf-8")
        if log is not None:
            # Code scanning looks for files from the root of the repository, where it runs the audit.
            log.write_text(to_sarif(report.as_published(Path.cwd())), encoding="utf-8")
    written = [file for file in (out and out / "audit.html", html, sarif) if file is not None]
    output.show(report.to_json, lambda: _show(report, written), shown)
    if report.gives_away(fail_on):
        click.get_current_context().exit(1)


def _show(report: "AuditReport", written: Sequence[Path]) -> None:
    """Print the curve, what the recovery rests on, and the verdict."""
    from detune.audit.adapters import ADAPTERS
    from detune.audit.assumptions import ASSUMPTIONS

    columns = ("releases", "given away", *(("W-Error", "identical bits") if report.base else ()), "predicted")
    lines = []
    for point in report.curve:
        measured = (
            "" if point.w_error is None else f"{point.w_error:.2f}",
            "" if point.identical is None else f"{100 * point.identical:.2f} %",
        )
        given_away = f"{point.given_away} of {report.verdict.matrices}"
        lines.append((str(point.models), given_away, *(measured if report.base else ()), point.expected))
    show_table(columns, lines)
    say()
    assumed = {rule.id for rule in ASSUMPTIONS}
    titles = {rule.id: rule.title for rule in report.rules}
    marks = {True: "yes", False: "no ", None: "?  "}
    for result in report.results:
        if result.rule_id in assumed:
            say(f"{marks[result.holds]} {titles[result.rule_id]}: {result.message}")
    for result in report.results:
        if result.rule_id in {rule.id for rule in ADAPTERS}:
            say(result.message)
    for model in report.models:
        if model.left_out is not None:
            say(f"left out {model.spec}: {model.left_out}")
    say()
    say(report.verdict.headline, bold=True)
    for sentence in (*report.verdict.sentences, *report.verdict.next_steps):
        say(sentence)
    if report.behaviour.note:
        say(f"Outputs: {report.behaviour.note}")
    if written:
        say(f"wrote {', '.join(map(str, written))} in {report.invocation.seconds:.1f} s")
