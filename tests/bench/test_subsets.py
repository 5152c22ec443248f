"""Reading rows: from folders and by name, and what is said of damaged ones."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from detune.bench.layers import Layer, LoraFactors, arrow_schema, layer_of, row_of
from detune.bench.subsets import open_subset
from detune.errors import InputError
from tests.cases import normal, seeded


def make_layer(index: int = 0, *, kernel: bool = False) -> Layer:
    generator = seeded(index)
    out, columns, rank = 6, 8, 2
    A, B, W = (normal(generator, *shape).float() for shape in ((rank, columns), (out, rank), (out, columns)))
    if kernel:
        A, B, W = A.reshape(rank, 2, 2, 2), B.reshape(out, rank, 1, 1), W.reshape(out, 2, 2, 2)
    loras = tuple(LoraFactors(f"lora-{i}", A + i, B, rank, 3.0) for i in range(3))
    return Layer(index, "task", "model", f"blocks.{index}.query.weight", "base", W, loras)


def table(layer: Layer) -> pa.Table:
    return row_of(layer, arrow_schema(len(layer.loras)))


def change(row: pa.Table, column: str, value: object) -> pa.Table:
    kind = row.schema.field(column).type
    return row.set_column(row.schema.get_field_index(column), column, pa.array([value], kind))


def write(folder: Path, *rows: pa.Table) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(folder / "train-00000-of-00001.parquet", rows[0].schema) as writer:
        for row in rows:
            writer.write_table(row)
    return folder


def test_a_row_goes_to_arrow_and_back_to_the_bit():
    layer = make_layer(3)
    back = layer_of(table(layer), 3, "here")
    assert torch.equal(back.weight, layer.weight)
    for ours, theirs in zip(back.loras, layer.loras, strict=True):
        assert torch.equal(ours.A, theirs.A)
        assert torch.equal(ours.B, theirs.B)
        assert (ours.name, ours.rank, ours.alpha) == (theirs.name, theirs.rank, theirs.alpha)
    assert (back.task, back.model, back.name, back.base) == ("task", "model", "blocks.3.query.weight", "base")
    assert (back.depth, back.kind) == (3, "query")


def test_a_merged_kernel_has_the_kernels_shape():
    layer, flat = make_layer(kernel=True), make_layer()
    assert layer.merged(1).shape == (6, 2, 2, 2)
    assert torch.equal(layer.merged(1).flatten(1), flat.merged(1))
    assert torch.equal(layer_of(table(layer), 0, "here").merged(1), flat.merged(1)), "rows hold kernels as matrices"


def test_four_levels_of_lists_are_a_kernel():
    layer = make_layer(kernel=True)
    row = table(layer)
    place = row.schema.get_field_index("pre_ft_weight")
    row = row.set_column(place, "pre_ft_weight", pa.array([layer.weight.tolist()]))
    assert torch.equal(layer_of(row, 0, "here").weight, layer.weight)


def test_float64_and_integer_alphas_are_read():
    row = table(make_layer())
    place = row.schema.get_field_index("lora_0_alpha")
    row = row.set_column(place, "lora_0_alpha", pa.array([3], pa.int64()))
    assert layer_of(row, 0, "here").loras[0].alpha == 3.0


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("lora_1_rank", 0, r"row 7 of here, layer 'blocks\.0\.query\.weight': lora_1_rank is 0"),
        ("lora_1_rank", None, r"row 7 .*lora_1_rank is missing; expected a positive number"),
        ("lora_2_alpha", None, r"row 7 .*lora_2_alpha is missing; expected a number"),
        ("lora_0_rank", 5, r"row 7 .*lora_0 has A 2x8, B 6x2; expected A 5x8, B 6x5 for rank 5"),
        ("lora_0_A_weight", [[1.0, 2.0], [3.0]], r"row 7 .*lora_0_A_weight is no matrix; .*different lengths"),
        ("pre_ft_weight", [], r"row 7 .*pre_ft_weight is no matrix; .*got nothing"),
        ("pre_ft_weight", [[1.0, None]], r"row 7 .*pre_ft_weight is no matrix; .*some empty"),
        ("pre_ft_weight", [[1.0, 2.0]], r"row 7 .*lora_0 has A 2x8, B 6x2; expected A 2x2, B 1x2"),
    ],
)
def test_a_damaged_row_is_named(column, value, message):
    with pytest.raises(InputError, match=message):
        layer_of(change(table(make_layer()), column, value), 7, "here")


def test_a_missing_column_is_named(tmp_path):
    row = table(make_layer()).drop_columns(["lora_1_alpha"])
    folder = write(tmp_path / "subset", row)
    with pytest.raises(InputError, match=r"lacks column lora_1_alpha; expected the columns of LoWRA Bench"):
        open_subset(str(folder))


def test_a_folder_is_a_subset_with_the_name_of_its_card(tmp_path):
    folder = write(tmp_path / "subset", *(table(make_layer(i)) for i in range(3)))
    assert [layer.index for layer in open_subset(str(folder)).layers()] == [0, 1, 2]
    assert open_subset(str(folder)).name == "subset"
    (folder / "subset.json").write_text(json.dumps({"name": "mine", "stands_for": "mistral-7b-v0.1-sft"}))
    subset = open_subset(str(folder))
    assert (subset.name, subset.iterations, subset.paper_models) == ("mine", 1000, 12)


def test_the_same_rows_have_the_same_fingerprint(tmp_path):
    one = write(tmp_path / "one", table(make_layer()))
    shutil.copytree(one, tmp_path / "two")
    other = write(tmp_path / "other", table(make_layer(1)))
    fingerprints = [open_subset(str(folder)).fingerprint for folder in (one, tmp_path / "two", other)]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_a_local_copy_of_the_published_dataset_is_read_by_name(tmp_path):
    write(tmp_path / "vit", table(make_layer()))
    write(tmp_path / "mistral-7b-v0.1-sft", table(make_layer()), table(make_layer(1)))
    assert open_subset("vit", data=tmp_path).rows == 1
    assert open_subset("mistral-7b-v0.1-sft", data=tmp_path).rows == 2
    with pytest.raises(InputError, match=r"holds no parquet files of 'stable-diffusion-1\.5'.*hf download"):
        open_subset("stable-diffusion-1.5", data=tmp_path)


def test_an_unknown_subset_gets_a_suggestion():
    with pytest.raises(InputError, match=r"no subset 'stable-difusion'.*did you mean 'stable-diffusion-1\.5'\?"):
        open_subset("stable-difusion")


def test_without_a_network_it_says_how_to_go_on():
    # HF_HUB_OFFLINE is set for all tests.
    with pytest.raises(
        InputError, match=r"cannot read Eliahu/LoWRA-Bench from the Hub; .*hf download .* and here: --data DIR"
    ):
        open_subset("vit")


def test_a_folder_without_rows_says_where_some_are(tmp_path):
    write(tmp_path / "deep" / "vit", table(make_layer()))
    with pytest.raises(InputError, match=r"holds no parquet files; found some in .*vit; give the folder of one subset"):
        open_subset(str(tmp_path / "deep"))


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"no parquet")
    with pytest.raises(InputError, match=r"train\.parquet is no parquet file"):
        open_subset(str(tmp_path))


def test_a_truncated_file_is_named(tmp_path):
    folder = write(tmp_path / "subset", *(table(make_layer(i)) for i in range(3)))
    (file,) = folder.glob("*.parquet")
    content = file.read_bytes()
    file.write_bytes(content[:200] + b"\0" * 400 + content[600:])  # the footer is whole, a page is not
    with pytest.raises(InputError, match=r"subset is damaged; .*; copy or build it again"):
        list(open_subset(str(folder)).layers())
