"""Text in Markdown stays text, by the rules of a Markdown library."""

from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from detune.errors import printable
from detune.markdown import code, fenced, link, table, text

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<!-- begin -->",
    "x | y | z",
    "[x](javascript:alert(1))",
    "![x](https://example.org/track.png)",
    "`code` **bold** _it_ ~~no~~",
    "https://example.org and www.example.org",
    "# heading",
    "- item",
    "a\n\n# b",
    "&lt;b&gt; &amp;",
    "\\| \\` \\",
    "\x1b[31mred",
]
NAMES = st.one_of(st.text(), st.text("<>[]()!|`*_~#&\\-+= \nab:/w."), st.sampled_from(HOSTILE))


def inline(source: str) -> list[Token]:
    """What a library makes of a heading and of a cell."""
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    heading = [token for token in parser.parse(f"### a{source}b") if token.type == "inline"]
    cell = [token for token in parser.parse(f"| c |\n| --- |\n| a{source}b |\n") if token.type == "inline"]
    assert (len(heading), len(cell)) == (1, 2)
    return [*(heading[0].children or ()), *(cell[1].children or ())]


@given(NAMES)
@example("|")
def test_text_stays_text(name: str) -> None:
    tokens = inline(text(name))
    assert {token.type for token in tokens} == {"text"} or {token.type for token in tokens} <= {"text", "text_special"}
    assert "".join(token.content for token in tokens) == 2 * f"a{printable(name)}b"


@given(NAMES)
def test_it_begins_no_block(name: str) -> None:
    blocks = MarkdownIt("commonmark").parse(text(name).strip())
    assert {token.type for token in blocks} <= {"paragraph_open", "inline", "paragraph_close", *_lists(text(name))}


def _lists(shown: str) -> set[str]:
    """Numbers begin lists, which do no harm."""
    ordered = shown.strip()[:1].isdigit()
    return {"ordered_list_open", "list_item_open", "list_item_close", "ordered_list_close"} if ordered else set()


@given(NAMES)
def test_code_stays_code(name: str) -> None:
    (token,) = [each for each in MarkdownIt("commonmark").parse(f"a {code(name)} b") if each.type == "inline"]
    assert [each.type for each in token.children or ()] == ["text", "code_inline", "text"]


@given(NAMES, NAMES)
def test_a_link_is_one_link(name: str, target: str) -> None:
    (token,) = [each for each in MarkdownIt("commonmark").parse(link(name, f"x/{target}")) if each.type == "inline"]
    types = [each.type for each in token.children or () if each.type not in ("text", "text_special")]
    assert types == ["link_open", "link_close"]


@given(NAMES)
@example("```\n# heading")
def test_a_fence_is_one_fence(line: str) -> None:
    blocks = MarkdownIt("commonmark").parse(fenced([line, "b"]))
    assert [(token.type, token.content) for token in blocks] == [("fence", f"{printable(line)}\nb\n")]


@given(NAMES, NAMES)
def test_a_table_has_its_cells(one: str, other: str) -> None:
    tokens = MarkdownIt("commonmark").enable("table").parse(table(("a", "b"), [(f"x{one}", f"x{other}")]))
    cells = [tokens[i + 1] for i, token in enumerate(tokens) if token.type == "td_open"]
    shown = ["".join(child.content for child in cell.children or ()) for cell in cells]
    assert shown == [f"x{printable(each)}".rstrip() for each in (one, other)]
