import pytest

from detune.compatibility.names import TwoWays, align_names

NAMES = {f"encoder.layer.{i}.attention.self.{kind}.weight": (8, 8) for i in range(3) for kind in ("query", "value")}
NAMES |= {"embeddings.word_embeddings.weight": (50, 8), "pooler.dense.weight": (8, 8)}


def under(prefix: str) -> dict[str, tuple[int, ...]]:
    return {prefix + name: shape for name, shape in NAMES.items()}


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "bert.", "base_model.model.", "model.language_model.", "0_Transformer/"]
)
def test_a_prefix_more_or_less_is_no_difference(prefix):
    assert align_names(NAMES, under(prefix)) == {name: prefix + name for name in NAMES}
    assert align_names(under(prefix), NAMES) == {prefix + name: name for name in NAMES}


def test_prefixes_are_exchanged():
    pairs = align_names(under("model.language_model."), under("language_model.model."))
    assert pairs == {f"model.language_model.{name}": f"language_model.model.{name}" for name in NAMES}


def test_words_of_wrappers_inside_a_name_count_for_nothing():
    wrapped = {name.replace("layer.1", "layer.1._orig_mod"): shape for name, shape in NAMES.items()}
    assert set(align_names(NAMES, wrapped).values()) == set(wrapped)


def test_an_embedding_may_have_more_rows():
    more = under("module.") | {"module.embeddings.word_embeddings.weight": (52, 8)}
    assert len(align_names(NAMES, more)) == len(NAMES)


@pytest.mark.parametrize(
    ("reference", "other"),
    [
        ({"lm_head.weight": (50, 8)}, {"model.embed_tokens.weight": (50, 8)}),
        ({"a.dense.weight": (8, 8)}, {"b.dense.weight": (8, 8)}),
        ({"a.dense.weight": (8, 8)}, {"module.a.dense.weight": (8, 9, 3)}),
    ],
    ids=["a last word", "one pair of prefixes", "another shape"],
)
def test_what_is_no_alignment(reference, other):
    assert align_names(reference, other) == {}


def test_what_has_no_counterpart_is_left_out():
    other = under("bert.") | {"cls.decoder.weight": (50, 8)}
    del other["bert.pooler.dense.weight"]
    assert set(align_names(NAMES, other)) == set(NAMES) - {"pooler.dense.weight"}


def test_two_towers_are_two_ways():
    towers = under("question.") | under("context.")
    with pytest.raises(TwoWays) as one:
        align_names(NAMES, towers)
    assert {name.partition(".")[0] for name in one.value.candidates} == {"question", "context"}
    with pytest.raises(TwoWays):
        align_names(towers, NAMES)


def test_many_names_take_no_time():
    """Experts each by itself: 18,000 names, all of which end alike."""
    kinds = ("up", "down", "gate")
    names = {f"layers.{i}.experts.{e}.{kind}.weight": (8, 8) for i in range(48) for e in range(128) for kind in kinds}
    assert len(align_names(names, {f"module.{name}": shape for name, shape in names.items()})) == len(names)
