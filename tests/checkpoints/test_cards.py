"""What models say of themselves, read without trust, and cards as the Hub reads them."""

import logging
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig

from detune.checkpoints import PrivatePaths, open_checkpoint
from detune.checkpoints.cards import (
    InputCard,
    Licence,
    agreed_licence,
    command_block,
    kept_cards,
    library_of,
    models_table,
    read_card,
    render_card,
)
from detune.checkpoints.side_files import MAX_CARD_BYTES
from tests.checkpoints.loras import train
from tests.families import plain_family, plain_state, save_plain


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_plain(tmp_path / "models" / "model", plain_state())


def card_of(model: Path, text: str) -> InputCard:
    (model / "README.md").write_text(text, encoding="utf-8")
    return read_card(open_checkpoint(model))


def card(name: str, *licences: Licence | None, texts: tuple[str, ...] = ()) -> InputCard:
    return InputCard(name, None, licences, (), texts)


@pytest.mark.parametrize(
    ("metadata", "licence"),
    [
        ("license: apache-2.0", Licence("apache-2.0")),
        ("license: mit\nlicense_name: mine", Licence("mit")),
        (
            "license: other\nlicense_name: llama3\nlicense_link: https://example.org/a",
            Licence("other", "llama3", "https://example.org/a"),
        ),
        ("license: other\nlicense_link: LICENSE", Licence("other")),
        ("license: [mit, apache-2.0]", None),
        ("license: 'a\"\\n# b: <script>'", None),
        ("license: 2.0", None),
        ("tags: [a]", None),
        ("- a", None),
    ],
)
def test_licences(model: Path, metadata: str, licence: Licence | None) -> None:
    assert card_of(model, f"---\n{metadata}\n---\n# about\n").licences == (licence,)


def test_what_it_was_made_from_is_an_id_or_nobodys_business(model: Path) -> None:
    found = card_of(model, "---\nbase_model: [org/base, /home/ada/base, ../base, 'a b', 3, base]\n---\n")
    assert found.bases == ("org/base", "base")
    assert found.name == "model"
    assert found.hub_id is None


def test_a_model_without_a_card_and_a_single_file_have_none(model: Path) -> None:
    assert read_card(open_checkpoint(model)) == InputCard("model", None, (None,), (), ())
    (model / "README.md").write_text("---\nlicense: mit\n---\n")
    assert read_card(open_checkpoint(model / "model.safetensors")).licences == (None,)


BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghij", "bcdefghijk", strict=True))


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        (BOMB, "aliases"),
        ("a: &a {b: c}\nd: {<<: [*a, *a]}", "aliases"),
        ("license: [", "is damaged; ParserError"),
        ("[" * 60_000, "is damaged; RecursionError"),
        ("a: " + "x" * 70_000, "too much metadata"),
        ("!!python/object/apply:os.mkdir [exploded]", "is damaged; ConstructorError"),
    ],
)
def test_hostile_metadata_is_left_out_and_said(model: Path, caplog, metadata: str, says: str) -> None:
    with caplog.at_level(logging.WARNING):
        found = card_of(model, f"---\n{metadata}\n---\nlicense: mit\n")
    assert found.licences == (None,)
    assert says in caplog.text
    assert not list(model.parent.rglob("exploded"))


def test_cards_that_are_none_are_left_out_and_said(model: Path, caplog) -> None:
    (model / "README.md").write_bytes(b"\xff\xfe---")
    assert read_card(open_checkpoint(model)).texts == ()
    with (model / "README.md").open("wb") as file:
        file.truncate(MAX_CARD_BYTES + 1)
    assert read_card(open_checkpoint(model)).texts == ()
    (model / "README.md").unlink()
    (model / "README.md").symlink_to("/etc/passwd")
    assert read_card(open_checkpoint(model)).texts == ()
    said = [record.getMessage() for record in caplog.records]
    assert ["damaged" in said[0], "has more than" in said[1], "a link out of the model" in said[2]] == [True] * 3


def test_a_licence_is_taken_over_where_all_agree() -> None:
    mit, other = Licence("mit"), Licence("other")
    assert agreed_licence([card("a", mit), card("b", mit, mit)]) == mit
    assert agreed_licence([card("a", mit), card("b", Licence("apache-2.0"))]) is None
    assert agreed_licence([card("a", mit), card("b", None)]) is None
    assert agreed_licence([card("a", other), card("b", other)]) is None, "each may mean another"
    assert agreed_licence([]) is None


def test_base_and_adapter_state_a_licence_each(tmp_path: Path, bert) -> None:
    bert().save_pretrained(tmp_path / "base")
    train(bert(), LoraConfig(r=2, target_modules=["query"]), tmp_path / "adapter")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "adapter" / "README.md").write_text("---\nlicense: gemma\n---\n")
    found = read_card(open_checkpoint(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"))
    assert found.licences == (Licence("mit"), Licence("gemma"))
    assert found.name == "base+adapter"


def test_models_on_the_hub_bring_their_cards(hub, tmp_path: Path) -> None:
    fine = plain_family(hub.root / "org")
    (fine.models[0] / "README.md").write_text("---\nlicense: mit\n---\n")
    found = read_card(open_checkpoint("org/model-0@main"))
    assert (found.name, found.hub_id, found.licences) == ("org/model-0@main", "org/model-0", (Licence("mit"),))


def test_kept_cards_have_other_names_and_name_no_places(tmp_path: Path) -> None:
    home = str(Path.home())
    text = f"trained from {home}/secret and {tmp_path}/models/a"
    cards = [
        card("org/final@main", texts=("one",)),
        card("final@main", texts=(text, "three")),
        card("../\x1b[31m a/..", texts=("",)),
    ]
    kept = kept_cards(cards, PrivatePaths(tmp_path / "out", [tmp_path / "models" / "a"]))
    assert {name: content.decode() for name, content in kept.items()} == {
        "README.final-main.md": "one",
        "README.final-main-2.md": "trained from ~/secret and ../models/a",
        "README.final-main-3.md": "three",
        "README.model.md": "",
    }


def test_the_hub_reads_what_is_rendered(tmp_path: Path) -> None:
    hostile = "a\n---\nlicense: mit\n---\n'\"&*!|>%@`: #"
    content = render_card(
        "# a\n\n\n\n\nb", Licence("other", "x", None), base_model=["org/a"], library_name=hostile, tags=[]
    )
    (tmp_path / "README.md").write_bytes(content)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == {
        "base_model": ["org/a"],
        "library_name": hostile,
        "license": "other",
        "license_name": "x",
    }
    assert card.text.strip() == "# a\n\nb"
    assert list(yaml.safe_load_all(content.decode().split("\n---\n\n")[0]))


def test_commands_name_no_places_and_those_of_others_are_not_shown(tmp_path: Path) -> None:
    places = PrivatePaths(tmp_path, [])
    words = [
        "detune",
        "recover",
        "a b",
        f"/x/c+{tmp_path}/d",
        f"--out={tmp_path}/e",
        "--scheduler",
        f"x:{Path.home()}/f",
    ]
    shown = "```\ndetune recover 'a b' c+d --out=e --scheduler 'x:~/f'\n```\n"
    assert command_block(words, "f", places) == shown
    assert (
        command_block(["train.py", "--key", "k"], "detune.recover", places) == "`detune.recover`, called from Python.\n"
    )


def test_names_are_text_in_the_table() -> None:
    shown = models_table([card("<b>|x", None, Licence("mit"))])
    assert shown.splitlines()[-1] == "| &lt;b&gt;\\|x | none stated, mit |  |"


@pytest.mark.parametrize(
    ("files", "library"),
    [
        ({"config.json": '{"model_type": "llama"}'}, "transformers"),
        ({"config.json": '{"_class_name": "UNet", "_diffusers_version": "0.32"}'}, "diffusers"),
        ({"config.json": '{"model_type": "bert"}', "modules.json": '[{"path": ""}]'}, "sentence-transformers"),
        ({"config.json": "{}"}, None),
        ({"config.json": "["}, None),
        ({}, None),
    ],
)
def test_the_library_is_told_by_files(model: Path, files: dict[str, str], library: str | None) -> None:
    (model / "config.json").unlink()
    for name, content in files.items():
        (model / name).write_text(content)
    assert library_of(open_checkpoint(model)) == library
