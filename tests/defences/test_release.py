"""Every defence on a small model: what is written, what is not, and what each does to the weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, get_type_hints

import pytest
import torch
from safetensors.torch import load_file

from detune.checkpoints import open_checkpoint
from detune.defences import (
    DEFENCES,
    Bf16,
    Defence,
    Dither,
    Fp8,
    Fp16,
    Int8,
    LoREnc,
    Nf4,
    Noise,
    Padding,
    Permutation,
    QuietNoise,
    defend,
)
from detune.defences.linear import linear_weights
from detune.defences.running import input_moments, load_model, outputs, probe
from detune.errors import InputError, OutputError
from detune.numerics.float_grid import lies_on, spacing
from tests.families import edit, plain_state, save_plain, tree

SEED = 8_211_093_547_716_253  # long enough to be found, were it anywhere in the files


def made(name: str, bert: Path, texts: Path) -> Defence:
    given = {"base": bert, "rank": 4, "texts": texts}
    return DEFENCES[name](**{key: value for key, value in given.items() if key in get_type_hints(DEFENCES[name])})


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def linear(path: Path) -> list[str]:
    with open_checkpoint(path) as model:
        return list(linear_weights(model))


@pytest.mark.parametrize("name", DEFENCES)
class TestEveryDefence:
    def test_writes_a_model_of_the_same_layout_and_nothing_else(self, bert, texts, tmp_path, name):
        before = tree(bert)
        report = defend(made(name, bert, texts), bert, tmp_path / "out", SEED)
        assert tree(bert) == before
        assert set(tree(tmp_path / "out")) == set(before)
        assert all(tree(tmp_path / "out")[file] == before[file] for file in before if file != "model.safetensors")
        layout = {key: (value.shape, value.dtype) for key, value in weights(bert).items()}
        assert {key: (value.shape, value.dtype) for key, value in weights(tmp_path / "out").items()} == layout
        assert set(report.copied) == set(before) - {"model.safetensors"}
        assert report.changed > 0
        assert report.relative_change > 0
        load_model(tmp_path / "out", torch.float32)

    def test_tells_neither_its_name_nor_its_seed(self, bert, texts, tmp_path, name):
        defend(made(name, bert, texts), bert, tmp_path / "out", SEED)
        # All other files are the model's own, see above; of this one only the numbers may differ.
        header_bytes, data = 8 + int.from_bytes((bert / "model.safetensors").read_bytes()[:8], "little"), {}
        for path in (bert, tmp_path / "out"):
            data[path] = (path / "model.safetensors").read_bytes()
        assert data[tmp_path / "out"][:header_bytes] == data[bert][:header_bytes]
        assert str(SEED).encode() not in data[tmp_path / "out"]
        assert SEED.to_bytes(8, "little") not in data[tmp_path / "out"]

    def test_one_seed_gives_one_release(self, bert, texts, tmp_path, name):
        for out in "ab":
            defend(made(name, bert, texts), bert, tmp_path / out, SEED, verify=False)
        assert tree(tmp_path / "a") == tree(tmp_path / "b")


@pytest.mark.parametrize("name", DEFENCES)
def test_another_seed_gives_another_release_where_something_is_drawn(bert, texts, tmp_path, name):
    for seed in (1, 2):
        defend(made(name, bert, texts), bert, tmp_path / str(seed), seed, verify=False)
    assert (tree(tmp_path / "1") != tree(tmp_path / "2")) is DEFENCES[name].draws


def test_a_seed_of_its_own_is_never_the_same(bert, tmp_path):
    seeds = {defend(Noise(), bert, tmp_path / str(i)).seed for i in range(3)}
    assert len(seeds) == 3


@pytest.mark.parametrize(("defence", "grid"), [(Bf16(), torch.bfloat16), (Fp16(), torch.float16)])
def test_precision_rounds_every_weight_to_the_nearest(bert, tmp_path, defence, grid):
    defend(defence, bert, tmp_path / "out")
    for name, W in weights(bert).items():
        assert torch.equal(weights(tmp_path / "out")[name], W.to(grid).float())


def test_a_weight_too_large_for_fp16_is_refused(tmp_path):
    path = save_plain(tmp_path / "model", plain_state() | {"norm.weight": torch.full((4,), 1e6)})
    with pytest.raises(
        InputError, match=r"tensor 'norm.weight' does not fit into torch.float16; its largest .* 1e\+06"
    ):
        defend(Fp16(), path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_int8_has_255_levels_a_row_and_errs_by_half_of_one(bert, tmp_path):
    defend(Int8(), bert, tmp_path / "out")
    for name in linear(bert):
        W, released = weights(bert)[name].double(), weights(tmp_path / "out")[name].double()
        scale = W.abs().amax(dim=1, keepdim=True) / 127
        assert ((released - W).abs() <= scale * 0.5001).all()
        levels = released / scale
        torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)


def test_nf4_has_sixteen_levels_a_block_and_takes_the_nearest(bert, tmp_path):
    defend(Nf4(), bert, tmp_path / "out")
    name = linear(bert)[0]
    W, released = (weights(path)[name].flatten()[:64] for path in (bert, tmp_path / "out"))
    scale = W.abs().max()
    levels = (released / scale).unique()
    assert len(levels) <= 16
    # The published table, to its four digits.
    table = torch.tensor([-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0, 0.0796, 0.1609, 0.2461, 0.3379])
    table = torch.cat([table, torch.tensor([0.4407, 0.5626, 0.723, 1])])
    nearest = table[(W[:, None] / scale - table).abs().argmin(dim=1)]
    torch.testing.assert_close(released / scale, nearest, rtol=0, atol=1e-4)


@pytest.mark.parametrize("grid", ["float8_e4m3fn", "float8_e5m2"])
def test_fp8_goes_to_one_of_the_two_points_beside_each_weight(bert, tmp_path, grid):
    defend(Fp8(grid), bert, tmp_path / "out")
    dtype = getattr(torch, grid)
    for name in linear(bert):
        W, released = weights(bert)[name], weights(tmp_path / "out")[name]
        assert lies_on(released, dtype)
        assert ((released - W).abs() < spacing(released, dtype)).all()


def test_the_dither_of_fp8_is_the_tensors_name(bert, tmp_path):
    """Two releases, whatever their seeds, are rounded by the same numbers; and two tensors by others."""
    for seed in (1, 2):
        defend(Fp8(), bert, tmp_path / str(seed), seed)
    assert tree(tmp_path / "1") == tree(tmp_path / "2")
    query, key = (f"bert.encoder.layer.0.attention.self.{part}.weight" for part in ("query", "key"))
    with open_checkpoint(bert) as model:
        change = Fp8().prepare(model, 0)
        W = model.read(query)
    assert not torch.equal(change(query, W), change(key, W))


class TestLoREnc:
    def test_the_largest_singular_values_are_gone_and_no_others(self, bert, tmp_path):
        defend(LoREnc(bert, rank=5), bert, tmp_path / "out")
        for name in linear(bert):
            before, after = (torch.linalg.svdvals(weights(path)[name].double()) for path in (bert, tmp_path / "out"))
            torch.testing.assert_close(after[:-5], before[5:], rtol=1e-5, atol=0)
            assert after[-5:].max() < 1e-5 * before[0]

    def test_what_is_gone_is_the_bases(self, bert, tmp_path):
        """A fine-tune loses what its base does, not its own largest singular values."""
        defend(Noise(0.1), bert, tmp_path / "tuned", 1)
        for path, out in ((bert, "public"), (tmp_path / "tuned", "release")):
            defend(LoREnc(bert, rank=5), path, tmp_path / out)
        for name in linear(bert):
            lost, own = (
                weights(one)[name].double() - weights(tmp_path / other)[name].double()
                for one, other in ((bert, "public"), (tmp_path / "tuned", "release"))
            )
            torch.testing.assert_close(lost, own, rtol=0, atol=1e-7)

    def test_with_its_adapter_a_model_is_what_it_was(self, bert, tmp_path):
        report = defend(LoREnc(bert, rank=5, adapter=True), bert, tmp_path / "out", 1)
        assert report.relative_change < 2e-7

    @pytest.mark.parametrize("rank", [0, 24])
    def test_a_rank_that_does_not_fit(self, bert, tmp_path, rank):
        with pytest.raises(
            InputError, match=rf"{rank} singular values cannot be taken out of .*; it is 24x24, .* --rank"
        ):
            defend(LoREnc(bert, rank=rank), bert, tmp_path / "out")

    def test_another_base(self, bert, tmp_path):
        other = save_plain(tmp_path / "other", plain_state())
        with pytest.raises(InputError, match=r"other has no tensor .* like that of .*; give the base of the fine-tune"):
            defend(LoREnc(other), bert, tmp_path / "out")


@pytest.mark.parametrize("size", [0.01, 0.3])
def test_noise_has_its_size_and_leaves_other_tensors_alone(bert, tmp_path, size):
    defend(Noise(size), bert, tmp_path / "out")
    before, after = weights(bert), weights(tmp_path / "out")
    for name, W in before.items():
        change = (after[name] - W).double()
        if name in linear(bert):
            assert float(change.std() / W.double().square().mean().sqrt()) == pytest.approx(size, rel=0.15)
        else:
            assert not change.any()


def test_quiet_noise_costs_less_than_noise_of_its_size(bert, texts, tmp_path):
    changes = {}
    for defence in (Noise(0.2), QuietNoise(texts, 0.2)):
        defend(defence, bert, tmp_path / defence.name, 1)
        changes[defence.name] = weights(tmp_path / defence.name)
    moments = input_moments(bert, texts)
    before = weights(bert)
    for name in linear(bert):
        if (module := name.removesuffix(".weight")) not in moments:
            continue
        costs = {}
        for kind, after in changes.items():
            change = (after[name] - before[name]).double()
            assert float(change.norm() / before[name].double().norm()) == pytest.approx(0.2, rel=0.25)
            # What the outputs move by, mean square: tr(change C change^T).
            costs[kind] = float((change @ moments[module] @ change.mT).trace())
        assert costs["quiet-noise"] < 0.9 * costs["noise"]


def test_padding_has_just_over_half_the_rank_and_equal_singular_values(bert, texts, tmp_path):
    defend(Padding(texts, 0.1), bert, tmp_path / "out", 1)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    change = (weights(tmp_path / "out")[name] - weights(bert)[name]).double()
    values = torch.linalg.svdvals(change)
    assert (values[:13] / values[0]).min() > 0.999
    assert values[13] < 1e-4 * values[0]
    assert float(change.norm() / weights(bert)[name].double().norm()) == pytest.approx(0.1, rel=1e-3)


def test_a_dithered_weight_lies_anywhere_within_half_a_step(bert, tmp_path):
    on_grid = tmp_path / "on-grid"
    defend(Bf16(), bert, on_grid)
    defend(Dither(), on_grid, tmp_path / "out", 1)
    before, after = weights(on_grid), weights(tmp_path / "out")
    name = "bert.embeddings.position_embeddings.weight"
    turns = (after[name] - before[name]).double() / spacing(before[name], torch.bfloat16)
    assert not lies_on(after[name], torch.bfloat16)
    assert turns.abs().max() <= 0.501
    assert float(turns.square().mean()) == pytest.approx(1 / 12, rel=0.1)


def test_what_preserves_the_function_is_proven_to(bert, tmp_path):
    kept = defend(Permutation(), bert, tmp_path / "out", 1).preservation
    assert kept is not None
    assert kept.largest_difference <= 1e-12
    assert kept.largest_output > 0.1
    assert 1e-8 < kept.rounding_difference < 1e-3


@dataclass(frozen=True)
class Boast:
    """Says that it keeps the function, and does not."""

    name: ClassVar[str] = "boast"
    about: ClassVar[str] = "a lie"
    preserves_function: ClassVar[bool] = True
    draws: ClassVar[bool] = False

    def prepare(self, model, seed):
        return lambda name, tensor: tensor * 1.01 if name.endswith("output.dense.weight") else tensor


def test_what_does_not_preserve_it_is_not_kept(bert, tmp_path):
    with pytest.raises(
        OutputError, match=r"boast changed what the model does, .* not kept; outputs differ by .* of up to"
    ):
        defend(Boast(), bert, tmp_path / "out", 1)
    assert not list(tmp_path.iterdir())


def test_outputs_are_those_of_the_head_and_repeat(bert):
    model = load_model(bert, torch.float64)
    one, other = outputs(model, probe(model)), outputs(model, probe(model))
    assert torch.equal(one, other)
    assert len(one) == 4 * 16 * model.config.vocab_size


class TestBadInput:
    def test_out_is_the_model(self, bert):
        with pytest.raises(OutputError, match=r"is the input .*, or lies inside it; expected a place elsewhere"):
            defend(Noise(), bert, bert)

    def test_out_lies_inside_the_model(self, bert):
        with pytest.raises(OutputError, match=r"is the input .*, or lies inside it"):
            defend(Noise(), bert, bert / "release")
        assert not (bert / "release").exists()

    def test_out_exists(self, bert, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(OutputError, match="exists; expected a new or empty directory"):
            defend(Noise(), bert, tmp_path)

    def test_no_model(self, tmp_path):
        with pytest.raises(InputError, match="no such model"):
            defend(Noise(), tmp_path / "nothing", tmp_path / "out")

    def test_a_model_that_cannot_be_run(self, bert, texts, tmp_path):
        plain = save_plain(tmp_path / "plain", plain_state())
        with pytest.raises(InputError, match="cannot be run"):
            defend(QuietNoise(texts), plain, tmp_path / "out")

    def test_a_model_without_all_weights(self, bert, texts, tmp_path):
        defend(Bf16(), bert, tmp_path / "copy")
        edit(tmp_path / "copy", lambda state: state.pop("bert.encoder.layer.0.output.dense.weight"))
        with pytest.raises(InputError, match=r"cannot be run; weights are missing, bert.encoder.layer.0.output"):
            defend(QuietNoise(texts), tmp_path / "copy", tmp_path / "out")

    def test_no_texts(self, bert, tmp_path):
        (tmp_path / "empty.txt").write_text("\n\n")
        with pytest.raises(InputError, match="has no text; expected one on each line"):
            defend(QuietNoise(tmp_path / "empty.txt"), bert, tmp_path / "out")
        with pytest.raises(InputError, match=r"nothing.txt cannot be read"):
            defend(Padding(tmp_path / "nothing.txt"), bert, tmp_path / "out")
