"""What becomes Markdown and tables: cards of models, results of the benchmark, entries of its leaderboard."""

import csv
import json
import math
import shutil
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from detune.bench.leaderboard import build_page, read_entries
from detune.bench.leaderboard.page import BEGIN, END
from detune.bench.results import EXACT_W_ERROR, ResultStore
from detune.bench.sheets import write_sheet
from detune.bench.table import frame_of, markdown
from detune.checkpoints import open_checkpoint
from detune.checkpoints.cards import agreed_licence, models_table, read_card, render_card
from tests.families import plain_state, save_plain
from tests.fuzzing.mutation import TEXTS, edit_json, mutated_bytes
from tests.fuzzing.runner import Target, Wrong

__all__ = ["PAGES"]

ENTRIES = Path(__file__).parents[2] / "docs" / "leaderboard" / "entries"


def tokens(text: str) -> set[str]:
    """The kinds of what a Markdown library finds, the least harmless among them."""
    found = MarkdownIt("commonmark").enable("table").parse(text)
    return {each.type for token in found for each in (token, *(token.children or ()))}


def require_harmless(text: str) -> None:
    """Refuse tags, pictures and control characters."""
    if kinds := tokens(text) & {"html_inline", "html_block", "image"}:
        raise Wrong(f"it writes {min(kinds)} into a page")
    if strange := [each for each in text if not each.isprintable() and each != "\n"]:
        raise Wrong(f"it writes {strange[0]!a} into a page")


# --- results ---


def make_result(folder: Path) -> None:
    """A cell of two layers."""
    layer = {
        "model": "m",
        "name": "layer",
        "kind": "q",
        "depth": 0,
        "shape": [2, 3],
        "bit_identical": 0.5,
        "seconds": 1.0,
    }
    layers = [layer | {"index": i, "mse": mse, "peak_memory_bytes": 1} for i, mse in enumerate((1e-9, 1e-7))]
    cell = {"subset": "s", "fingerprint": "f", "stands_for": "vit", "method": "auto", "settings": "x", "seed": 0}
    cell |= {"method_sha256": None, "loras": [0, 1, 2], "rank_known": True}
    environment = {"versions": {"detune": "1"}, "code_sha256": "0", "system": "", "threads": 1, "device": "cpu"}
    result = {
        "cell": cell,
        "source": "s",
        "environment": environment,
        "layers": layers,
        "behaviour": {"activation": 0.1},
    }
    (folder / "one.json").write_text(json.dumps(result | {"notes": ["a note"]}))


def read_result(folder: Path, _: Path) -> None:
    """The table has the W-Error of the layers, and nothing of a name's own."""
    (result,) = ResultStore(folder).read_all()
    errors = [math.log10(layer.mse) if layer.mse else EXACT_W_ERROR for layer in result.layers]
    frame = frame_of([result])
    if not math.isclose(frame["w_error"][0], fmean(errors), rel_tol=1e-9, abs_tol=1e-9):
        raise Wrong(f"the W-Error is {frame['w_error'][0]}, not {fmean(errors)}")
    require_harmless(markdown([result]))
    write_sheet(frame, folder / "sheet.csv")
    with (folder / "sheet.csv").open(newline="", encoding="utf-8") as file:
        for cell in (cell for row in csv.reader(file) for cell in row):
            if not cell.isprintable() or (cell.lstrip()[:1] in tuple("=+@") and cell):
                raise Wrong(f"a cell is {cell!a}")


# --- entries of the leaderboard ---


def make_entry(folder: Path) -> None:
    """One of ours, and a page."""
    shutil.copy(ENTRIES / "none.json", folder / "none.json")
    (folder / "page.md").write_text(f"# A page\n\n{BEGIN}\n{END}\n")


def read_entry(folder: Path, _: Path) -> None:
    """The page has the entry as text, and does not grow."""
    entries = read_entries(folder)
    page = folder / "page.md"
    made = build_page(entries, page)
    page.write_text(made, encoding="utf-8")
    if build_page(entries, page) != made:
        raise Wrong("the page grows")
    require_harmless(made[made.index(BEGIN) + len(BEGIN) : made.index(END)])


# --- cards ---


def make_card(folder: Path) -> None:
    """A model with a card."""
    save_plain(folder / "model", plain_state())
    metadata = (
        "license: other\nlicense_name: x-1\nlicense_link: https://example.org/x\nbase_model:\n- org/base\ntags: [a]"
    )
    (folder / "model" / "README.md").write_text(f"---\n{metadata}\n---\n\n# A model\n\nSome text.\n")


def mutate_card(draw: Random, folder: Path) -> None:
    """Change its bytes, or put a text somewhere."""
    path = folder / "model" / "README.md"
    data = path.read_bytes()
    if draw.random() < 0.5:
        path.write_bytes(mutated_bytes(draw, data, draw.choice((1, 1, 3))))
        return
    text = draw.choice((*TEXTS, "&a [*a]", "!!python/name:os.system", "{" * 3000, "<<: {a: b}", "- " * 2000, "'", "|"))
    place = draw.randrange(len(data) + 1)
    path.write_bytes(data[:place] + text.encode(errors="surrogatepass") + data[place:])


def read_model_card(folder: Path, _: Path) -> None:
    """Whatever it says, there is a card of what is made of the model, with metadata that the Hub reads."""
    with open_checkpoint(folder / "model") as model:
        card = read_card(model)
    licence = agreed_licence([card])
    made = render_card(models_table([card]), licence, base_model=list(card.bases)).decode()
    read: Any = ModelCard(made)
    stated = {} if licence is None else {key: value for key, value in vars(licence).items() if value}
    if any(read.data.get(key) != value for key, value in stated.items()):
        raise Wrong(f"the licence is {read.data.to_dict()}, not {stated}")
    require_harmless(read.text)


PAGES = (
    Target("result", make_result, lambda draw, to: edit_json(draw, to / "one.json"), read_result),
    Target("entry", make_entry, lambda draw, to: edit_json(draw, to / "none.json"), read_entry),
    Target("card", make_card, mutate_card, read_model_card),
)
