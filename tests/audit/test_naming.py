from detune.audit.naming import positions, short_names


def test_blocks_are_ordered_by_their_numbers_within_a_prefix():
    names = [f"encoder.layer.{i}.attention.self.query.weight" for i in (10, 0, 2)] + ["decoder.0.query.weight"]
    found = positions(names)
    assert [found[name].depth for name in names] == [2, 0, 1, 3]
    assert found[names[0]].kind == "attention.self.query"
    assert found[names[0]].block == "encoder.layer.10"


def test_the_first_number_is_the_block():
    (place,) = positions(["unet/down_blocks.1.attentions.0.attn1.to_q.weight"]).values()
    assert (place.block, place.kind) == ("unet/down_blocks.1", "attentions.0.attn1.to_q")


def test_names_without_a_number_have_no_depth():
    found = positions(["embeddings.word.weight", "weight", "layer.0.weight", "3"])
    assert [(place.depth, place.kind) for place in found.values()] == [
        (None, "embeddings.word"),
        (None, "weight"),
        (0, "weight"),
        (1, "weight"),
    ]


def test_kinds_are_shortened_as_far_as_they_can_be_told_apart():
    assert list(short_names(["self.query", "cross.query", "mlp.up", "up"]).values()) == [
        "self.query",
        "cross.query",
        "mlp.up",
        "up",
    ]
