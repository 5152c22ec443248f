"""Results of a benchmark run: one JSON file for each finished cell, and the layers of unfinished ones.

A cell is one method on one subset with one number of models and one draw of the LoRAs. Its name holds a digest of all
that the user chose, so a finished cell is found again and never computed twice. A result also says which code made it:
when detune's own code changes, what is finished stays, and the table says that versions are mixed.
"""

import hashlib
import json
import logging
import math
import platform
import secrets
import shutil
import statistics
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save
from torch import Tensor

import detune
from detune._runtime import versions
from detune.bench.behaviour import Metric
from detune.checkpoints import reported
from detune.errors import InputError, OutputError
from detune.files import read_regular, seal, unseal

__all__ = ["EXACT_W_ERROR", "Cell", "CellResult", "Environment", "LayerResult", "ResultStore"]

logger = logging.getLogger(__name__)

EXACT_W_ERROR = 2 * math.log10(sys.float_info.epsilon)
"""The W-Error of a layer without any error, log10 of float64's epsilon squared: lower than any error there can be."""


# A hundred thousand layers take a fifth of it.
_MOST_BYTES = 2**28
# Far beyond what can be measured, and their sums are numbers still.
Size = Annotated[float, Field(ge=0, le=1e300)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, lt=2**63)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Cell(_Record):
    """One cell: a method, a number of models and a draw.

    Attributes:
        subset: Its name.
        fingerprint: Fingerprint of its rows.
        stands_for: The published subset that it is like.
        method: Its name.
        settings: Its hyperparameters.
        method_sha256: Of the file of a method that is not detune's.
        loras: Which LoRAs, from 0.
        seed: Seed of the draw.
        rank_known: Whether the method was told the largest rank.
    """

    subset: str
    fingerprint: str
    stands_for: str | None
    method: str
    settings: str
    method_sha256: str | None
    loras: Annotated[tuple[Count, ...], Field(min_length=1)]
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)]
    rank_known: bool

    @property
    def name(self) -> str:
        """The stem of its file."""
        digest = hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:12]
        rank = "" if self.rank_known else ".rank-found"
        return f"{self.subset}.{self.method}.n{len(self.loras)}.seed{self.seed}{rank}.{digest}"


class LayerResult(_Record):
    """One layer of a cell.

    Attributes:
        index: Its row.
        model: The part of the model.
        name: The parameter.
        kind: Which projection it is.
        depth: Its block.
        shape: Shape of the weight.
        mse: Mean squared error of the recovered weight, rounded to float32 as it would be saved.
        bit_identical: Share of entries equal bit for bit.
        seconds: Time of the solver.
        peak_memory_bytes: What the solver took at its highest, over what was there before; None where the system
            does not say.
        failure: Why the average stands in; None where the method gave an answer.
        ranks: The rank of each delta, where the method says.
        noise_ratio: Its residual in units of the storage noise, where it says.
    """

    index: Count
    model: str
    name: str
    kind: str
    depth: Count | None
    shape: Annotated[tuple[Annotated[int, Field(ge=1, lt=2**63)], ...], Field(max_length=8)]
    mse: Size
    bit_identical: Share
    seconds: Size
    peak_memory_bytes: Count | None
    failure: str | None = None
    ranks: tuple[Count, ...] = ()
    noise_ratio: Size | None = None

    @property
    def w_error(self) -> float:
        """`log10` of the mean squared error, `EXACT_W_ERROR` where every entry is exact."""
        return math.log10(self.mse) if self.mse > 0 else EXACT_W_ERROR


class Environment(_Record):
    """The machine and the versions that computed a cell.

    Attributes:
        versions: Versions of detune, Python and torch.
        code_sha256: Over the source files of detune.
        system: Operating system and processor.
        threads: Number of torch's threads.
        device: Device of the solver.
    """

    versions: dict[str, str]
    code_sha256: str
    system: str
    threads: Count
    device: str

    @classmethod
    def now(cls, device: str) -> "Environment":
        """This process's."""
        return cls(
            versions=versions(),
            code_sha256=_code_hash(),
            system=f"{platform.system()} {platform.machine()}",
            threads=torch.get_num_threads(),
            device=device,
        )


class CellResult(_Record):
    """A finished cell.

    Attributes:
        cell: What was computed.
        source: Where the rows came from.
        environment: Where it was computed.
        layers: A result each.
        behaviour: Metrics of the recovered model's behaviour against the original's; empty where it was not compared.
        notes: What could not be measured, and why.
        judged_on: SHA-256 over the original model and the inputs that behaviour was compared on.
    """

    cell: Cell
    source: str
    environment: Environment
    layers: tuple[LayerResult, ...] = Field(min_length=1)
    behaviour: dict[Metric, float]
    notes: tuple[str, ...] = ()
    judged_on: str | None = None

    @property
    def w_errors(self) -> list[float]:
        """The W-Error of every layer."""
        return [layer.w_error for layer in self.layers]

    @property
    def w_error(self) -> float:
        """The paper's W-Error: the mean of the layers' logarithms."""
        return statistics.fmean(self.w_errors)

    @property
    def seconds(self) -> float:
        """Time of the solver over all layers."""
        return sum(layer.seconds for layer in self.layers)

    @property
    def peak_memory_bytes(self) -> int | None:
        """The most that one layer took."""
        return max(
            (layer.peak_memory_bytes for layer in self.layers if layer.peak_memory_bytes is not None), default=None
        )

    @property
    def bit_identical(self) -> float:
        """Share of exact entries over all layers."""
        entries = [math.prod(layer.shape) for layer in self.layers]
        return sum(layer.bit_identical * n for layer, n in zip(self.layers, entries, strict=True)) / sum(entries)


class ResultStore:
    """A folder of results. Every file appears whole or not at all.

    Args:
        folder: Where they lie; made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._partial = folder / ".partial"

    def is_finished(self, cell: Cell, judged_on: str | None = None) -> bool:
        """Whether there is a result, with the behaviour on these inputs where they are given."""
        return self._file(cell).is_file() and (judged_on is None or self.read(cell).judged_on == judged_on)

    @contextmanager
    def claim(self, cell: Cell, environment: Environment) -> Iterator[None]:
        """Work at a cell: no other run may meanwhile, and what was kept for it by other code is dropped.

        Raises:
            OutputError: Another run is at it.
        """
        with reported(self.folder):
            self._partial.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(self._partial / f"{cell.name}.lock", timeout=0).acquire()
        except Timeout:
            raise OutputError(
                f"another run is at {cell.name}", f"in {self.folder}", "wait for it, or choose another directory"
            ) from None
        with lock:
            mark = self._partial / cell.name / "environment"
            made = environment.model_dump_json().encode()
            if mark.parent.is_dir() and not (mark.is_file() and mark.read_bytes() == made):
                shutil.rmtree(mark.parent)
            mark.parent.mkdir(exist_ok=True)
            _write(mark, made)
            yield

    def read(self, cell: Cell) -> CellResult:
        """The result of a finished cell."""
        return _parse(self._file(cell))

    def read_all(self) -> list[CellResult]:
        """Every result in the folder, by name.

        Raises:
            InputError: There is none, or a file is not one.
        """
        files = sorted(self.folder.glob("*.json")) if self.folder.is_dir() else []
        if not files:
            raise InputError(f"{self.folder} holds no results", "expected *.json", "make some with `detune bench run`")
        return [_parse(file) for file in files]

    def has_layer(self, cell: Cell, index: int, *, with_weight: bool) -> bool:
        """Whether an earlier, interrupted run got this layer done, and what it left is as it was."""
        kept = self._kept(cell, index)
        if kept is None:
            return False
        return not with_weight or (kept[1] is not None and kept[1] == _checksum(self.weight_file(cell, index)))

    def keep_layer(self, cell: Cell, result: LayerResult, weight: Tensor | None) -> None:
        """Keep one layer of an unfinished cell, and its recovered weight where it is needed later."""
        checksum = None
        if weight is not None:
            content = save({"weight": weight.contiguous()})
            checksum = zlib.crc32(content)
            _write(self.weight_file(cell, result.index), content)
        _write(self._layer_file(cell, result.index), seal([result.model_dump(mode="json"), checksum]))

    def layers(self, cell: Cell) -> tuple[LayerResult, ...]:
        """The layers of an unfinished cell, in order."""
        indices = sorted(int(file.stem) for file in (self._partial / cell.name).glob("*.txt"))
        return tuple(kept[0] for kept in (self._kept(cell, index) for index in indices) if kept is not None)

    def _kept(self, cell: Cell, index: int) -> tuple[LayerResult, int | None] | None:
        """A layer and the checksum of its weight; None where there is none, or it has been damaged."""
        file = self._layer_file(cell, index)
        if not file.is_file():
            return None
        content = unseal(file.read_bytes())
        if content is None:
            logger.warning("%s has been damaged: the layer is computed again", file)
            return None
        return LayerResult.model_validate(content[0]), content[1]

    def weight_file(self, cell: Cell, index: int) -> Path:
        """The file of a layer's recovered weight, safetensors with the one tensor `weight`."""
        return self._layer_file(cell, index).with_suffix(".safetensors")

    def finish(self, result: CellResult) -> None:
        """Write the result of a cell and drop what was kept for it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(self._file(result.cell), json.dumps(result.model_dump(mode="json"), indent=1) + "\n")
        shutil.rmtree(self._partial / result.cell.name, ignore_errors=True)

    def tidy(self) -> None:
        """Drop what is left of runs once no cell is unfinished."""
        if self._partial.is_dir() and all(path.suffix == ".lock" for path in self._partial.iterdir()):
            shutil.rmtree(self._partial, ignore_errors=True)

    def _file(self, cell: Cell) -> Path:
        return self.folder / f"{cell.name}.json"

    def _layer_file(self, cell: Cell, index: int) -> Path:
        return self._partial / cell.name / f"{index:05}.txt"


def _parse(file: Path) -> CellResult:
    try:
        return CellResult.model_validate_json(read_regular(file, _MOST_BYTES))
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"{file} is no result of `detune bench run`",
            f"{'.'.join(map(str, first['loc']))}: {first['msg']}",
            "move it elsewhere",
        ) from None


def _write(file: Path, content: str | bytes) -> None:
    partial = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    with reported(file):
        try:
            partial.write_bytes(content if isinstance(content, bytes) else content.encode())
            partial.replace(file)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


def _checksum(file: Path) -> int | None:
    """The CRC-32 of a file; None where there is none."""
    return zlib.crc32(file.read_bytes()) if file.is_file() else None


def _code_hash() -> str:
    root = Path(detune.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
