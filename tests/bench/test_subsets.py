"""Reading rows: from folders and by name, and what is said of damaged ones."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
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
        ("lora_1_rank", None, r"row 7 .*lora_1_rank is missing; expected a positive integer"),
        ("lora_2_alpha", None, r"row 7 .*lora_2_alpha is missing; expected a finite number"),
        ("lora_2_alpha", float("nan"), r"row 7 .*lora_2_alpha is nan; expected a finite number"),
        ("lora_2_alpha", float("-inf"), r"row 7 .*lora_2_alpha is -inf; expected a finite number"),
        ("pre_ft_weight", [[float("nan")] * 8] * 6, r"row 7 .*query.weight': pre_ft_weight holds NaN or Inf"),
        ("lora_1_A_weight", [[float("inf")] * 8] * 2, r"row 7 .*query.weight': lora_1_A_weight holds NaN or Inf"),
        ("lora_2_B_weight", [[float("nan")] * 2] * 6, r"row 7 .*query.weight': lora_2_B_weight holds NaN or Inf"),
        ("layer_name", None, r"row 7 of here, layer None: layer_name is missing; expected a text"),
        ("task_name", None, r"row 7 .*query.weight': task_name is missing; expected a text"),
        ("lora_1_name", None, r"row 7 .*query.weight': lora_1_name is missing; expected a text"),
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


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("lora_1_rank", 2.5, r"row 7 .*query.weight': lora_1_rank is 2\.5; expected a positive integer"),
        ("lora_1_rank", "two", r"row 7 .*query.weight': lora_1_rank is 'two'; expected a positive integer"),
        ("lora_0_alpha", "three", r"row 7 .*query.weight': lora_0_alpha is 'three'; expected a finite number"),
    ],
)
def test_numbers_of_another_kind_are_named(column, value, message):
    row = table(make_layer())
    row = row.set_column(row.schema.get_field_index(column), column, pa.array([value]))
    with pytest.raises(InputError, match=message):
        layer_of(row, 7, "here")


def test_an_alpha_of_zero_is_a_lora_that_changes_nothing():
    layer = layer_of(change(table(make_layer()), "lora_1_alpha", 0.0), 0, "here")
    assert torch.equal(layer.merged(1), layer.weight)


def test_files_with_other_numbers_of_loras_do_not_go_together(tmp_path):
    layer = make_layer()
    fewer = Layer(1, layer.task, layer.model, layer.name, layer.base, layer.weight, layer.loras[:2])
    pq.write_table(table(layer), tmp_path / "a.parquet")
    pq.write_table(table(fewer), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"b\.parquet has rows of 2 LoRAs; expected 3, as .*a\.parquet has"):
        open_subset(str(tmp_path))


def test_one_row_is_in_memory_at_a_time(tmp_path):
    rows, size, rank = 32, 512, 2
    loras = (LoraFactors("lora", torch.ones(rank, size), torch.ones(size, rank), rank, 1.0),)
    weights = (normal(seeded(i), size, size).float() for i in range(rows))
    tables = [table(Layer(i, "task", "model", f"layer.{i}", "base", W, loras)) for i, W in enumerate(weights)]
    pq.write_table(pa.concat_tables(tables), tmp_path / "train.parquet", row_group_size=rows)
    del tables
    assert pq.read_metadata(tmp_path / "train.parquet").num_row_groups == 1
    before, most, count = pa.total_allocated_bytes(), 0, 0
    for _ in open_subset(str(tmp_path)).layers():
        most, count = max(most, pa.total_allocated_bytes() - before), count + 1
    assert count == rows
    row_bytes = 4 * size * size
    assert most < 12 * row_bytes, f"held {most / row_bytes:.1f} rows of {rows}"


def test_the_first_row_and_the_ranks_are_read_once(tmp_path):
    folder = write(tmp_path / "subset", *(table(make_layer(i)) for i in range(2)))
    subset = open_subset(str(folder))
    first = subset.first()
    assert subset.ranks == ((2, 2, 2), (2, 2, 2))
    shutil.rmtree(folder)
    assert subset.first() is first
    assert subset.ranks == ((2, 2, 2), (2, 2, 2))


def test_the_ranks_are_read_without_the_weights(tmp_path):
    broken = change(change(table(make_layer(1)), "pre_ft_weight", []), "lora_1_rank", 4)
    folder = write(tmp_path / "subset", table(make_layer()), broken)
    assert open_subset(str(folder)).ranks == ((2, 2, 2), (2, 4, 2))
    folder = write(tmp_path / "zero", table(make_layer()), change(table(make_layer(1)), "lora_1_rank", 0))
    with pytest.raises(InputError, match=r"row 1 of .*zero, layer 'blocks\.1\.query\.weight': lora_1_rank is 0"):
        _ = open_subset(str(folder)).ranks


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("{", r"subset\.json is no card of a subset; .*JSON"),
        ("[]", r"subset\.json is no card of a subset"),
        ('{"stands_for": "vitt"}', r"stands_for: .*expected one of vit, .*got 'vitt'"),
        ('{"name": "../mine"}', r"name: .*expected letters, digits.*got '\.\./mine'"),
        ('{"layers": 3}', r"holds 1 rows; expected 3, as its subset\.json says; if its build was interrupted"),
    ],
)
def test_a_malformed_card_is_told_in_one_line(card, message, tmp_path):
    folder = write(tmp_path / "subset", table(make_layer()))
    (folder / "subset.json").write_text(card)
    with pytest.raises(InputError, match=message) as caught:
        open_subset(str(folder))
    assert "\n" not in str(caught.value)


def test_a_folder_whose_name_is_no_name_of_a_file_has_a_clean_one(tmp_path):
    assert open_subset(str(write(tmp_path / "mine: (copy)", table(make_layer())))).name == "mine- -copy-"


class Hub:
    """The published dataset, at the commit that `main` is at; its files are local."""

    def __init__(self, *files: Path):
        self.files = files
        self.asked: list[tuple[str, ...]] = []

    def dataset_info(self, repository: str, revision: str) -> SimpleNamespace:
        self.asked.append((repository, revision))
        return SimpleNamespace(sha="c0ffee")

    def load_dataset_builder(self, repository: str, name: str, revision: str) -> SimpleNamespace:
        self.asked.append((repository, name, revision))
        return SimpleNamespace(config=SimpleNamespace(data_files={"train": [str(file) for file in self.files]}))

    def stands_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        monkeypatch.setattr(datasets, "load_dataset_builder", self.load_dataset_builder)


def test_a_published_subset_is_read_at_the_commit_of_its_revision(tmp_path, monkeypatch):
    folders = (
        write(tmp_path / "a", table(make_layer())),
        write(tmp_path / "b", *(table(make_layer(i)) for i in (1, 2))),
    )
    hub = Hub(*(folder / "train-00000-of-00001.parquet" for folder in folders))
    hub.stands_in(monkeypatch)
    subset = open_subset("vit", revision="main")
    assert (subset.source, subset.fingerprint, subset.rows) == ("Eliahu/LoWRA-Bench@c0ffee", "c0ffee", 24)
    layers = list(subset.layers())
    assert [(layer.index, layer.depth) for layer in layers] == [(0, 0), (1, 1), (2, 2)]
    assert torch.equal(layers[2].weight, make_layer(2).weight)
    assert subset.ranks == ((2, 2, 2),) * 3
    assert hub.asked == [("Eliahu/LoWRA-Bench", "main"), ("Eliahu/LoWRA-Bench", "vit", "c0ffee")]


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError(),
        ValueError("BuilderConfig 'vit' not found. Available: ['default']"),
        datasets.exceptions.DatasetBuildError("\n"),
    ],
)
def test_what_goes_wrong_on_the_hub_is_told_in_one_line(error, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise error

    Hub().stands_in(monkeypatch)
    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    with pytest.raises(InputError, match=rf"cannot read .* from the Hub; {type(error).__name__}: .*hf download"):
        open_subset("vit").first()


def test_a_published_subset_without_files_is_said_to_have_none(monkeypatch):
    Hub().stands_in(monkeypatch)
    with pytest.raises(InputError, match=r"LoWRA-Bench@c0ffee has no files of 'vit'; .*another --revision"):
        open_subset("vit").first()


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
