"""A subset of one's own: a base and any LoRAs of it, written as rows of LoWRA Bench."""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from detune._runtime import OnPart, OnStart, needs_extra, telling
from detune.bench.layers import Layer, LoraFactors, arrow_schema, row_of
from detune.bench.subsets import CARD, PUBLISHED, Card, Subset, clean_name, is_name, nearest, open_subset
from detune.checkpoints import Checkpoint, Lora, open_checkpoint, open_lora
from detune.checkpoints.layout import read_json
from detune.errors import InputError, OutputError
from detune.markdown import code, text

__all__ = ["build_subset"]

logger = logging.getLogger(__name__)

SHARD_BYTES = 256 * 2**20
_DIGEST = b"detune_inputs_sha256"  # in a parquet file's metadata: what it was made from


def build_subset(
    base: str | Path,
    adapters: Sequence[str | Path],
    out: Path,
    *,
    name: str | None = None,
    pre_ft_name: str | None = None,
    stands_for: str | None = None,
    about: str = "",
    on_start: OnStart | None = None,
    on_part: OnPart | None = None,
) -> Subset:
    """Write rows of LoWRA Bench from a base and its LoRAs.

    One row per tensor that the LoRAs change, in the base's file order, in files of some 256 MB. A file that is there
    already, made from the same inputs, is kept: an interrupted build goes on where it stopped. An earlier build in the
    folder is replaced.

    Args:
        base: The model before fine-tuning, as `detune.checkpoints.open_checkpoint` takes it.
        adapters: LoRAs of it in PEFT, diffusers or kohya format. All must change the same tensors.
        out: The folder to fill.
        name: What the subset is called, fit for the name of a file; by default as its folder.
        pre_ft_name: What the rows call the base; by default as it was given.
        stands_for: The published subset whose settings apply, a key of `PUBLISHED`.
        about: A line for the card.
        on_start: For progress: called once with the files that are still to be written, and about how large each is.
        on_part: Called with the name of each of these when it is begun, and when it is done.

    Returns:
        The subset.

    Raises:
        InputError: An adapter cannot be read, does not fit the base, or changes other tensors than the first.
        OutputError: `out` holds something that detune did not build.
        DetuneError: The extra `bench` is not installed.
    """
    with needs_extra("bench"):
        import datasets  # noqa: F401
    if stands_for is not None and stands_for not in PUBLISHED:
        raise InputError(
            f"no published subset {stands_for!r}",
            f"expected one of {', '.join(PUBLISHED)}",
            f"did you mean {nearest(stands_for, PUBLISHED)}?",
        )
    if not adapters:
        raise InputError("no adapters given", "expected at least one LoRA of the base", "name their directories")
    if name and not is_name(name):
        raise InputError(
            f"a subset cannot be called {name!r}",
            "it names files: expected letters, digits and any of '+-_. '",
            f"call it {clean_name(name)!r}",
        )
    name = name or clean_name(out.resolve().name)
    _check_folder(out)
    with open_checkpoint(base) as checkpoint:
        loras = [open_lora(adapter, checkpoint) for adapter in adapters]
        _check(loras)
        rows = _Rows(checkpoint, tuple(loras), name, pre_ft_name or str(base))
        if rows.left_out:
            example, names = next(iter(rows.left_out.items()))
            logger.warning(
                "%d of %d LoRAs also trained tensors in full, which are left out: %s of %s, for example; %s lists all",
                len(rows.left_out),
                len(loras),
                names[0],
                example,
                out / CARD,
            )
        _write_card(rows, out, stands_for, about)  # first: by it an interrupted build is known as one
        _write_shards(rows, out / "data", on_start, on_part)
    return open_subset(str(out))


@dataclass(frozen=True)
class _Rows:
    """The rows of a subset, made when they are asked for."""

    base: Checkpoint
    loras: tuple[Lora, ...]
    task: str
    base_name: str

    @property
    def names(self) -> tuple[str, ...]:
        return self.loras[0].names

    @cached_property
    def model_type(self) -> str:
        """The architecture's name in transformers; the directory's name where no config has one."""
        path = self.base.root / "config.json"
        config = read_json(path) if path.is_file() else None
        model_type = config.get("model_type") if isinstance(config, dict) else None
        return model_type if isinstance(model_type, str) and model_type else self.base.root.name

    def row(self, index: int) -> Layer:
        name = self.names[index]
        component, slash, parameter = name.rpartition("/")
        weight = self.base.read(name).float()
        model = component if slash else self.model_type
        loras = tuple(_factors(lora, name) for lora in self.loras)
        return Layer(index, self.task, model, parameter, self.base_name, weight, loras)

    @cached_property
    def left_out(self) -> dict[str, list[str]]:
        """The tensors that each LoRA trained in full: no product of factors, and so no part of a row."""
        found: dict[str, list[str]] = {}
        for lora in self.loras:
            if lora.extra:
                found[lora.name] = sorted({*found.get(lora.name, ()), *lora.extra})
        return found

    def size_bytes(self, index: int) -> int:
        """About what the row takes in float32."""
        shape = self.base.tensors[self.names[index]].shape
        entries = torch.Size(shape).numel()
        ranks = sum(lora.layers[self.names[index]].factors.rank for lora in self.loras)
        return 4 * (entries + ranks * (shape[0] + entries // shape[0]))

    def digest(self) -> str:
        """SHA-256 over all that the rows are made from."""
        files = [self.base.hashes(), *(lora.file.hashes() for lora in self.loras)]
        texts = [self.task, self.base_name, *(lora.name for lora in self.loras)]
        return hashlib.sha256(json.dumps([files, texts], sort_keys=True).encode()).hexdigest()


def _factors(lora: Lora, name: str) -> LoraFactors:
    layer = lora.read(name)
    for part, factor in (("A", layer.A), ("B", layer.B)):
        if not bool(torch.isfinite(factor).all()):
            raise InputError(
                f"factor {part} of layer {name!r} in {lora.spec} holds NaN or Inf", "expected numbers", "leave it out"
            )
    return LoraFactors(lora.name, layer.A, layer.B, layer.rank, layer.alpha)


def _check(loras: Sequence[Lora]) -> None:
    first = loras[0]
    for lora in loras:
        missing = [name for name in first.names if name not in lora.layers]
        more = [name for name in lora.names if name not in first.layers]
        if missing or more:
            what = f"lacks layer {missing[0]!r}" if missing else f"has layer {more[0]!r} in addition"
            raise InputError(
                f"{lora.spec} does not change the same layers as {first.spec}",
                f"it {what}, and {len(missing) + len(more) - 1} more differ",
                "a subset has every LoRA in every row: leave it out, or build another subset of its kind",
            )


def _check_folder(out: Path) -> None:
    """Refuse a folder whose content is not from here: it would be overwritten, or read as if it were."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file", "expected a directory, or nothing", "choose another")
    if out.is_dir() and any(out.iterdir()) and not any((out / mark).is_file() for mark in (CARD, "recipe.txt")):
        raise OutputError(f"{out} is not empty", "and holds no build to go on with or to replace", "choose another")
    for file in sorted([*out.glob("*.parquet"), *out.glob("data/*.parquet")]):
        try:
            ours = _DIGEST in (pq.read_schema(file).metadata or {})
        except (OSError, pa.ArrowException):
            ours = False
        if not ours:
            raise OutputError(f"{file} is in the way", "it was not made by detune bench build", "move it elsewhere")


def _write_shards(rows: _Rows, folder: Path, on_start: OnStart | None, on_part: OnPart | None) -> None:
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    schema = arrow_schema(len(rows.loras))
    digest = rows.digest().encode()
    schema = schema.with_metadata({**schema.metadata, _DIGEST: digest})
    shards = list(_shards(rows))
    wanted = {folder / f"train-{i:05}-of-{len(shards):05}.parquet": shard for i, shard in enumerate(shards)}
    for partial in folder.glob("train-*-of-*.parquet.partial"):
        partial.unlink()
    for file in folder.glob("*.parquet"):  # all from here, as `_check_folder` saw
        if file not in wanted or (pq.read_schema(file).metadata or {}).get(_DIGEST) != digest:
            file.unlink()
    missing = {file: shard for file, shard in wanted.items() if not file.is_file()}
    if on_start:
        on_start({file.name: sum(map(rows.size_bytes, shard)) for file, shard in missing.items()})
    for file, shard in missing.items():
        with telling(on_part, file.name):
            partial = file.with_name(f"{file.name}.partial")
            with pq.ParquetWriter(partial, schema) as writer:
                for index in shard:
                    writer.write_table(row_of(rows.row(index), schema))
            partial.replace(file)


def _shards(rows: _Rows) -> Iterator[range]:
    """Consecutive rows of together at most `SHARD_BYTES`, or one that is larger."""
    start, size = 0, 0
    for index in range(len(rows.names)):
        row_bytes = rows.size_bytes(index)
        if index > start and size + row_bytes > SHARD_BYTES:
            yield range(start, index)
            start, size = index, 0
        size += row_bytes
    yield range(start, len(rows.names))


def _write_card(rows: _Rows, out: Path, stands_for: str | None, about: str) -> None:
    """`subset.json` for detune, and the dataset card by which the Hub and `datasets` know the files."""
    from huggingface_hub import DatasetCardData

    ranks = sorted({factors.factors.rank for lora in rows.loras for factors in lora.layers.values()})
    card = Card(
        name=rows.task,
        stands_for=stands_for,
        about=about,
        base=rows.base_name,
        layers=len(rows.names),
        ranks=ranks,
        loras=[lora.name for lora in rows.loras],
        left_out=rows.left_out,
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / CARD).write_text(card.model_dump_json(indent=1) + "\n", encoding="utf-8")
    head = DatasetCardData(
        pretty_name=f"{rows.task}, a subset in the schema of LoWRA Bench",
        tags=["lora", "weight-recovery", "lowra-bench"],
        configs=[{"config_name": rows.task, "data_files": [{"split": "train", "path": "data/*.parquet"}]}],
    )
    names = "".join(f"- {code(lora.name)}\n" for lora in rows.loras)
    left_out = "".join(
        f"Trained in full beside {code(lora)}, and left out: {', '.join(map(code, tensors))}.\n"
        for lora, tensors in rows.left_out.items()
    )
    page = f"""---
{head.to_yaml()}
---

# {text(rows.task)}

{about or "A subset in the schema of LoWRA Bench."} The rows are {len(rows.names)} weight matrices of
{code(rows.base_name)}, each with {len(rows.loras)} LoRAs of rank {", ".join(map(str, ranks))}.
The fine-tuned weight of LoRA i is
`pre_ft_weight + lora_i_alpha / lora_i_rank · lora_i_B_weight @ lora_i_A_weight`.

Columns: `task_name`, `layer_model`, `layer_name`, `pre_ft_name`, `pre_ft_weight`, and for each LoRA `lora_i_name`,
`lora_i_A_weight`, `lora_i_B_weight`, `lora_i_rank`, `lora_i_alpha`. The schema is that of
[LoWRA Bench](https://arxiv.org/abs/2402.10208) (Horwitz, Kahana & Hoshen, ICML 2024).

{names}
{left_out}
Made with detune.
"""
    (out / "README.md").write_text(page, encoding="utf-8")
