"""The card of a recovery: what it says, and what it does not give away."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

import detune
from tests.families import Fine, State, edit, plain_family, tree


@pytest.fixture
def fine(tmp_path: Path) -> Fine:
    return plain_family(tmp_path / "models")


def say(fine: Fine, *licences: str) -> None:
    for model, licence in zip(fine.models, licences, strict=True):
        (model / "README.md").write_text(f"---\nlicense: {licence}\n---\nof {model}\n")


def test_it_says_what_it_is(command, fine, tmp_path):
    say(fine, "mit", "mit", "mit")
    (fine.models[0] / "config.json").write_text('{"model_type": "x"}')
    words = ["recover", *fine.specs, "--out", tmp_path / "out", "--rank", "16"]
    assert command(*words).code == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.to_dict() == {
        "license": "mit",
        "library_name": "transformers",
        "tags": ["detune", "weight-recovery"],
    }
    for line in (
        "# out",
        "| model-1 | mit |  |",
        "```\ndetune recover model-0 model-1 model-2 --out out --rank 16\n```\n",
        "| layer.\\*.weight ×4 | 80×64 | to the storage floor |",
        "| shared | 3 | No model changed it",
        "this recovery is by detune's `auto`",
        "`README.model-0.md`, `README.model-1.md`, `README.model-2.md`",
    ):
        assert line in card.text
    assert (tmp_path / "out" / "README.model-1.md").read_text() == "---\nlicense: mit\n---\nof ../models/model-1\n"


def test_it_names_no_place_of_this_machine(command, fine, tmp_path, monkeypatch):
    say(fine, "mit", "mit", "mit")
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["recover", *fine.specs, "--out", tmp_path / "out", "--adapters", tmp_path / "loras"]
    assert command(*words).code == 0
    assert command("extract", *fine.specs, "--base", tmp_path / "out", "--out", tmp_path / "again").code == 0
    shown = [content for path, content in tree(tmp_path).items() if not path.startswith("models/")]
    assert len([content for content in shown if content.startswith(b"---\n")]) == 1 + 3 + 2 * (1 + 2 * 3)
    assert not [content for content in shown if str(tmp_path).encode() in content]


def test_an_average_is_called_no_recovery(fine, tmp_path):
    detune.recover(fine.models, tmp_path / "out", "mean")
    text = ModelCard.load(tmp_path / "out" / "README.md").text
    assert "The `mean` of 3 fine-tuned models, made by detune" in text
    assert "and is no recovery." in text
    assert "recovered from the fine-tunes alone" not in text


def test_without_one(fine, tmp_path):
    say(fine, "mit", "mit", "mit")
    detune.recover(fine.models, tmp_path / "out", adapters=tmp_path / "loras", card=False)
    detune.extract(fine.models, tmp_path / "again", base=fine.base, card=False)
    assert not list((tmp_path / "out").glob("README*"))
    assert not list((tmp_path / "loras").rglob("README*"))
    assert not list((tmp_path / "again").rglob("README*"))


def test_licences_that_differ_are_not_taken_over(fine, tmp_path):
    say(fine, "mit", "mit", "gpl-3.0")
    detune.recover(fine.models, tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license is None
    assert "do not all state one licence" in card.text
    assert "| model-2 | gpl-3.0 |" in card.text


def test_models_that_are_left_out_do_not_count(fine, tmp_path):
    say(fine, "mit", "mit", "mit")
    stranger = plain_family(tmp_path / "others", rank=3).models[0]
    edit(stranger, lambda state: state.update({name: state[name] * 3 for name in state if "layer" in name}))
    (stranger / "README.md").write_text("---\nlicense: gpl-3.0\n---\n")
    stranger.rename(tmp_path / "models" / "stranger")
    detune.recover([*fine.models, tmp_path / "models" / "stranger"], tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "mit"
    assert "Left out: stranger, because" in card.text
    assert not (tmp_path / "out" / "README.stranger.md").exists()


def test_models_on_the_hub_are_what_it_derives_from(hub, tmp_path):
    plain_family(hub.root / "org")
    detune.recover(["org/model-0", "org/model-1@main", "org/model-2"], tmp_path / "out", adapters=tmp_path / "loras")
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert data.base_model == ["org/model-0", "org/model-1", "org/model-2"]
    assert data.base_model_relation == "merge"
    assert ModelCard.load(tmp_path / "loras" / "README.md").data.base_model is None, "the base is not there yet"
    plain_family(tmp_path / "here")
    models = [tmp_path / "here" / f"model-{i}" for i in range(2)]
    detune.extract(models, tmp_path / "again", base="org/base")
    for path in (tmp_path / "again").rglob("README.md"):
        data = ModelCard.load(path).data
        assert (data.base_model, data.base_model_relation, data.library_name) == ("org/base", "adapter", "peft")


@pytest.mark.parametrize(
    "name", ["<img src=x onerror=alert(1)>", "a|b\n# c.0.weight", "```\n---", "[x](https://e.org)"]
)
def test_names_of_tensors_stay_text(fine, tmp_path, name):
    def rename(state: State) -> None:
        state[name] = state.pop("layer.0.weight")

    for model in (fine.base, *fine.models):
        edit(model, rename)
    detune.recover(fine.models, tmp_path / "out", adapters=tmp_path / "loras")
    for path in (tmp_path / "out" / "README.md", *(tmp_path / "loras").rglob("README.md")):
        card = ModelCard.load(path)
        tokens = MarkdownIt("commonmark").enable("table").parse(card.text)
        assert not [token for token in tokens if token.type in ("html_block", "code_block")]
        inside = [child for token in tokens for child in token.children or ()]
        assert {child.type for child in inside} <= {
            *("text", "text_special", "softbreak", "code_inline", "em_open", "em_close", "link_open", "link_close"),
        }
        links = [child.attrGet("href") for child in inside if child.type == "link_open"]
        assert set(links) <= {"#how-far-it-can-be-trusted", "https://arxiv.org/abs/2402.10208"}


def test_a_card_that_was_edited_is_somebodys_work(command, fine, tmp_path):
    words = ["recover", *fine.specs, "--out", tmp_path / "out", "--method", "mean"]
    assert command(*words).code == 0
    assert "README.md" in json.loads((tmp_path / "out" / "detune.json").read_text())["files"]
    assert command(*words, "--overwrite").code == 0
    (tmp_path / "out" / "README.md").write_text("mine")
    ran = command(*words, "--overwrite")
    assert ran.code == 2
    assert "README.md has changed since the recovery" in ran.err
