"""Sets as people publish them: each comes out as the plain form of the same set does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import detune
from detune._runtime import quiet
from detune.certificate.verdict import Verdict
from detune.errors import InputError
from detune.metrics import w_error
from tests.cases import normal, seeded
from tests.families import Fine, State, add, delta, edit, fine_tune, plain_family, save_plain, stored

LAYERS = [f"layer.{i}.weight" for i in range(4)]
EMBED, HEAD = "embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def fine(tmp_path: Path) -> Fine:
    return plain_family(tmp_path / "models", 3)


def assert_close(out: Path, base: Path, names: list[str] = LAYERS) -> None:
    found, truth = stored(out), stored(base)
    assert all(w_error(found[name], truth[name]) < -13 for name in names)


def rows_more(count: int) -> Callable[[State], None]:
    def change(state: State) -> None:
        state[EMBED] = torch.cat([state[EMBED], normal(seeded(count), count, 16).float()])

    return change


def renamed(prefix: str) -> Callable[[State], None]:
    def change(state: State) -> None:
        for name in list(state):
            state[prefix + name] = state.pop(name)

    return change


@pytest.mark.parametrize(
    "changes",
    [
        {2: rows_more(2)},
        {0: rows_more(2)},
        {0: rows_more(1), 1: rows_more(2), 2: rows_more(8)},
        {1: renamed("module.")},
        {0: renamed("model.language_model.")},
        {1: lambda state: state.update({HEAD: state[EMBED].clone()})},
        {0: lambda state: state.update({HEAD: state[EMBED].clone()})},
        {1: lambda state: state.pop("norm.weight")},
        {0: lambda state: state.update({"more": torch.ones(3)})},
        {0: lambda state: state.update({LAYERS[1]: state[LAYERS[1]].mT.contiguous()})},
    ],
    ids=["tokens", "first", "each", "module", "language", "tied", "tied first", "lacks", "more", "turned"],
)
def test_it_comes_out_as_the_plain_form_does(fine, tmp_path, changes):
    plain = detune.recover(fine.models, tmp_path / "plain")
    for i, change in changes.items():
        edit(fine.models[i], change)
    report = detune.recover(fine.models, tmp_path / "out")
    expected, found = stored(tmp_path / "plain"), stored(tmp_path / "out")
    if len(changes) < 3 and list(changes) != [0]:
        assert set(found) == set(expected)
    for name in LAYERS:
        errors = [w_error(state[name], stored(fine.base)[name]) for state in (found, expected)]
        assert abs(errors[0] - errors[1]) < 0.3
    assert torch.equal(found[EMBED][:50], expected[EMBED])
    statuses = [{row.verdict for row in each.tensors if row.name in LAYERS} for each in (report, plain)]
    assert statuses[0] == statuses[1]
    assert any(row.notes for row in report.inputs)


def test_fine_tuned_embeddings_beside_added_tokens(fine, tmp_path):
    """What PEFT's `modules_to_save` trains: rows that at most one of three has trained are the base's."""
    base = stored(fine.base)[EMBED]
    for i, model in enumerate(fine.models):
        trained = base.clone()
        trained[10 * i : 10 * i + 5] += normal(seeded(i), 5, 16).float()
        trained[40:42] += normal(seeded(10 + i), 2, 16).float()
        edit(model, lambda state, trained=trained: state.update({EMBED: trained}))
    edit(fine.models[1], rows_more(2))
    report = detune.recover(fine.models, tmp_path / "out")
    found = stored(tmp_path / "out")
    untrained = [row for row in range(50) if row not in (40, 41)]
    assert torch.equal(found[EMBED][untrained], base[untrained])
    (row,) = (row for row in report.tensors if row.name.startswith(EMBED))
    assert row.verdict is Verdict.NOT_DETERMINED
    assert "32 of 800 entries are in no two models; the others are the base's own bits" in row.reason
    assert_close(tmp_path / "out", fine.base)


@pytest.mark.parametrize("rank", [2, None], ids=["of low rank", "of full rank"])
def test_rows_that_all_models_have_trained(fine, tmp_path, rank):
    """A LoRA on one part of a fused matrix is one; rows that were trained in full are averaged, without the others."""
    base = normal(seeded(0), 192, 64).float()
    for i, model in enumerate(fine.models):
        generator, fused = seeded(i + 1), base.clone()
        part = normal(generator, 64, 64) if rank is None else normal(generator, 64, 2) @ normal(generator, 2, 64)
        fused[:64] += part.float()
        edit(model, lambda state, fused=fused: state.update({"fused.weight": fused}))
    report = detune.recover(fine.models, tmp_path / "out")
    found = stored(tmp_path / "out")["fused.weight"]
    (row,) = (row for row in report.tensors if row.name == "fused.weight")
    if rank:
        assert w_error(found, base) < -13
        assert row.ranks == (2, 2, 2)
    else:
        assert torch.equal(found[64:], base[64:])
        assert row.verdict is Verdict.NOT_DETERMINED


def test_the_layout_can_be_told(fine, tmp_path):
    edit(fine.models[2], renamed("module."))
    detune.recover(fine.models, tmp_path / "out", like=fine.models[2])
    assert set(stored(tmp_path / "out")) == {f"module.{name}" for name in stored(fine.base)}
    assert json.loads((tmp_path / "out" / "detune.json").read_text())["command"]["like"] == "../models/model-2"


def test_processes_see_the_same_pieces(fine, tmp_path):
    from detune.recovery.execution import Processes

    edit(fine.models[0], rows_more(2))
    edit(fine.models[1], renamed("module."))
    detune.recover(fine.models, tmp_path / "one")
    with Processes(2) as executor:
        detune.recover(fine.models, tmp_path / "many", executor=executor)
    one, many = (tmp_path / name / "model.safetensors" for name in ("one", "many"))
    assert one.read_bytes() == many.read_bytes()


def test_a_model_that_was_not_merged_gives_its_base_and_its_adapter(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, vocab_size=64
    )
    base = LlamaForCausalLM(config)
    base.save_pretrained(tmp_path / "base")
    truth = stored(tmp_path / "base")
    with quiet():
        model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "unmerged.safetensors")

    report = detune.recover([tmp_path / "unmerged.safetensors"], tmp_path / "out")
    assert {(row.verdict, row.method) for row in report.tensors} == {(Verdict.EXACT, "copy")}
    found = stored(tmp_path / "out")
    assert set(found) == set(truth)
    assert all(torch.equal(found[name], tensor) for name, tensor in truth.items())
    assert "saved without merging" in detune.inspect([tmp_path / "unmerged.safetensors"]).inputs[0].notes[-1]

    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 8}')
    detune.extract([tmp_path / "unmerged.safetensors"], tmp_path / "loras", base=tmp_path / "out")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    with quiet():
        loaded = PeftModel.from_pretrained(base, tmp_path / "loras" / "unmerged").merge_and_unload().state_dict()
        merged = model.merge_and_unload().state_dict()
    assert any(not torch.equal(merged[name], tensor) for name, tensor in truth.items())
    for name, tensor in merged.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=1e-6)


def moe(tmp_path: Path, dtype: torch.dtype = torch.float32, n: int = 3) -> Fine:
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=72,
        num_local_experts=4,
        vocab_size=64,
    )
    return fine_tune(MixtralForCausalLM(config).to(dtype), ["q_proj"], tmp_path / "moe", n)


def tune_experts(fine: Fine, skip: tuple[int, int]) -> list[str]:
    """Add a LoRA to each expert by itself, but for one that one model never trained."""
    names = [name for name, tensor in stored(fine.base).items() if "experts" in name and tensor.ndim == 3]
    generator = seeded(7)
    for i, model in enumerate(fine.models):

        def change(state: State, i: int = i) -> None:
            for name in names:
                for e, expert in enumerate(state[name]):
                    if (i, e) != skip:
                        state[name][e] = add(expert, delta(generator, expert, 2))

        edit(model, change)
    return names


def stacked(fine: Fine) -> None:
    """As transformers holds every mixture of experts in memory, and some checkpoints store it."""
    for path in (fine.base, *fine.models):

        def change(state: State) -> None:
            grouped: dict[str, list[Any]] = {}
            for name in sorted(state):
                head, _, tail = name.partition(".experts.")
                if tail and tail[0].isdigit():
                    grouped.setdefault(f"{head}.experts.{tail.split('.')[1]}", []).append(state.pop(name))
            state.update({name: torch.stack(parts) for name, parts in grouped.items()})

        edit(path, change)


def test_each_expert_is_solved_by_itself(tmp_path):
    fine = moe(tmp_path)
    stacked(fine)
    names = tune_experts(fine, skip=(1, 2))
    assert names
    report = detune.recover(fine.models, tmp_path / "out")
    rows = {row.name: row for row in report.tensors}
    found, truth = stored(tmp_path / "out"), stored(fine.base)
    for name in names:
        assert rows[f"{name}[0]"].ranks == (2, 2, 2)
        assert rows[f"{name}[2]"].ranks == (2, 0, 2)
        for e in range(4):
            assert w_error(found[name][e], truth[name][e]) < -13
    kinship = detune.check_family(fine.models)
    assert kinship.suffices


def test_a_copy_in_another_dtype_is_a_copy(fine, tmp_path):
    """It would agree with its original in every tensor, and the two would pass for models that left all as it was."""
    copy = save_plain(tmp_path / "copy", stored(fine.models[0]))
    edit(copy, lambda state: state.update({name: state[name].double() for name in LAYERS}))
    with pytest.raises(InputError, match=r"model-0 is given twice; every tensor equals that of .*copy"):
        detune.recover([*fine.models, copy], tmp_path / "out")


def test_tensors_of_few_models_are_not_made_up(fine, tmp_path):
    edit(fine.models[0], lambda state: state.update({"probe.weight": torch.ones(4, 4)}))
    report = detune.recover(fine.models, tmp_path / "out", like=fine.models[0])
    row = next(row for row in report.tensors if row.name == "probe.weight")
    assert (row.verdict, row.method, row.reason) == (Verdict.NOT_DETERMINED, "copy", "no other model has it")
    assert torch.equal(stored(tmp_path / "out")["probe.weight"], torch.ones(4, 4))


def test_the_command_says_what_sets_models_apart(command, fine, tmp_path):
    edit(fine.models[0], rows_more(2))
    edit(fine.models[1], renamed("module."))
    ran = command("recover", *fine.specs, "--out", tmp_path / "out", "--like", fine.specs[2])
    assert (ran.code, ran.err) == (0, "")
    assert f"{fine.specs[0]}: '{EMBED}' has 52 rows in it" in ran.out
    assert f"{fine.specs[1]}: 7 of its tensors have other names" in ran.out


def test_adapters_of_other_forms_are_extracted(fine, tmp_path):
    edit(fine.models[0], rows_more(2))
    edit(fine.models[1], renamed("module."))
    extraction = detune.extract(fine.models, tmp_path / "loras", base=fine.base)
    ranks = {(row.model, row.name): row.rank for row in extraction.rows}
    assert all(ranks[model, name] == 2 for model in extraction.models for name in LAYERS)


def test_models_of_other_forms_are_inspected(fine):
    edit(fine.models[0], rows_more(2))
    edit(fine.models[1], renamed("module."))
    report = detune.inspect(fine.models)
    assert {row.ranks for row in report.tensors if row.name in LAYERS} == {(2, 2, 2)}
    assert [bool(row.notes) for row in report.inputs] == [True, True, False]


def test_a_model_of_few_tensors_is_another_architecture(fine, tmp_path):
    other = save_plain(tmp_path / "other", {"x": torch.ones(3)})
    report = detune.recover([*fine.models, other], tmp_path / "out")
    assert "0 of 7 tensors are alike" in (report.inputs[3].left_out or "")
