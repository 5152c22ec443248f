"""Trees of models on disk, and what their edges are."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import detune
from detune.errors import InputError
from detune.lineage import EdgeKind, Lineage, Node
from tests.families import edit
from tests.lineage.trees import Descent

DTYPES = [torch.bfloat16, torch.float32]


def edges(lineage: Lineage) -> dict[str, tuple[str | None, EdgeKind | None, int | None]]:
    return {node.name: (node.parent, node.kind, node.rank) for node in lineage.nodes}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_chain_with_its_base(tmp_path, dtype):
    models = Descent(dtype)
    models.lora("sft", "base", 8)
    for k, rank in enumerate((2, 4, 3)):
        models.lora(f"dpo-{k}", "sft", rank)
    models.lora("other", "base", 5)
    specs = models.saved(tmp_path, "dpo-1", "base", "dpo-0", "sft", "dpo-2", "other")
    found = detune.find_lineage(specs)
    lora = EdgeKind.LORA
    assert edges(found) == {
        "base": (None, None, None),
        "sft": ("base", lora, 8),
        "other": ("base", lora, 5),
        "dpo-0": ("sft", lora, 2),
        "dpo-1": ("sft", lora, 4),
        "dpo-2": ("sft", lora, 3),
    }
    assert all(node.sure for node in found.nodes)
    assert found.node("sft").why == "their difference is rounded to its steps, not to its parent's"
    assert found.node(str(tmp_path / "sft")) is found.node("sft")
    assert (found.looked_at, found.unrelated) == (3, ())
    # Parents first.
    names = [node.name for node in found.nodes]
    assert all(names.index(node.parent) < names.index(node.name) for node in found.nodes if node.parent)


@pytest.mark.parametrize("value", [1e30, -1e5])
def test_a_damaged_entry_changes_nothing(tmp_path, value):
    models = Descent()
    models.lora("sft", "base", 8)
    for k in range(2):
        models.lora(f"dpo-{k}", "sft", 2)
    specs = models.saved(tmp_path, "base", "sft", "dpo-0", "dpo-1")
    before = detune.find_lineage(specs)
    for spec, place in ((specs[1], (3, 5)), (specs[2], (90, 7))):
        edit(Path(spec), lambda state, place=place: state["layers.1.weight"].index_put_(
            tuple(torch.tensor([each]) for each in place), torch.tensor(value)))  # fmt: skip
    assert edges(detune.find_lineage(specs)) == edges(before)
    assert edges(before)["dpo-0"][0] == "sft"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ancestors_that_are_none_of_the_models(tmp_path, dtype):
    models = Descent(dtype)
    models.lora("sft", "base", 6)
    for k in range(3):
        models.lora(f"dpo-{k}", "sft", 2 + k)
    for k in range(2):
        models.lora(f"other-{k}", "base", 3)
    given = [f"dpo-{k}" for k in range(3)] + [f"other-{k}" for k in range(2)]
    found = detune.find_lineage(models.saved(tmp_path, *given))
    sft, base = (found.node(name).parent for name in ("dpo-0", "other-0"))
    assert [found.node(f"dpo-{k}").parent for k in range(3)] == [sft] * 3
    assert found.node("other-1").parent == base != sft
    # Which of the two is older may not show: nothing but their descendants is here.
    (root,) = found.children(None)
    assert root.name in (sft, base)
    assert (found.node(sft).rank or found.node(base).rank) >= 6
    assert len(found.sources(sft)) == 4
    assert len(found.sources(base)) == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_adapter_at_two_strengths(tmp_path, dtype):
    models = Descent(dtype)
    update = models.lora("full-strength", "base", 4)
    models.add("half-strength", "base", update, 0.5)
    models.lora("other", "base", 4)
    found = detune.find_lineage(models.saved(tmp_path, "base", "full-strength", "half-strength", "other"))
    assert edges(found)["half-strength"][:2] == ("base", EdgeKind.LORA)
    assert edges(found)["full-strength"][:2] == ("half-strength", EdgeKind.STRENGTH)


def test_a_later_checkpoint_of_a_run(tmp_path):
    models = Descent()
    update = models.lora("step-100", "base", 4)
    turned = {}
    for name, M in update.items():
        U, S, Vh = torch.linalg.svd(M)
        B, A = U[:, :4] * S[:4], Vh[:4]
        turned[name] = (B + 0.3 * B.norm() * (N := models.update(4)[name][:, :4]) / N.norm()) @ A * 1.1
    models.add("step-200", "base", turned)
    models.lora("other", "base", 4)
    found = detune.find_lineage(models.saved(tmp_path, "step-200", "base", "other", "step-100"))
    assert edges(found)["step-200"][:2] == ("step-100", EdgeKind.CHECKPOINT)
    assert edges(found)["step-100"][:2] == ("base", EdgeKind.LORA)


def test_a_merge_of_two_models(tmp_path):
    models = Descent()
    first, second = models.lora("first", "base", 4), models.lora("second", "base", 4)
    models.lora("third", "base", 4)
    models.add("both", "base", {k: 0.6 * first[k] + 0.4 * second[k] for k in first})
    found = detune.find_lineage(models.saved(tmp_path, "base", "both", "first", "second", "third"))
    both = found.node("both")
    assert (both.parent, both.other_parent, both.kind) == ("first", "second", EdgeKind.MERGE)
    assert both.share == pytest.approx(0.4, abs=0.01)
    assert both.edge == "merge of two models, 40 % of second"


def test_full_fine_tunes(tmp_path):
    models = Descent()
    models.lora("sft", "base")
    models.full("full", "sft")
    models.lora("other", "base")
    found = detune.find_lineage(models.saved(tmp_path, "base", "sft", "full", "other"))
    assert edges(found)["full"] == ("sft", EdgeKind.FULL, None)


def test_two_full_fine_tunes_alone_have_no_direction(tmp_path):
    models = Descent()
    models.full("full", "base")
    found = detune.find_lineage(models.saved(tmp_path, "full", "base"))
    (child,) = (node for node in found.nodes if node.parent)
    assert not child.sure
    assert child.why.startswith("too little tells which is older")


def test_quantised_and_cast_models_are_children(tmp_path):
    models = Descent()
    models.lora("a", "base", 4)
    models.lora("b", "base", 4)
    models.int8("a-int8", "a")
    models.states["b-bf16"] = {name: W.bfloat16() for name, W in models.states["b"].items()}
    found = detune.find_lineage(models.saved(tmp_path, "a-int8", "b-bf16", "b", "a", "base"))
    assert edges(found)["a-int8"][:2] == ("a", EdgeKind.QUANTISED)
    assert edges(found)["b-bf16"][:2] == ("b", EdgeKind.QUANTISED)
    assert found.node("a-int8").why == "it is its parent on coarser levels"


def test_added_tokens(tmp_path):
    models = Descent()
    models.lora("a", "base")
    specs = models.saved(tmp_path, "base", "a")
    more = models.saved(tmp_path / "more", "a")
    embedding = torch.ones(50, 16)
    for path in specs:
        edit(tmp_path / path, lambda state: state.update({"embed_tokens.weight": embedding}))
    edit(
        tmp_path / "more" / "a",
        lambda state: state.update({"embed_tokens.weight": torch.cat([2 * embedding, torch.zeros(2, 16)])}),
    )
    found = detune.find_lineage([*specs, *more])
    child = found.node(more[0])
    assert (child.parent, child.kind, child.tokens) == (specs[1], EdgeKind.VOCABULARY, 2)
    assert child.edge == "vocabulary, +2 tokens"


def test_light_fine_tunes_say_so(tmp_path):
    models = Descent(torch.bfloat16)
    for name in ("a", "b", "c"):
        models.lora(name, "base", size=3e-4)
    found = detune.find_lineage(models.saved(tmp_path, "a", "b", "base", "c"))
    assert edges(found)["a"][:2] == ("base", EdgeKind.LIGHT)
    assert not found.node("a").sure


def test_two_bases_have_two_trees_and_another_architecture_none(tmp_path):
    models, others = Descent(), Descent(seed=1)
    models.lora("a", "base")
    others.lora("b", "base")
    specs = [*models.saved(tmp_path / "x", "base", "a"), *others.saved(tmp_path / "y", "base", "b")]
    foreign = Descent(seed=2)
    foreign.states["base"] = {"h.0.c_attn": torch.ones(70, 65)}
    specs += foreign.saved(tmp_path / "z", "base")
    found = detune.find_lineage(specs)
    assert sorted(node.spec for node in found.children(None)) == sorted([specs[0], specs[2]])
    assert found.unrelated == (specs[4],)
    # Where names are not unique, they are the specs.
    assert [found.node(spec).name for spec in specs[:3]] == [specs[0], "a", specs[2]]


def test_models_that_differ_in_no_matrix_have_no_tree(tmp_path):
    models = Descent()
    specs = [*models.saved(tmp_path / "x", "base"), *models.saved(tmp_path / "y", "base")]
    for k, spec in enumerate(specs):
        edit(tmp_path / spec, lambda state, k=k: state.update({"norm": torch.ones(3) + k}))
    assert detune.find_lineage(specs).nodes == ()


def test_refuses_nan_and_a_single_model(tmp_path):
    models = Descent()
    models.lora("a", "base")
    specs = models.saved(tmp_path, "base", "a")
    with pytest.raises(InputError, match="1 model given; a tree has at least two; add models"):
        detune.find_lineage(specs[:1])
    edit(tmp_path / "a", lambda state: state["layers.0.weight"].fill_(float("nan")))
    with pytest.raises(InputError, match=r"'layers.0.weight' of .*a holds NaN or Inf"):
        detune.find_lineage(specs)


def test_nodes_that_cannot_be_recovered(tmp_path):
    models = Descent()
    for name in ("a", "b", "c"):
        models.lora(name, "base")
    found = detune.find_lineage(models.saved(tmp_path, "a", "b", "c"))
    with pytest.raises(InputError, match="no node 'x' in the tree; ancestors in it: ancestor-1; see `detune family`"):
        found.sources("x")
    with pytest.raises(InputError, match="a is one of the models"):
        found.sources("a")
    lonely = Lineage((Node("ancestor-1", None),), (), 1, 0.0)
    with pytest.raises(InputError, match="ancestor-1 cannot be recovered from these models; fewer than three ways"):
        lonely.sources("ancestor-1")


def test_the_picture_is_text_whatever_names_hold():
    nodes = (
        Node("ancestor-1", None),
        Node('a"] --> b; click', "x", "ancestor-1", EdgeKind.LORA, 8),
        Node("c", "y", "ancestor-1", EdgeKind.LIGHT, sure=False),
        Node("\u202egnp.c", "z"),
    )
    lines = Lineage(nodes, (), 3, 0.1).to_mermaid().splitlines()
    assert lines[:2] == ["flowchart TD", '  n0(["ancestor-1"]):::hidden']
    assert lines[2] == '  n1["a#34;#93; --#62; b#59; click"]'
    assert lines[4] == '  n3["#92;u202egnp.c"]'
    assert '  n0 -->|"LoRA of rank 8"| n1' in lines
    assert '  n0 -.->|"light fine-tune"| n2' in lines


# --- the command ---


@pytest.fixture
def family(tmp_path) -> list[str]:
    models = Descent()
    models.lora("sft", "base", 6)
    for k in range(3):
        models.lora(f"dpo-{k}", "sft", 2)
    models.lora("other", "base", 3)
    models.saved(tmp_path / "truth", "sft")
    return models.saved(tmp_path, "base", "other", "dpo-0", "dpo-1", "dpo-2")


def test_family_prints_the_tree(command, family):
    ran = command("family", *family)
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    at = lines.index("base")
    assert {"├── other: LoRA of rank 3", "└── (ancestor-1, none of these models): LoRA of rank 6"} <= set(lines[at:])
    assert sum(bool(re.fullmatch(r"    [├└]── dpo-\d: LoRA of rank 2", line)) for line in lines) == 3
    assert "ancestor-1 can be recovered: recover --node ancestor-1" in lines


def test_an_inner_ancestor_is_recovered(command, family, tmp_path):
    ran = command("recover", *family, "--node", "ancestor-1", "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    truth = load_file(tmp_path / "truth" / "sft" / "model.safetensors")
    for name, W in load_file(tmp_path / "out" / "model.safetensors").items():
        assert float((W - truth[name]).double().square().mean().log10()) < -13
    inputs = json.loads((tmp_path / "out" / "detune.json").read_text())["inputs"]
    assert len(inputs) == 4


def test_a_node_that_is_a_model_is_refused(command, family, tmp_path):
    ran = command("recover", *family, "--node", "base", "--out", tmp_path / "out")
    assert ran.code == 2
    assert "base is one of the models; expected an ancestor" in ran.err


def test_family_writes_a_picture_and_json(command, family, tmp_path):
    ran = command("family", *family, "--mermaid", tmp_path / "tree.mmd", "--json")
    assert (ran.code, ran.err) == (0, "")
    assert (tmp_path / "tree.mmd").read_text().startswith("flowchart TD\n")
    content = json.loads(ran.out)
    assert content["format"] == "detune-family/1"
    assert content["lineage"]["nodes"][0]["name"] == "base"
    assert command("family", *family, "--mermaid", tmp_path / "tree.mmd").code == 2
    ran = command("family", *family, "--mermaid", tmp_path / "both", "--bom", tmp_path / "both")
    assert ran.code == 2
    assert "each result needs its own place" in ran.err
    assert not (tmp_path / "both").exists()
