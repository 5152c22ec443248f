"""Tensors with a row for each token, of which models share the first."""

from pathlib import Path

import pytest
import torch

from detune.checkpoints import Part, TensorInfo, View, open_checkpoint
from detune.compatibility.vocabulary import first_own_row, is_vocabulary, resized_rows, vocabulary_sizes
from tests.cases import normal, seeded
from tests.families import plain_state, save_plain

EMBED = "embed_tokens.weight"


def info(*shape: int) -> TensorInfo:
    return TensorInfo("a", shape, torch.float32, 0, "model.safetensors")


@pytest.mark.parametrize(
    ("ours", "theirs", "rows"),
    [
        ((50, 16), (52, 16), (50, 52)),
        ((50,), (49,), (50, 49)),
        ((50, 16), (50, 16), None),
        ((50, 16), (52, 8), None),
        ((50, 16), (52, 16, 1), None),
        ((), (), None),
    ],
)
def test_only_the_number_of_rows_may_differ(ours, theirs, rows):
    assert resized_rows(info(*ours), info(*theirs)) == rows


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "transformer.wte.weight", "lm_head.bias"])
def test_embeddings_and_heads_are_told_by_their_names(name):
    assert is_vocabulary(name)
    assert not is_vocabulary("layers.0.mlp.up_proj.weight")


def saved(folder: Path, count: int, own: bool) -> None:
    """Save the plain model with more rows in its embedding, the last of each its own or not."""
    state = plain_state()
    more = normal(seeded(7), count, 16)
    if own:
        more[-1] = normal(seeded(ord(folder.name)), 16)
    state[EMBED] = torch.cat([state[EMBED], more.float()])
    save_plain(folder, state)


def held(model) -> View:
    return View(model, {EMBED: Part(EMBED)})


def test_sizes_are_told_by_vocabularies_alone(tmp_path):
    saved(tmp_path / "a", 1, own=False)
    saved(tmp_path / "b", 3, own=False)
    with open_checkpoint(tmp_path / "a") as layout, open_checkpoint(tmp_path / "b") as model:
        names = {name: name for name in layout.tensors}
        assert vocabulary_sizes(layout, model, names) == {(51, 53)}
        assert vocabulary_sizes(layout, layout, names) == set()


@pytest.mark.parametrize(("own", "row"), [(True, 52), (False, None)])
def test_rows_of_their_own_begin_where_models_stop_to_agree(tmp_path, own, row):
    for name in "ab":
        saved(tmp_path / name, 3, own)
    with open_checkpoint(tmp_path / "a") as first, open_checkpoint(tmp_path / "b") as second:
        assert first_own_row([held(first), held(second)], EMBED) == row
        assert first_own_row([held(first)], EMBED) is None


def test_rows_that_all_differ_were_trained(tmp_path):
    save_plain(tmp_path / "a", plain_state())
    state = plain_state()
    state[EMBED] = state[EMBED] + 1
    save_plain(tmp_path / "b", state)
    with open_checkpoint(tmp_path / "a") as first, open_checkpoint(tmp_path / "b") as second:
        assert first_own_row([held(first), held(second)], EMBED) is None
