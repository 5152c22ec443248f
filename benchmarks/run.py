"""Run the benchmarks and keep what they print in docs/benchmarks.md, with the command that made it.

python benchmarks/run.py                 # all of them
python benchmarks/run.py minilm          # one; the rest of the page stays
"""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "benchmarks.md"
COMMANDS = {
    "minilm": [],
    "random_matrices": [],
    "closed_form": ["--iterations", "60"],
    "side_by_side": [],
    "floor": [],
    "growth": ["docs/growth.png"],
    "family": [],
    "ranks": [],
    "certificate": ["--split", "sealed", "--plot", "docs/certificate.png"],
    "exact": [],
    "bits": [],
}
INTRODUCTION = """# Benchmarks

Each section is what `make bench` printed, with the command that printed it. Speeds were measured in one run on a shared
machine: read the ratios. W-Error is log10 of the mean squared error against the true base.
"""


def main() -> None:
    chosen = sys.argv[1:] or list(COMMANDS)
    unknown = set(chosen) - set(COMMANDS)
    if unknown:
        raise SystemExit(f"no benchmark {', '.join(unknown)}: expected {', '.join(COMMANDS)}")
    text = PAGE.read_text() if PAGE.is_file() else ""
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, flags=re.M | re.S))
    for name in chosen:
        sections[name] = section(name)
    PAGE.parent.mkdir(exist_ok=True)
    body = "\n".join(f"## {name}\n{sections[name].rstrip()}\n" for name in COMMANDS if name in sections)
    PAGE.write_text(f"{INTRODUCTION}\n{body}")


def section(name: str) -> str:
    """Run one benchmark; its docstring and output as Markdown."""
    script = HERE / f"{name}.py"
    command = ["python", f"benchmarks/{name}.py", *COMMANDS[name]]
    print(f"$ {' '.join(command)}", flush=True)
    result = subprocess.run(
        [sys.executable, *command[1:]],
        cwd=HERE.parent,
        env={**os.environ, "OMP_NUM_THREADS": "2", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    print(result.stdout, flush=True)
    about = script.read_text().split('"""')[1].strip()
    machine = f"{os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"
    return f"\n{about}\n\n{machine}\n\n```console\n$ {' '.join(command)}\n{result.stdout.rstrip()}\n```\n"


if __name__ == "__main__":
    main()
