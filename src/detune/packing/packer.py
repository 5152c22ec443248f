"""Pack merged checkpoints into one file."""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detune._runtime import OnStart
from detune.adapters.changes import adapter_names
from detune.adapters.extract import require_base
from detune.adapters.fit import fit_adapter
from detune.checkpoints import (
    Checkpoint,
    Decoded,
    PrivatePaths,
    Unmerged,
    new_file,
    open_checkpoint,
    raw,
    require_outside,
    resolved,
)
from detune.compatibility.model_set import ModelSet
from detune.compatibility.shared import is_shared
from detune.documents import document, to_json
from detune.errors import InputError, printable
from detune.metrics import bit_identical
from detune.packing.archive import MANIFEST, ArchiveReader, ArchiveWriter
from detune.packing.codec import PREDICTABLE, encode_factors, encode_residual, encode_tensor
from detune.packing.layout import all_files, between, measure, weight_layout
from detune.packing.manifest import BaseTensor, Manifest, PackedFile, PackedModel, PackedTensor, TensorCoding
from detune.packing.prediction import IntegerFactors, predict, to_integers
from detune.packing.unpacker import Contents
from detune.problem import NonFinite, NotLowRank
from detune.problem.stack import matricise
from detune.recovery.api import recover
from detune.recovery.loop import OnTensor

# A prediction that leaves a larger share of the bytes is held against no prediction at all.
POOR = 1 / 2


@dataclass(frozen=True)
class PackReport:
    """The outcome of `pack`.

    Attributes:
        path: The pack.
        models: The models as given, by the name they are restored to.
        files: Number of files in it.
        input_bytes: Their size.
        zstd_bytes: The same, each file compressed by zstd alone at its usual level.
        pack_bytes: Size of the pack.
        parts_bytes: Sizes of its members by kind: base, factors, residual, plain, files.
        seconds: Wall time.
    """

    path: str
    models: dict[str, str]
    files: int
    input_bytes: int
    zstd_bytes: int
    pack_bytes: int
    parts_bytes: dict[str, int]
    seconds: float

    @property
    def ratio(self) -> float:
        """Size of the pack over that of its input."""
        return self.pack_bytes / self.input_bytes if self.input_bytes else math.nan

    @property
    def zstd_ratio(self) -> float:
        """The size by zstd alone."""
        return self.zstd_bytes / self.input_bytes if self.input_bytes else math.nan

    def to_json(self) -> str:
        """All of it as JSON."""
        return to_json(document("detune-pack/1", asdict(self) | {"ratio": self.ratio, "zstd_ratio": self.zstd_ratio}))


def pack(
    models: Sequence[str | Path],
    out: str | Path,
    *,
    base: str | Path | None = None,
    rank: int | None = None,
    device: torch.device | str | None = None,
    on_start: OnStart | None = None,
    on_tensor: Callable[[str, Any], None] | None = None,
) -> PackReport:
    """Pack merged fine-tunes of one base into one file, without losing a bit.

    It holds the base once, and of each model the factors of its LoRA and what base and factors do not say, compressed
    by zstd. Files without weights come along as they are. Before it appears it is unpacked in memory, and every file is
    checked against its hash. The models stay as they are. One tensor's stack is in memory at a time.

    Args:
        models: Merged checkpoints on disk, as `detune.checkpoints.open_checkpoint` takes them.
        out: The file to make.
        base: What they were fine-tuned from, or a recovery of it; None recovers it, from three models or more.
        rank: The most that a LoRA's rank can be; None finds the rank of each.
        device: Where to compute the factors; None is the CPU.
        on_start: For progress: called with the tensors, and what is read of each in bytes; where the base is recovered
            first, for that too.
        on_tensor: Called with a tensor's name and None when it is begun, and with what it became when it is done.

    Returns:
        The sizes.

    Raises:
        InputError: A model cannot be read, does not fit the others, or was not fine-tuned from the base by LoRA.
        OutputError: `out` exists, or cannot be written.
        DetuneError: The extra `pack` is not installed.

    Example:
        >>> report = pack(["ft-a", "ft-b", "ft-c"], "fine-tunes.detune")  # doctest: +SKIP
        >>> report.ratio, report.zstd_ratio  # doctest: +SKIP
        (0.31, 0.92)
    """
    started = time.perf_counter()
    with ExitStack() as opened:
        family = opened.enter_context(ModelSet(models))
        require_alike(family)
        places = [place for model in family.models for place in model.places]
        if base is not None:
            with open_checkpoint(base) as given:
                places += given.places
        target = resolved(out)
        require_outside(target, places)
        partial = opened.enter_context(new_file(out))
        known = opened.enter_context(_base_of(models, base, partial, rank, device, on_start, on_tensor))
        _require_fit(known, family)
        require_base(family.view(known), family.models)
        with ArchiveWriter(partial) as archive:
            packer = _Packer(archive, family, known, rank, device)
            names = list(family.layout.tensors)
            if on_start:
                whole = [raw(model) for model in family.models]
                on_start({name: sum(model.tensors[name].nbytes for model in whole) for name in names})
            for index, name in enumerate(names):
                if on_tensor:
                    on_tensor(name, None)
                packed = packer.add_tensor(index, name)
                if on_tensor:
                    on_tensor(name, packed)
            manifest = packer.finish(PrivatePaths(target.parent, [*models, *places]))
            archive.add(MANIFEST, manifest.to_json())
        _verify(partial, manifest)
        pack_bytes = partial.stat().st_size
    return PackReport(
        str(out),
        {packed.name: model.spec for packed, model in zip(manifest.models, family.models, strict=True)},
        sum(len(model.files) for model in manifest.models),
        sum(file.size_bytes for model in manifest.models for file in model.files),
        packer.zstd_bytes,
        pack_bytes,
        dict(archive.sizes),
        time.perf_counter() - started,
    )


@contextmanager
def _base_of(
    models: Sequence[str | Path],
    base: str | Path | None,
    partial: Path,
    rank: int | None,
    device: torch.device | str | None,
    on_start: OnStart | None,
    on_tensor: OnTensor | None,
) -> Iterator[Checkpoint]:
    """The base that is given, or one recovered beside the pack for as long as it is needed."""
    if base is not None:
        with open_checkpoint(base) as opened:
            yield opened
        return
    # Beside what becomes the pack, in a directory that goes with it.
    recovered = partial.with_name(f".{partial.name}.base")
    recover(models, recovered, rank=rank, device=device, card=False, on_start=on_start, on_tensor=on_tensor)
    with open_checkpoint(recovered) as opened:
        yield opened


def require_alike(family: ModelSet) -> None:
    """Refuse models that do not have the same tensors, as they are stored: a pack tells each model's by the base's.

    Raises:
        InputError: One has others, or is stored otherwise than it is read.
    """
    for i, model in enumerate(family.models):
        for note in family.common.notes(i):
            raise InputError(f"{model.spec} does not fit the other models", note, "pack it by itself")
        coded = next((info for info in raw(model).tensors.values() if info.quantised), None)
        if coded is not None or isinstance(raw(model), Decoded):
            how = f"{coded.name!r} is stored as {coded.quantised}" if coded else _coded(model)
            raise InputError(f"{model.spec} cannot be packed", how, "keep the file as it is")


def _coded(model: Checkpoint) -> str:
    """The reason why a model whose numbers are those of a dtype is not stored as it is read."""
    if isinstance(raw(model), Unmerged):
        return "it holds an adapter that was not merged beside its base"
    return "its tensors are stored under other names or in another order than they are read"


def _require_fit(base: Checkpoint, family: ModelSet) -> None:
    """Refuse a base that does not have the family's tensors.

    Raises:
        InputError: It lacks one, or has it in another shape.
    """
    for name, info in family.layout.tensors.items():
        found = base.tensors.get(name)
        if found is None or found.shape != info.shape:
            raise InputError(
                f"{base.spec} does not fit {family.layout.spec}",
                f"it lacks {name!r}"
                if found is None
                else f"{name!r} has shape {list(found.shape)}, expected {list(info.shape)}",
                "give the base that the models were fine-tuned from",
            )


def _verify(path: Path, manifest: Manifest) -> None:
    """Unpack in memory, and check every hash.

    Raises:
        InputError: A file would not come back: a model changed while it was packed, or its disk is failing.
    """
    with ArchiveReader(path) as archive:
        contents = Contents(archive)
        for model in manifest.models:
            for file in model.files:
                for _ in contents.checked(model, file):
                    pass


class _Packer:
    """Takes a family tensor by tensor into an archive."""

    def __init__(
        self,
        archive: ArchiveWriter,
        family: ModelSet,
        base: Checkpoint,
        rank: int | None,
        device: torch.device | str | None,
    ) -> None:
        self._archive = archive
        self._models = [raw(model) for model in family.models]
        self._base = base
        self._rank = rank
        self._device = device
        # Before anything is compressed: it refuses what cannot be packed.
        self._files = [all_files(model) for model in self._models]
        self._base_tensors: list[BaseTensor] = []
        self._tensors: list[dict[str, PackedTensor]] = [{} for _ in self._models]
        self._members: dict[str, str] = {}
        self.zstd_bytes = 0

    def add_tensor(self, index: int, name: str) -> tuple[PackedTensor, ...]:
        """Add the base's tensor, and what sets each model's apart; says how each is told."""
        shared = is_shared(self._models, name)
        # A tensor that all models share is their base here, whatever BASE has in its place.
        base = self._models[0].read(name) if shared else self._base.read(name)
        self._archive.add(f"base/{index}", encode_tensor(base))
        self._base_tensors.append(BaseTensor(name, tuple(base.shape), base.dtype))
        if shared:
            packed = PackedTensor(index, TensorCoding.SAME, base.dtype)
            for tensors in self._tensors:
                tensors[name] = packed
            return (packed,) * len(self._models)
        for i, model in enumerate(self._models):
            self._tensors[i][name] = self._told(f"{i}/{index}", index, base, model.read(name))
        return tuple(tensors[name] for tensors in self._tensors)

    def _told(self, place: str, index: int, base: Tensor, tensor: Tensor) -> PackedTensor:
        """Code one tensor of a model, with the members for it."""
        if tensor.dtype == base.dtype and bit_identical(base, tensor) == 1:
            return PackedTensor(index, TensorCoding.SAME, tensor.dtype)
        predicted: dict[str, bytes] = {}
        factors = None
        if base.dtype in PREDICTABLE and tensor.dtype in PREDICTABLE and bool(torch.isfinite(base).all()):
            factors = self._fit(base, tensor)
            if factors is not None:
                predicted["factors"] = self._archive.compressed(encode_factors(factors))
            residual = encode_residual(tensor, predict(base, factors, tensor.dtype))
            predicted["residual"] = self._archive.compressed(residual)
        size = sum(map(len, predicted.values()))
        if not predicted or size > POOR * tensor.nbytes:
            plain = self._archive.compressed(encode_tensor(tensor))
            if not predicted or len(plain) <= size:
                self._archive.add_frame(f"plain/{place}", plain)
                return PackedTensor(index, TensorCoding.PLAIN, tensor.dtype)
        for kind, frame in predicted.items():
            self._archive.add_frame(f"{kind}/{place}", frame)
        if factors is None:
            return PackedTensor(index, TensorCoding.PREDICTED, tensor.dtype)
        return PackedTensor(index, TensorCoding.PREDICTED, tensor.dtype, factors.left.shape[1], factors.exponent)

    def _fit(self, base: Tensor, tensor: Tensor) -> IntegerFactors | None:
        """The change at low rank; None where there is none."""
        W, W_i = matricise(base), matricise(tensor)
        if min(W.shape) == 1:
            return None
        try:
            M_i = fit_adapter(W, W_i, self._rank, self._device)
        except (NotLowRank, NonFinite):
            return None
        return to_integers(M_i, W_i) if 0 < M_i.rank * sum(W.shape) < W.numel() else None

    def finish(self, places: PrivatePaths) -> Manifest:
        """Add the files, and say what is in the archive, and where it was from `places`."""
        names = adapter_names([model.spec for model in self._models])
        models = []
        for model, name, files, tensors in zip(self._models, names, self._files, self._tensors, strict=True):
            packed = tuple(self._add_file(model, file) for file in files)
            models.append(PackedModel(name, printable(places.within(model.spec)), packed, tensors))
        return Manifest(tuple(self._base_tensors), tuple(models))

    def _add_file(self, model: Checkpoint, file: str) -> PackedFile:
        path = model.root / file
        measured = measure(path, self._archive.compressor())
        self.zstd_bytes += measured.compressed_bytes
        size_bytes = path.stat().st_size
        if file in {weights.file for weights in model.weight_files}:
            layout = weight_layout(model, file)
            data = between(path, layout)
            member = self._member(hashlib.sha256(data).hexdigest(), data)
            return PackedFile(file, size_bytes, measured.sha256, member, layout.spans)
        return PackedFile(file, size_bytes, measured.sha256, self._member(measured.sha256, path))

    def _member(self, sha256: str, content: Any) -> str:
        """The member that holds some bytes, or a file: one for all that are equal."""
        if sha256 not in self._members:
            member = f"files/{len(self._members)}"
            self._members[sha256] = member
            if isinstance(content, bytes):
                self._archive.add(member, content)
            else:
                with content.open("rb") as stream:
                    self._archive.add_stream(member, stream)
        return self._members[sha256]
