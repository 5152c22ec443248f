"""Rows from a base and adapters, and back to merged models."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import fields, replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertModel

from detune._runtime import quiet
from detune.bench import build
from detune.bench.build import build_subset
from detune.bench.layers import Layer, arrow_schema
from detune.bench.merging import merge_subset, tensor_name
from detune.bench.subsets import Subset, open_subset
from detune.checkpoints import open_checkpoint
from detune.errors import InputError, OutputError
from tests.bench.conftest import ALPHA, LORAS, RANK, save_lora
from tests.families import plain_family


class Rows(Subset):
    """A subset with rows of one's own."""

    def __init__(self, subset: Subset, rows: list[Layer]):
        super().__init__(**{field.name: getattr(subset, field.name) for field in fields(Subset)})
        object.__setattr__(self, "own", rows)

    def layers(self) -> Iterator[Layer]:
        yield from self.own


def renamed(subset: Subset, names: list[str]) -> Subset:
    def with_names(layer: Layer) -> Layer:
        return replace(
            layer, loras=tuple(replace(lora, name=name) for lora, name in zip(layer.loras, names, strict=True))
        )

    return Rows(subset, [with_names(layer) for layer in subset.layers()])


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
    starts, told = [], []
    whole = build_subset(
        bert_base,
        loras,
        tmp_path / "whole",
        on_start=starts.append,
        on_part=lambda name, became: told.append((name, became)),
    )
    files = ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    (sizes,) = starts
    assert list(sizes) == files
    assert all(0 < size <= build.SHARD_BYTES for size in sizes.values())
    assert told == [(file, became) for file in files for became in (None, True)]

    class Killed(Exception): ...

    def kill(name: str, became: object) -> None:
        if became:
            raise Killed

    with pytest.raises(Killed):
        build_subset(bert_base, loras, tmp_path / "again", name="whole", on_part=kill)
    (first,) = (tmp_path / "again" / "data").glob("*.parquet")
    before = first.stat().st_mtime_ns
    starts.clear()
    again = build_subset(bert_base, loras, tmp_path / "again", name="whole", on_start=starts.append)
    assert [list(start) for start in starts] == [files[1:]]
    assert first.stat().st_mtime_ns == before
    assert again.fingerprint == whole.fingerprint


def test_other_inputs_replace_what_is_there(bert_base, loras, tmp_path):
    first = build_subset(bert_base, loras, tmp_path).fingerprint
    other = build_subset(bert_base, loras[:3], tmp_path)
    assert len(other.first().loras) == 3
    assert first != other.fingerprint


def test_a_folder_with_something_else_is_left_alone(bert_base, loras, tmp_path):
    (tmp_path / "README.md").write_text("my notes")
    with pytest.raises(OutputError, match=r"is not empty; and holds no build"):
        build_subset(bert_base, loras, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    with pytest.raises(OutputError, match=r"README\.md is a file"):
        build_subset(bert_base, loras, tmp_path / "README.md")


@pytest.mark.parametrize("name", ["mine.parquet", "data/mine.parquet", "data/train-00000-of-00001.parquet"])
def test_parquet_files_of_others_are_neither_removed_nor_mixed_in(name, bert_base, loras, tmp_path):
    build_subset(bert_base, loras[:2], tmp_path)
    pq.write_table(pa.table({"mine": [1]}), tmp_path / name)
    with pytest.raises(OutputError, match=r"\.parquet is in the way; it was not made by detune bench build"):
        build_subset(bert_base, loras[:3], tmp_path)
    assert pq.read_table(tmp_path / name).to_pydict() == {"mine": [1]}


def test_a_build_that_is_not_whole_is_not_read(bert_base, loras, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "SHARD_BYTES", 15_000)
    build_subset(bert_base, loras, tmp_path)
    (tmp_path / "data" / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(InputError, match=r"holds 2 rows; expected 4"):
        open_subset(str(tmp_path))


@pytest.mark.parametrize("name", ["a/b", "..", "a:b", " "])
def test_a_name_that_files_cannot_have_is_refused(name, bert_base, loras, tmp_path):
    with pytest.raises(InputError, match=r"a subset cannot be called"):
        build_subset(bert_base, loras, tmp_path / "out", name=name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", ["[]", "{}", '{"model_type": null}'])
def test_a_base_without_a_model_type_is_called_by_its_directory(config, bert_base, loras, tmp_path):
    base = shutil.copytree(bert_base, tmp_path / "plain")
    (base / "config.json").write_text(config)
    assert build_subset(base, loras, tmp_path / "out").first().model == "plain"


def test_tensors_trained_in_full_are_listed_as_left_out(bert_base, tmp_path, caplog):
    with quiet():
        kept = LoraConfig(r=2, target_modules=["query"], modules_to_save=["pooler"])
        get_peft_model(BertModel.from_pretrained(bert_base), kept).save_pretrained(tmp_path / "full")
    lora = save_lora(tmp_path / "plain", seed=0, targets=("query",))
    build_subset(bert_base, [lora, tmp_path / "full"], tmp_path / "out")
    left_out = json.loads((tmp_path / "out" / "subset.json").read_text())["left_out"]
    assert list(left_out) == ["full"]
    assert len(left_out["full"]) == 2
    assert all("pooler" in name for name in left_out["full"])
    assert "Trained in full beside `full`, and left out: `" in (tmp_path / "out" / "README.md").read_text()
    assert "1 of 2 LoRAs also trained tensors in full" in caplog.text


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
    starts, done = [], []
    paths = merge_subset(
        subset,
        tmp_path / "merged",
        base=bert_base,
        on_start=starts.append,
        on_part=lambda name, became: became and done.append(name),
    )
    assert [path.name for path in paths] == [f"task-{i}" for i in range(LORAS)]
    base, merged = open_checkpoint(bert_base), open_checkpoint(paths[2])
    layers = {layer.name: layer for layer in subset.layers()}
    assert starts == [{name: LORAS * info.nbytes for name, info in base.tensors.items()}]
    assert sorted(done) == sorted(base.tensors)
    for name in base.tensors:
        expected = layers[name].merged(2) if name in layers else base.read(name)
        assert torch.equal(merged.read(name), expected)
    BertModel.from_pretrained(paths[0])


@pytest.mark.parametrize(
    ("names", "directories"),
    [
        (["../a", "b/c", "..", ""], ["--a", "b--c", "unnamed", "unnamed"]),
        (["a:b", "a*b", "c", "C"], ["a-b", "a-b", "c", "C"]),
        (["a", "b", "c", "../d"], ["a", "b", "c", "--d"]),
    ],
)
def test_merged_models_stay_below_their_folder(names, directories, subset, bert_base, tmp_path):
    paths = merge_subset(renamed(subset, names), tmp_path / "merged", base=bert_base)
    twice = len({name.casefold() for name in directories}) < 4
    assert [path.name for path in paths] == [f"{i:02}-{name}" if twice else name for i, name in enumerate(directories)]
    assert {path.parent for path in paths} == {tmp_path / "merged"}


def test_two_rows_of_one_tensor_are_refused(subset, bert_base, tmp_path):
    layers = list(subset.layers())
    twice = Rows(subset, [layers[0], replace(layers[0], index=1)])
    with pytest.raises(InputError, match=r"row 1 of .*, layer 'encoder.*', is there twice; row 0 is about tensor"):
        merge_subset(twice, tmp_path / "merged", base=bert_base)


def test_a_row_may_name_a_module_of_a_component(bert_base, tmp_path):
    pipeline = tmp_path / "pipeline"
    shutil.copytree(bert_base, pipeline / "text_encoder")
    (pipeline / "model_index.json").write_text(json.dumps({"text_encoder": ["transformers", "BertModel"]}))
    with open_checkpoint(pipeline) as base:
        name = f"text_encoder/{NAMES[0]}"
        layer = Layer(0, "task", "text_encoder", NAMES[0].removesuffix(".weight"), "base", base.read(name), ())
        assert tensor_name(layer, base) == name


def test_merging_needs_the_base_that_the_rows_were_made_from(subset, tmp_path):
    with pytest.raises(InputError, match=r"has no base beside its rows.*give it with --base"):
        merge_subset(subset, tmp_path / "merged")

    other = plain_family(tmp_path / "other").base
    with pytest.raises(InputError, match=r"row 0, layer .encoder\.layer\.0.*, is not in"):
        merge_subset(subset, tmp_path / "merged", base=other)
