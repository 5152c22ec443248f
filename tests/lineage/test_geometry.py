import pytest
import torch

from detune.compatibility.low_rank_test import RelationKind
from detune.lineage.geometry import Rounding, Share, first_share, rounding_shares
from tests.lineage.trees import Descent

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(params=DTYPES, ids=str)
def chain(request) -> Descent:
    """A base, two LoRAs of it, and one merged onto the first of these."""
    found = Descent(request.param)
    found.lora("sft", "base", 4)
    found.lora("other", "base", 6)
    found.lora("dpo", "sft", 3)
    return found


def test_squared_distances_add_up_along_the_tree(chain):
    d = chain.geometry("base", "sft", "dpo", "other").distances
    assert float(d[0, 2]) == pytest.approx(float(d[0, 1] + d[1, 2]), rel=0.1)
    assert float(d[2, 3]) == pytest.approx(float(d[2, 1] + d[1, 0] + d[0, 3]), rel=0.1)
    assert torch.equal(d, d.mT)
    assert not d.diagonal().any()


def test_ranks_add_up_along_the_tree(chain):
    g = chain.geometry("base", "sft", "dpo", "other")
    assert g.ranks(0, 1) == (4, 4, 4)
    # Three roundings lie between these two, of which two are allowed for: in half precision noise passes for ranks.
    assert all(13 <= rank <= 13 + 7 * (chain.dtype.itemsize == 2) for rank in g.ranks(3, 2))
    # The edge from the base to sft, by models beyond both of its ends.
    assert g.rank_between(0, 3, 1, 2) == pytest.approx(4, abs=2)
    assert g.shared_rank(0, 1, 3) == pytest.approx(0, abs=0.2)
    assert g.shared_rank(0, 1, 2) == pytest.approx(1, abs=0.2)
    # Seen from `other`, the ways to sft and dpo go together all the way to sft.
    assert g.shared_rank(3, 1, 2) == pytest.approx(1, abs=0.3)


def test_a_full_fine_tune_has_no_rank():
    models = Descent()
    models.full("full", "base")
    models.lora("lora", "base")
    g = models.geometry("base", "full", "lora")
    assert set(g.kinds(0, 1)) == {RelationKind.FULL_RANK}
    assert (g.ranks(0, 1), g.shared_rank(0, 1, 2), g.roundings(0, 1)) == ((), None, [])


def test_a_merge_rounds_the_child_and_not_the_parent(chain):
    g = chain.geometry("base", "sft", "dpo", "other")
    for parent, child in ((0, 1), (1, 2), (0, 3)):
        part = first_share(g.roundings(parent, child), 1)
        assert part.value == pytest.approx(0, abs=0.25)
        assert first_share(g.roundings(child, parent), 1).value == pytest.approx(1 - part.value)
    assert first_share(g.roundings(1, 3), 2).value == pytest.approx(1, abs=0.2)
    # Two merges, of which the first is seen in half at either's steps.
    assert first_share(g.roundings(0, 2), 2).value == pytest.approx(0.5, abs=0.25)


def test_a_matrix_with_other_than_the_expected_roundings_says_nothing(chain):
    g = chain.geometry("base", "sft")
    assert first_share(g.roundings(0, 1), 3) is None
    assert first_share([], 1) is None


def test_one_side_tells_where_the_other_cannot():
    fine, unknown = Share(0.9, 0.05), Share(40.0, 9.0)
    assert first_share([Rounding(unknown, fine)], 1).value == pytest.approx(0.1)
    assert first_share([Rounding(fine, unknown)], 1) == pytest.approx(fine)
    assert first_share([Rounding(unknown, unknown)], 1) is None


def test_both_ways_round_say_the_same(chain):
    W, W_child = (chain.states[name]["layers.0.weight"] for name in ("base", "sft"))
    there, back = rounding_shares(W, W_child), rounding_shares(W_child, W)
    assert there.first.value == pytest.approx(back.second.value, abs=1e-6)
    assert there.second.value == pytest.approx(back.first.value, abs=1e-6)


def test_equal_matrices_say_nothing_of_roundings():
    W = Descent().states["base"]["layers.0.weight"]
    assert rounding_shares(W, W) is None


def test_changes_below_a_step_say_nothing_of_roundings():
    models = Descent(torch.bfloat16)
    models.lora("a", "base", size=2e-4)
    g = models.geometry("base", "a")
    assert g.is_light(0, 1)
    assert g.roundings(0, 1) == []


def test_levels_hide_a_difference_of_their_own_size():
    models = Descent()
    models.int8("int8", "base")
    models.lora("lora", "base")
    g = models.geometry("base", "int8", "lora")
    g.noise = [[None, float((b[0] - b[1]).square().mean().sqrt()), None] for b in g.blocks]
    assert g.hides(0, 1)
    assert not g.hides(0, 2)


def test_a_model_on_levels_may_be_a_base():
    """Its LoRAs differ from it by low ranks, whatever its levels would hide."""
    models = Descent()
    models.int8("int8", "base")
    models.lora("a", "int8", 4, size=0.001)
    g = models.geometry("int8", "a")
    g.noise = [[0.01, None]] * len(g.blocks)
    assert g.ranks(0, 1) == (4, 4, 4)
    assert not g.hides(0, 1)
