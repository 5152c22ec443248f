"""The pipeline on checkpoints that transformers, PEFT and diffusers saved themselves."""

import hashlib
import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

import detune
from detune.certificate.verdict import Verdict
from detune.errors import InputError, OutputError
from detune.methods import SOLVERS, Spectral
from detune.metrics.w_error import w_error
from detune.problem import NotRecoverable
from detune.recovery.report import TensorResult
from tests.cases import normal, seeded
from tests.families import (
    Fine,
    add,
    delta,
    edit,
    fine_tune,
    perturb,
    plain_family,
    plain_state,
    same_bits,
    save_plain,
    stored,
    tree,
)

# transformers, PEFT and diffusers warn of each other's changes.
libraries_warn = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:diffusers")

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96, "vocab_size": 80}
TOKENS = torch.arange(12).reshape(2, 6)


def bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(**SMALL)).eval()


def llama(dtype: torch.dtype = torch.float32, *, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=tied)).to(dtype).eval()


@pytest.fixture
def fine(tmp_path: Path) -> Fine:
    return plain_family(tmp_path / "models")


# --- transformers ---


def test_bert(tmp_path):
    fine = fine_tune(bert(), ["query", "value"], tmp_path)
    report = detune.recover(fine.models, tmp_path / "out")
    assert report.counts == {Verdict.SHARED: len(report.tensors) - 4, Verdict.FLOOR: 4}
    recovered, base = AutoModel.from_pretrained(tmp_path / "out"), AutoModel.from_pretrained(fine.base)
    torch.testing.assert_close(recovered(TOKENS).last_hidden_state, base(TOKENS).last_hidden_state, rtol=0, atol=1e-5)
    tuned = AutoModel.from_pretrained(fine.models[0])
    assert (tuned(TOKENS).last_hidden_state - base(TOKENS).last_hidden_state).abs().max() > 1e-2


def test_what_all_models_share_is_copied_byte_for_byte(tmp_path):
    fine = fine_tune(bert(), ["query", "value"], tmp_path)
    report = detune.recover(fine.models, tmp_path / "out")
    base, recovered = stored(fine.base), stored(tmp_path / "out")
    assert recovered.keys() == base.keys()
    for row in report.tensors:
        if row.verdict is Verdict.SHARED:
            assert same_bits(recovered[row.name], base[row.name])
    files = tree(tmp_path / "out")
    assert files.keys() == tree(fine.base).keys() | {"README.md", "detune.json"}
    assert files["config.json"] == tree(fine.models[0])["config.json"]


def down_to_rounding(row: TensorResult) -> bool:
    """In half precision so few entries of a small matrix are wrong that the size of the error is chance."""
    return row.verdict is Verdict.FLOOR or (row.grid is not None and "is known to a factor" in row.reason)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_llama_in_shards(tmp_path, dtype, tied):
    fine = fine_tune(llama(dtype, tied=tied), ["q_proj", "embed_tokens", "lm_head"], tmp_path, 5, max_shard_size="50KB")
    assert len(list(fine.base.glob("*.safetensors"))) > 2
    report = detune.recover(fine.models, tmp_path / "out")
    assert sum(map(down_to_rounding, report.tensors)) == (3 if tied else 4)
    assert {path.name for path in fine.base.iterdir()} | {"README.md", "detune.json"} == set(tree(tmp_path / "out"))
    index = "model.safetensors.index.json"
    assert tree(tmp_path / "out")[index] == tree(fine.models[0])[index]

    recovered = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert recovered.dtype is dtype
    assert (recovered.lm_head.weight is recovered.model.embed_tokens.weight) == tied
    # The noise of five models is averaged, and the answer is rounded once more.
    comparison = detune.compare(tmp_path / "out", fine.base)
    mean = detune.recover(fine.models, tmp_path / "mean", "mean")
    assert mean.counts[Verdict.AVERAGED] == len(comparison.differing)
    averaged = detune.compare(tmp_path / "mean", fine.base).summary["mean_w_error"]
    gain = {torch.float32: 11, torch.bfloat16: 2, torch.float16: 4}[dtype]
    assert comparison.summary["mean_w_error"] < averaged - gain
    assert all(row.dtype == str(dtype).removeprefix("torch.") for row in report.tensors)


# --- PEFT ---


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Fine:
    """A base, and adapters of one seed that PEFT saved."""
    folder = tmp_path_factory.mktemp("peft")
    bert().save_pretrained(folder / "base")
    generator = seeded(2)
    for i in range(3):
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"])
        model = get_peft_model(bert(), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.05 * normal(generator, *parameter.shape))
                elif "lora_A" in name:
                    parameter.add_(0.05 * normal(generator, *parameter.shape).float() * parameter.std())
        model.save_pretrained(folder / f"adapter-{i}")
    return Fine(folder / "base", tuple(folder / f"adapter-{i}" for i in range(3)))


@libraries_warn
def test_models_that_peft_merged(adapters, tmp_path):
    merged = []
    for i, adapter in enumerate(adapters.models):
        model = PeftModel.from_pretrained(BertModel.from_pretrained(adapters.base), adapter)
        model.merge_and_unload().save_pretrained(tmp_path / f"merged-{i}")
        merged.append(tmp_path / f"merged-{i}")
    report = detune.recover(merged, tmp_path / "out")
    changed = [row for row in report.tensors if row.verdict is not Verdict.SHARED]
    assert len(changed) == 4
    assert {row.verdict for row in changed} == {Verdict.FLOOR}
    assert {row.ranks for row in changed} == {(4, 4, 4)}
    assert detune.compare(tmp_path / "out", adapters.base).summary["worst_w_error"] < -14

    specs = [f"{adapters.base}+{adapter}" for adapter in adapters.models]
    detune.recover(specs, tmp_path / "on-the-fly")
    ours, theirs = stored(tmp_path / "on-the-fly"), stored(tmp_path / "out")
    assert all(same_bits(ours[name], theirs[name]) for name in theirs)


@libraries_warn
def test_adapters_merged_in_float32_onto_a_half_precision_base(adapters, tmp_path):
    BertModel.from_pretrained(adapters.base, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    specs = [f"{tmp_path / 'base'}+{adapter}" for adapter in adapters.models]
    report = detune.recover(specs, tmp_path / "out", merge_dtype=torch.float32)
    changed = [row for row in report.tensors if row.verdict is not Verdict.SHARED]
    assert {row.dtype for row in changed} == {"float32"}
    assert report.command["merge_dtype"] == "torch.float32"
    assert detune.compare(tmp_path / "out", tmp_path / "base").summary["bit_identical"] > 0.9999


# --- diffusers ---


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    words = ["<|startoftext|>", "<|endoftext|>", *(letter + end for letter in "abc" for end in ("", "</w>"))]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=32,
            intermediate_size=37,
            num_attention_heads=4,
            num_hidden_layers=2,
            vocab_size=8,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    return StableDiffusionPipeline(
        AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8),
        text_encoder,
        CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16),
        unet,
        DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@libraries_warn
def test_stable_diffusion(stable_diffusion, tmp_path):
    generator = seeded(3)
    stable_diffusion.save_pretrained(tmp_path / "base")
    for i in range(3):
        tuned = {name: deepcopy(getattr(stable_diffusion, name)) for name in ("unet", "text_encoder")}
        perturb(tuned["unet"], ["attn2.to_q", "attn2.to_k", "resnets.0.conv1"], generator, rank=2)
        perturb(tuned["text_encoder"], ["q_proj"], generator, rank=2)
        parts = {**stable_diffusion.components, **tuned}
        StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(tmp_path / f"model-{i}")

    report = detune.recover([tmp_path / f"model-{i}" for i in range(3)], tmp_path / "out")
    changed = {row.name: row for row in report.tensors if row.verdict is not Verdict.SHARED}
    assert {row.verdict for row in changed.values()} <= {Verdict.FLOOR, Verdict.APPROXIMATE}
    assert any("conv1" in name and len(row.shape) == 4 for name, row in changed.items())
    assert {name.partition("/")[0] for name in changed} == {"unet", "text_encoder"}

    recovered = DiffusionPipeline.from_pretrained(tmp_path / "out")
    latent, text = normal(generator, 1, 4, 8, 8).float(), torch.tensor([[0, 2, 4, 1]])
    images = []
    for pipeline in (recovered, stable_diffusion):
        with torch.no_grad():
            images.append(pipeline.unet(latent, 10, pipeline.text_encoder(text).last_hidden_state).sample)
    torch.testing.assert_close(*images, rtol=0, atol=1e-5)


# --- kinds of tensors ---


def changed_alone(fine: Fine, name: str, states: list[torch.Tensor]) -> None:
    for model, tensor in zip(fine.models, states, strict=True):
        edit(model, lambda state, tensor=tensor: state.update({name: tensor}))


def rows_of(report: detune.Report) -> dict[str, detune.TensorResult]:
    return {row.name: row for row in report.tensors}


@pytest.mark.parametrize("shape", [(80, 12, 3, 3), (80, 64, 1, 1), (80, 30, 3)])
def test_kernels(fine, tmp_path, shape):
    generator = seeded(7)
    kernel = normal(generator, *shape).float()
    changed_alone(fine, "conv.weight", [add(kernel, delta(generator, kernel, 3)) for _ in fine.models])
    row = rows_of(detune.recover(fine.models, tmp_path / "out"))["conv.weight"]
    assert (row.verdict, row.ranks, row.shape) == (Verdict.FLOOR, (3, 3, 3), shape)
    torch.testing.assert_close(stored(tmp_path / "out")["conv.weight"], kernel, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(64,), (64, 1), (1, 64), (64, 1, 1, 1), ()], ids=str)
def test_vectors_are_averaged_and_said_to_be(fine, tmp_path, shape):
    vectors = [normal(seeded(i), *shape).float() for i in range(3)]
    changed_alone(fine, "bias", vectors)
    row = rows_of(detune.recover(fine.models, tmp_path / "out"))["bias"]
    assert row.verdict is Verdict.AVERAGED
    assert row.reason == "a vector cannot be low-rank: the average of 3 models"
    torch.testing.assert_close(stored(tmp_path / "out")["bias"], sum(vectors) / 3)


@pytest.mark.parametrize("name", ["layer.1.weight", "norm.weight"])
def test_what_most_models_left_alone_is_theirs_bit_for_bit(fine, tmp_path, name):
    base = plain_state()[name]
    other = base + 1 if base.ndim == 1 else add(base, delta(seeded(8), base, 2))
    changed_alone(fine, name, [base, other, base.clone()])
    row = rows_of(detune.recover(fine.models, tmp_path / "out"))[name]
    assert row.verdict is Verdict.APPROXIMATE
    assert row.method == "unchanged"
    assert "exact, if models 0 and 2 agree in every bit because the matrix was left alone" in row.reason
    assert same_bits(stored(tmp_path / "out")[name], base)


def test_half_precision_stays_bit_for_bit_where_most_models_left_it_alone(fine, tmp_path):
    base = normal(seeded(), 80, 64).bfloat16()
    changed_alone(fine, "extra.weight", [base, base.clone(), add(base, delta(seeded(8), base, 2))])
    detune.recover(fine.models, tmp_path / "out")
    assert same_bits(stored(tmp_path / "out")["extra.weight"], base)


def test_integers_that_differ_stand_in(fine, tmp_path):
    changed_alone(fine, "steps", [torch.tensor(i) for i in (5, 6, 7)])
    row = rows_of(detune.recover(fine.models, tmp_path / "out"))["steps"]
    assert row.verdict is Verdict.NOT_DETERMINED
    assert "not floating point" in row.reason
    assert stored(tmp_path / "out")["steps"] == 5


def test_mixed_dtypes_are_legal_and_reported(fine, tmp_path):
    edit(
        fine.models[1], lambda state: state.update({name: state[name].bfloat16() for name in state if "layer" in name})
    )
    rows = rows_of(detune.recover(fine.models, tmp_path / "out"))
    row = rows["layer.0.weight"]
    assert row.dtype == "float32, bfloat16"
    # Finely stored models beside a coarse one leave less of the error than can be said.
    assert row.verdict is Verdict.APPROXIMATE
    got = stored(tmp_path / "out")["layer.0.weight"]
    assert got.dtype is torch.float32
    assert row.best_w_error < w_error(got, plain_state()["layer.0.weight"]) < row.worst_w_error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_saved_as_float32(tmp_path, dtype):
    generator = seeded(15)
    base = normal(generator, 96, 80).to(dtype)
    states = [{"w": add(base, delta(generator, base, 2)).float()} for _ in range(4)]
    models = [save_plain(tmp_path / str(i), state) for i, state in enumerate(states)]
    (row,) = detune.recover(models, tmp_path / "out").tensors
    assert down_to_rounding(row)
    assert row.ranks == (2, 2, 2, 2)


def test_double_precision_comes_back_to_its_floor(tmp_path):
    """The closed form's start is not what limits the answer, nor is the polish that follows."""
    generator = seeded(14)
    base = normal(generator, 80, 64)
    models = [save_plain(tmp_path / str(i), {"w": add(base, delta(generator, base, 2))}) for i in range(3)]
    detune.recover(models, tmp_path / "out")
    assert (stored(tmp_path / "out")["w"] - base).abs().max() < 1e-14


def test_a_layer_without_low_rank_is_averaged_among_others_that_have_one(fine, tmp_path):
    new = normal(seeded(9), 80, 64).float()
    edit(fine.models[0], lambda state: state.update({"layer.2.weight": new}))
    rows = rows_of(detune.recover(fine.models, tmp_path / "out"))
    assert rows["layer.2.weight"].verdict is Verdict.NOT_DETERMINED
    assert "full rank" in rows["layer.2.weight"].reason
    mean = sum(stored(model)["layer.2.weight"] for model in fine.models) / 3
    torch.testing.assert_close(stored(tmp_path / "out")["layer.2.weight"], mean)
    assert rows["layer.1.weight"].verdict is Verdict.FLOOR


# --- the report ---


def test_report_has_a_row_for_each_tensor_and_the_inputs_hashes(fine, tmp_path):
    report = detune.recover(fine.models, tmp_path / "out", rank=8)
    written = json.loads((tmp_path / "out" / "detune.json").read_text())
    told = json.loads(report.to_json())
    assert written.keys() == {*told, "format", "files"}
    assert (written["tensors"], written["summary"]) == (told["tensors"], told["summary"])
    assert written["versions"].keys() == {"detune", "python", "torch"}
    assert written["command"]["name"] == "recover"
    assert written["command"]["rank"] == 8
    assert {row["name"] for row in written["tensors"]} == set(plain_state())
    for model, row in zip(fine.models, written["inputs"], strict=True):
        digest = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
        expected = {"spec": f"../models/{model.name}", "sha256": {"model.safetensors": digest}}
        assert row == expected | {"left_out": None, "notes": []}
    for row in written["tensors"]:
        assert row.keys() >= {"shape", "dtype", "verdict", "method", "ranks", "relative_residual", "seconds", "reason"}
        if row["verdict"] == "to the storage floor":
            assert row["method"] == "intersect+polish"
            assert row["ranks"] == [2, 2, 2]
            assert 0 < row["relative_residual"] < 1e-5
            assert 0.5 < row["noise_ratio"] < 1.5
            assert row["undetermined"] == 0
            assert -20 < row["predicted_w_error"] < -14
    assert written["summary"]["to the storage floor"] == 4
    assert written["summary"]["shared"] == 3
    assert written["summary"]["ranks"] == [[2], [2], [2]]


def test_on_tensor_is_called_before_and_after_each(fine, tmp_path):
    seen = []
    report = detune.recover(fine.models, tmp_path / "out", on_tensor=lambda name, row: seen.append((name, row)))
    # Several are in work at a time; they are begun in their order.
    assert [name for name, row in seen if row is None] == [row.name for row in report.tensors]
    assert all(seen.index((row.name, None)) < seen.index((row.name, row)) for row in report.tensors)
    assert len(seen) == 2 * len(report.tensors)


def test_same_input_gives_the_same_bytes(fine, tmp_path):
    for name in "ab":
        detune.recover(fine.models, tmp_path / name)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


# --- methods ---


@pytest.mark.parametrize("method", ["single", "mean", "spectral", "intersect", "auto"])
def test_every_method_writes_a_checkpoint(fine, tmp_path, method):
    report = detune.recover(fine.models, tmp_path / "out", method)
    expected = {Verdict.AVERAGED} if method in ("single", "mean") else {Verdict.FLOOR, Verdict.APPROXIMATE}
    assert {row.verdict for row in report.tensors if "layer" in row.name} <= expected
    assert stored(tmp_path / "out").keys() == plain_state().keys()


def test_a_solver_of_ones_own(fine, tmp_path):
    report = detune.recover(fine.models, tmp_path / "out", Spectral(iterations=5, svd="exact"), rank=2)
    assert "Spectral(iterations=5" in report.command["method"]
    assert rows_of(report)["layer.0.weight"].reason.startswith("Spectral DeTuning, 5 iterations at rank 2")


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        (0, {"method": "mean"}, "0 models given, mean needs at least 1"),
        (3, {"method": "magic"}, f"no method 'magic': expected one of {', '.join(SOLVERS)}"),
        (3, {"rank": 0}, "rank 0: expected a positive number, or none to find it"),
    ],
)
def test_refuses_before_it_opens_anything(tmp_path, models, options, message):
    with pytest.raises(InputError, match=message):
        detune.recover([tmp_path / "nowhere"] * models, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("models", "method", "message"),
    [
        (2, "auto", "2 models given, auto needs at least three; .*; add a model; try --method lattice, .*; or average"),
        (1, "intersect", "1 model given, intersect needs at least three"),
        (1, "spectral", "1 model.* given, spectral needs at least 2; add a model"),
    ],
)
def test_refuses_too_few_models(tmp_path, models, method, message):
    with pytest.raises(InputError, match=message):
        detune.recover(plain_family(tmp_path).models[:models], tmp_path / "out", method)
    assert not (tmp_path / "out").exists()


def test_refuses_where_nothing_can_be_had(tmp_path):
    """Two fine-tunes of one base and two of another, in matrices too small to tell who is the stranger."""
    models = [save_plain(tmp_path / str(i), {"w": normal(seeded(i), 20, 20)}) for i in range(3)]
    with pytest.raises(InputError, match=r"none of 1 changed matrices can be recovered; 'w': .*full rank"):
        detune.recover(models, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- one matrix ---


def matrices(generator: torch.Generator, rank: int = 2) -> tuple[torch.Tensor, list[torch.Tensor]]:
    W = normal(generator, 40, 30)
    return W, [add(W, delta(generator, W, rank)) for _ in range(3)]


@pytest.mark.parametrize("form", [list, tuple, torch.stack], ids=["list", "tuple", "tensor"])
def test_recover_matrix_takes_any_stack(form: Callable[..., Any]):
    W, models = matrices(seeded())
    recovery = detune.recover_matrix(form(models))
    assert recovery.ranks == (2, 2, 2)
    torch.testing.assert_close(recovery.weight, W, rtol=0, atol=1e-12)


def test_recover_matrix_computes_where_and_how_it_is_told():
    W, models = matrices(seeded())
    recovery = detune.recover_matrix(models, "intersect", rank=2, dtype=torch.float32, device="cpu")
    assert recovery.weight.dtype is torch.float32
    torch.testing.assert_close(recovery.weight.double(), W, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("stack", "options", "message"),
    [
        (torch.ones(2, 4, 4), {}, "2 models given, auto needs at least three"),
        (torch.ones(3, 4, 4), {"method": "magic"}, "no method 'magic'"),
        (torch.ones(3, 4, 4), {"rank": -1}, "rank -1: expected a positive number"),
        (torch.ones(3, 4, 4), {"dtype": torch.float16}, "compute dtype torch.float16: expected torch.float32 or"),
        (torch.ones(3, 4), {}, r"matrix 0 has shape \(4,\), expected .* as \(out, in\)"),
        ([torch.ones(3, 4)] * 2 + [torch.ones(4, 3)], {}, r"matrix 2 has shape \(4, 3\), expected \(3, 4\)"),
        (torch.ones(3, 4, 4, dtype=torch.int64), {}, "matrix 0 has dtype torch.int64.*: dequantise it first"),
        ([], {}, "an empty stack: expected at least one matrix"),
    ],
)
def test_recover_matrix_refuses(stack, options, message):
    with pytest.raises(InputError, match=message):
        detune.recover_matrix(stack, **options)


def test_recover_matrix_says_when_the_data_do_not_hold_the_answer():
    generator = seeded(4)
    W = normal(generator, 64, 64)
    models = [add(W, delta(generator, W, 28)) for _ in range(3)]
    with pytest.raises(
        NotRecoverable, match=r"ranks \(28, 28, 28\) are too high for 3 models of a 64x64 matrix; .*; add"
    ):
        detune.recover_matrix(models)


def test_parts_of_the_models_are_recovered_from_only_where_it_is_asked_for(tmp_path):
    fine = plain_family(tmp_path / "models", n=4)
    rows = [row for row in detune.recover(fine.models, tmp_path / "plain").tensors if "layer" in row.name]
    assert {row.agreement for row in rows} == {None}
    rows = [row for row in detune.recover(fine.models, tmp_path / "checked", check=True).tensors if "layer" in row.name]
    for row in rows:
        assert row.verdict is Verdict.FLOOR
        assert row.agreement == pytest.approx(row.predicted_w_error, abs=0.5)


@pytest.mark.parametrize(
    ("adapters", "mask"),
    [("out/loras", None), ("out", None), (None, "out/mask.npz"), (None, "out"), (".", None), ("x", "x/m"), ("x", "x")],
)
def test_results_have_places_of_their_own(fine, tmp_path, adapters, mask):
    """Said before anything is computed."""
    places = {name: tmp_path / "work" / place for name, place in (("adapters", adapters), ("mask", mask)) if place}
    with pytest.raises(OutputError, match=r"lies inside .*work.*; each result needs its own place; choose another"):
        detune.recover(fine.models, tmp_path / "work" / "out", **places, on_tensor=lambda *_: pytest.fail("computing"))
    assert not (tmp_path / "work").exists()
