"""Build the documentation site into site/. Whatever the tools warn of is an error.

docs/ is written for a Git forge: its links go from file to file, out of docs/ too. So before the site is built the
pages are laid out in build/pages, with the files at the root that belong to the site, and links follow.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "build" / "pages"

# Files outside docs/ that are pages of the site.
FROM_ROOT = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}

LINK = re.compile(r"""((?<=\]\()|(?<=src="))(?!\w+:|#)(?P<path>[^)#"\s]+)""")


def lay_out() -> None:
    """Fill build/pages afresh."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(ROOT / "docs", PAGES)
    sources = {file: PAGES / file.relative_to(ROOT / "docs") for file in sorted((ROOT / "docs").rglob("*.md"))}
    sources |= {ROOT / name: PAGES / page for name, page in FROM_ROOT.items()}
    for source, page in sources.items():
        text = source.read_text(encoding="utf-8")
        page.write_text(LINK.sub(lambda link: moved(link["path"], source, page), text), encoding="utf-8")  # noqa: B023


def moved(link: str, source: Path, page: Path) -> str:
    """Where a relative link of a source leads from its page; other files of the repository come along as they are."""
    target = (source.parent / link).resolve()
    if not target.is_file():
        sys.exit(f"{source.relative_to(ROOT)}: the link {link} leads to no file")
    name = target.relative_to(ROOT).as_posix()
    if name in FROM_ROOT:
        there = PAGES / FROM_ROOT[name]
    elif target.is_relative_to(ROOT / "docs"):
        there = PAGES / target.relative_to(ROOT / "docs")
    else:
        there = PAGES / "files" / name
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(target, there)
    return Path(os.path.relpath(there, page.parent)).as_posix()


def build() -> None:
    """Run Zensical; its strict mode passes over the warnings of docstrings, so these are read off its output."""
    command = [Path(sys.executable).with_name("zensical"), "build", "--clean", "--strict"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(done.stdout, end="")
    if done.returncode or "griffe" in done.stdout or "warning" in done.stdout.lower():
        sys.exit("the site was built with warnings: mend what they name, and try again")


if __name__ == "__main__":
    lay_out()
    build()
