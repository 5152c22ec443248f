"""Rows from a base and adapters, and back to merged models."""

import json

import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from peft import PeftModel
from transformers import BertModel

from detune.bench import build
from detune.bench.build import build_subset
from detune.bench.checkpoints import merge_subset
from detune.bench.layers import arrow_schema
from detune.checkpoints import open_checkpoint
from detune.errors import InputError
from detune.training import quiet
from tests.bench.conftest import ALPHA, LORAS, RANK, save_lora
from tests.families import plain_family

NAMES = [f"encoder.layer.{i}.attention.self.{kind}.weight" for i in range(2) for kind in ("query", "value")]


def test_rows_are_the_changed_matrices_with_all_their_loras(subset, bert_base):
    base = open_checkpoint(bert_base)
    layers = list(subset.layers())
    assert [layer.name for layer in layers] == NAMES
    for layer in layers:
        assert torch.equal(layer.weight, base.read(layer.name))
        assert [lora.name for lora in layer.loras] == [f"task-{i}" for i in range(LORAS)]
        assert {(lora.rank, lora.alpha) for lora in layer.loras} == {(RANK, float(ALPHA))}
        assert (layer.task, layer.model, layer.base) == ("small", "bert", str(bert_base))
    assert (subset.rows, subset.stands_for, subset.name) == (4, "vit", "small")


def test_a_merged_row_is_what_peft_merges(subset, bert_base, loras):
    with quiet():
        merged = PeftModel.from_pretrained(BertModel.from_pretrained(bert_base), loras[1]).merge_and_unload()
    for layer in subset.layers():
        torch.testing.assert_close(layer.merged(1), merged.get_parameter(layer.name).detach(), rtol=0, atol=1e-7)


def test_the_schema_is_the_published_one_and_datasets_reads_it(subset_dir):
    columns = ["task_name", "layer_model", "layer_name", "pre_ft_name", "pre_ft_weight"]
    for i in range(LORAS):
        columns += [f"lora_{i}_{part}" for part in ("name", "A_weight", "B_weight", "rank", "alpha")]
    (file,) = subset_dir.glob("data/*.parquet")
    assert pq.read_schema(file).names == columns
    assert pq.read_schema(file).equals(arrow_schema(LORAS))
    # The published code's way of reading it.
    row = load_dataset(str(subset_dir), name="small", split="train", streaming=True).with_format("torch")
    first = next(iter(row))
    merged = (
        first["pre_ft_weight"]
        + first["lora_0_alpha"] / first["lora_0_rank"] * first["lora_0_B_weight"] @ first["lora_0_A_weight"]
    )
    assert merged.shape == (32, 32)


def test_an_interrupted_build_goes_on_where_it_stopped(bert_base, loras, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "SHARD_BYTES", 15_000)  # two rows a file
    written = []
    whole = build_subset(bert_base, loras, tmp_path / "whole", on_shard=lambda done, total: written.append(total))
    assert written == [2, 2]

    class Killed(Exception): ...

    def kill(done: int, total: int) -> None:
        raise Killed

    with pytest.raises(Killed):
        build_subset(bert_base, loras, tmp_path / "again", name="whole", on_shard=kill)
    (first,) = (tmp_path / "again" / "data").glob("*.parquet")
    before = first.stat().st_mtime_ns
    again = build_subset(bert_base, loras, tmp_path / "again", name="whole")
    assert first.stat().st_mtime_ns == before
    assert again.fingerprint == whole.fingerprint


def test_other_inputs_replace_what_is_there(bert_base, loras, tmp_path):
    first = build_subset(bert_base, loras, tmp_path)
    other = build_subset(bert_base, loras[:3], tmp_path)
    assert len(other.first().loras) == 3
    assert first.fingerprint != other.fingerprint


def test_mixed_ranks_are_kept_apart(bert_base, loras, tmp_path):
    mixed = [*loras[:2], save_lora(tmp_path / "wide", seed=9, rank=5)]
    layer = build_subset(bert_base, mixed, tmp_path / "mixed").first()
    assert [lora.rank for lora in layer.loras] == [2, 2, 5]
    assert layer.rank([0, 1]) == 2
    assert layer.rank([0, 2]) == 5
    assert json.loads((tmp_path / "mixed" / "subset.json").read_text())["ranks"] == [2, 5]


def test_adapters_of_other_layers_are_refused(bert_base, loras, tmp_path):
    other = save_lora(tmp_path / "other", seed=3, targets=("query", "key"))
    with pytest.raises(
        InputError, match=r"other does not change the same layers as .*it lacks layer 'encoder\.layer\.0"
    ):
        build_subset(bert_base, [loras[0], other], tmp_path / "out")


def test_an_unknown_published_subset_is_refused(bert_base, loras, tmp_path):
    with pytest.raises(InputError, match=r"no published subset 'vitt'.*did you mean 'vit'"):
        build_subset(bert_base, loras, tmp_path, stands_for="vitt")


def test_back_to_merged_models(subset, bert_base, loras, tmp_path):
    paths = merge_subset(subset, tmp_path / "merged", base=bert_base)
    assert [path.name for path in paths] == [f"task-{i}" for i in range(LORAS)]
    base, merged = open_checkpoint(bert_base), open_checkpoint(paths[2])
    layers = {layer.name: layer for layer in subset.layers()}
    for name in base.tensors:
        expected = layers[name].merged(2) if name in layers else base.read(name)
        assert torch.equal(merged.read(name), expected)
    BertModel.from_pretrained(paths[0])


def test_merging_needs_the_base_that_the_rows_were_made_from(subset, tmp_path):
    with pytest.raises(InputError, match=r"has no base beside its rows.*give it with --base"):
        merge_subset(subset, tmp_path / "merged")

    other = plain_family(tmp_path / "other").base
    with pytest.raises(InputError, match=r"row 0, layer .encoder\.layer\.0.*, is not in"):
        merge_subset(subset, tmp_path / "merged", base=other)
