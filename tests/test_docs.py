"""What the documentation shows: commands that exist, snippets that compile, links that lead somewhere."""

import importlib
import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
import yaml

from detune.cli import cli

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FROM_ROOT = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}

# Modules whose public names the API reference has, each and all.
REFERENCE = ("detune", "detune.attacks", "detune.audit", "detune.defences", "detune.methods", "detune.problem")

FENCED = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"""(?:\]\(|src=")(?!\w+:)(?P<path>[^)#"\s]*)(?:#(?P<anchor>[^)\s]+))?[)"]""")


class Shown(NamedTuple):
    page: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"


def fenced(language: str | None = None) -> Iterator[Shown]:
    for page in PAGES:
        for block in FENCED.finditer(page.read_text(encoding="utf-8")):
            if language in (None, block["language"]):
                yield Shown(str(page.relative_to(ROOT)), block["text"])


def command_lines() -> Iterator[Shown]:
    """Each line of a fenced block, without prompt, comment and line breaks."""
    for page, text in fenced():
        for line in text.replace("\\\n", " ").splitlines():
            yield Shown(page, line.removeprefix("$ "))


def inline_code() -> Iterator[Shown]:
    for page in PAGES:
        prose = FENCED.sub("", page.read_text(encoding="utf-8"))
        yield from (Shown(str(page.relative_to(ROOT)), code) for code in INLINE.findall(prose))


def is_command(shown: Shown) -> bool:
    return bool(re.match(r"detune [a-z-]", shown.text))


def find_command(words: list[str]) -> tuple[click.Command, list[str]]:
    """The subcommand that words lead to, and the words that are left for it."""
    command: click.Command = cli
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        found = command.get_command(click.Context(command), words[0])
        assert found is not None, f"no command {words[0]!r} in {command.name}"
        command, words = found, words[1:]
    return command, words


def words_of(line: str) -> list[str]:
    """The words of the first command of a line of shell, without a comment."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    return list(takewhile(lambda word: word not in {"|", ">", ">>", ";", "&", "&&", "||"}, lexer))


WRITTEN = [shown for shown in command_lines() if is_command(shown)]
MENTIONED = [shown for shown in inline_code() if is_command(shown)]


@pytest.mark.parametrize("shown", WRITTEN, ids=str)
def test_a_command_that_is_written_out_parses(shown, monkeypatch):
    def take_as_it_is(self: click.Path, value: Any, *_: Any) -> Any:
        return value  # the files of an example are not here

    monkeypatch.setattr(click.Path, "convert", take_as_it_is)
    command, words = find_command(words_of(shown.text)[1:])
    with suppress(click.exceptions.Exit):  # --help, which is then all there is to do
        command.make_context(command.name, words)


@pytest.mark.parametrize("shown", MENTIONED, ids=str)
def test_a_command_that_is_mentioned_has_these_options(shown):
    command, words = find_command(shown.text.split()[1:])
    known = {name for param in command.params for name in (*param.opts, *param.secondary_opts)} | {"--help", "-h"}
    assert {word.partition("=")[0] for word in words if word.startswith("-")} <= known


@pytest.mark.parametrize("shown", list(fenced("python")), ids=lambda shown: f"{shown.page}: {shown.text[:40]!r}")
def test_a_snippet_of_python_compiles(shown):
    compile(shown.text, shown.page, "exec")


def test_scripts_and_targets_that_are_shown_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    shown = [*command_lines(), *inline_code()]
    for page, text in shown:
        if made := re.match(r"make ([a-z-]+)", text):
            assert made[1] in targets, page
        if run := re.match(r"python (benchmarks/\S+\.py)", text):
            assert (ROOT / run[1]).is_file(), page
    assert {"make test", "make lint"} <= {re.sub(r"\s+#.*", "", text) for _, text in shown}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    for link in LINK.finditer(text):
        target = (page.parent / link["path"]).resolve() if link["path"] else page
        assert target.is_file(), f"{link[0]}: no such file"
        if link["anchor"]:
            assert link["anchor"] in anchors(target), f"{link[0]}: no such heading"


def anchors(page: Path) -> set[str]:
    """The names that a Git forge gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_site_has_every_page_and_no_other():
    def pages(entries: Any) -> Iterator[str]:
        for entry in entries:
            (value,) = entry.values()
            yield from [value] if isinstance(value, str) else pages(value)

    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    written = [page.relative_to(ROOT) for page in PAGES]
    names = [FROM_ROOT.get(str(page)) or page.relative_to("docs").as_posix() for page in written]
    assert sorted(pages(config["nav"])) == sorted(names)


def documented() -> set[str]:
    texts = [page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md")]
    return {name for text in texts for name in re.findall(r"^::: (\S+)$", text, re.MULTILINE)}


def test_the_reference_names_what_there_is():
    for name in documented():
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


@pytest.mark.parametrize("module", REFERENCE)
def test_the_reference_has_every_public_name(module):
    names = importlib.import_module(module).__all__
    missing = {f"{module}.{name}" for name in names if not name.isupper()} - documented()
    assert not missing, "add them to docs/api"
