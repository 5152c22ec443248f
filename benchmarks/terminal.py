"""The picture of a terminal in README: commands that are run on the demo's models, and what they print.

    python benchmarks/terminal.py

writes docs/terminal.svg. The recovery takes a minute on two cores.
"""

import io
import os
import pty
import shlex
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.text import Text

from detune.demo.language_model import FINE_TUNES, language_model, shipped_adapter
from detune.demo.train import merge

PICTURE = Path(__file__).parents[1] / "docs" / "terminal.svg"
COLUMNS = 132
MODELS = [f"merged-{domain}" for domain in FINE_TUNES]
COMMANDS = (
    ["detune", "family", *MODELS],
    ["detune", "recover", *MODELS, "--out", "recovered", "--dtype", "bfloat16"],
    ["detune", "compare", "recovered", "base"],
)

# rich's own asks another server for a font.
SVG = """<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{
  font: {char_height}px/{line_height}px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
}}
.{unique_id}-title {{ font: bold 18px sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal"><rect width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">{matrix}</g>
</g>
</svg>
"""


def printed(words: list[str], folder: Path) -> str:
    """What a command prints into a terminal, with its colours."""
    master, slave = pty.openpty()
    environment = os.environ | {"COLUMNS": str(COLUMNS), "TERM": "xterm-256color", "NO_COLOR": ""}
    command = [sys.executable, "-m", *words]
    with (
        subprocess.Popen(command, cwd=folder, stdout=slave, env=environment) as running,
        os.fdopen(master, "rb") as screen,
    ):
        os.close(slave)
        shown = b""
        while True:
            try:
                shown += (read := screen.read1())
            except OSError:
                # Linux says so where the other end is closed.
                break
            if not read:
                break
    if running.returncode:
        sys.exit(f"{shlex.join(words)} ended with {running.returncode}")
    return shown.decode().replace("\r\n", "\n").rstrip("\n")


def draw(runs: list[tuple[str, str]]) -> str:
    """The picture of commands and what they printed."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, legacy_windows=False)
    for k, (command, text) in enumerate(runs):
        console.print(Text.assemble("\n" * bool(k), ("$ ", "bold green"), (command, "bold")))
        console.print(Text.from_ansi(text))
    # The picture ends at the last line's baseline.
    console.print()
    return console.export_svg(title="detune", code_format=SVG, unique_id="terminal")


def main() -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        base = language_model(folder / "base")
        for domain, model in zip(FINE_TUNES, MODELS, strict=True):
            merge(base, shipped_adapter(domain), folder / model, torch.float32)
        runs = [(shlex.join(words), printed(words, folder)) for words in COMMANDS]
    PICTURE.write_text(draw(runs), encoding="utf-8")


if __name__ == "__main__":
    main()
