"""Archives of `torch.save` (`.bin`, `.pt`, `.pth`, `.ckpt`): a zip of plain storages, and a pickle that names them.

Places come from the zip's own headers, never from how `torch.save` would have laid the file out: any program may have
written the archive anew. Before version 1.6 torch wrote pickles one after the other instead, and then each storage
behind its length.
"""

import io
import os
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any, NoReturn

from detune.checkpoints.entries import DAMAGED, MAX_ELEMENTS, Entry, Header, check_name, check_shape
from detune.checkpoints.pickles import Foreign, StoredTensor, read_pickle
from detune.checkpoints.state_dicts import state_dict, tensors_in
from detune.checkpoints.stored_dtypes import DTYPE_NAMES
from detune.errors import InputError

__all__ = ["read_torch_archive"]

# A tensor may repeat its elements (`expand`), up to this size: a stride of 0 could stand for more than all memory.
MAX_REPEATED_BYTES = 64 * 2**20
# The pickles of the largest checkpoints, with an optimizer, have some megabytes.
MAX_PICKLE_BYTES = 64 * 2**20

_RESAVE = "save it again with a current version of torch, or as safetensors"
# The local header of a zip member: its signature, 22 bytes of no interest here, the lengths of name and extra field.
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_ENCRYPTED = 0x1
_ZIP = b"PK"
# The beginning of such a file, in the first pickle.
_LEGACY_NUMBER = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
_LEGACY_VERSION = 1001
_LENGTH = struct.Struct("<q")


@dataclass(frozen=True)
class _Record:
    """The bytes of one member of the zip."""

    offset: int
    size_bytes: int


def read_torch_archive(path: Path, file: IO[bytes]) -> Header:
    """Read where the tensors of an archive of `torch.save` lie.

    Args:
        path: The file, for messages.
        file: The same, opened.

    Returns:
        The table of tensors.

    Raises:
        InputError: The file is damaged, was written on a big-endian machine, or holds something other than a table of
            plain tensors.
        Exception: It is damaged; of whatever kind the fault makes it.
    """
    is_zip = file.read(len(_ZIP)) == _ZIP
    state, records = _read_zip(path, file) if is_zip else _read_legacy(path, file)
    if not isinstance(state, dict):
        kind = state.what if isinstance(state, Foreign) else type(state).__name__
        raise InputError(f"{path} is not a table of tensors", f"got {kind}", "save the state dict of the model")
    _require_one_dtype(path, state)
    entries = [_entry(path, name, value, records) for name, value in state_dict(path, state).items()]
    return Header(tuple(sorted(entries, key=lambda entry: entry.offset)), {}, None)


def _read_zip(path: Path, file: IO[bytes]) -> tuple[Any, Mapping[str, _Record]]:
    """Read the pickle of a zip, and place its storages by their keys."""
    records = _records(path, file)
    if "byteorder" in records:
        # Ten bytes tell it from any other: a long one need not be read.
        record = records["byteorder"]
        order = _content(file, replace(record, size_bytes=min(record.size_bytes, 10)))
        if order != b"little":
            _refuse_byte_order(path, order.decode(errors="replace"))
    pickle = records["data.pkl"]
    if pickle.size_bytes > MAX_PICKLE_BYTES:
        raise InputError(
            f"{path} has a pickle of {pickle.size_bytes} bytes", f"expected at most {MAX_PICKLE_BYTES}", _RESAVE
        )
    state = read_pickle(io.BytesIO(_content(file, pickle)))
    return state, {name.removeprefix("data/"): record for name, record in records.items() if name.startswith("data/")}


def _read_legacy(path: Path, file: IO[bytes]) -> tuple[Any, Mapping[str, _Record]]:
    """Read the pickles of a file of the time before zips, and place its storages by their keys."""
    file.seek(0)
    # The pickles come first, and ask for no more than there is.
    stream = io.BytesIO(file.read(MAX_PICKLE_BYTES))
    if _LEGACY_NUMBER not in stream.getvalue()[:32]:
        raise InputError(f"{path} is damaged, or was not saved by torch", "expected a zip, or torch's number", _RESAVE)
    read_pickle(stream)
    version, system = read_pickle(stream), read_pickle(stream)
    if version != _LEGACY_VERSION or not isinstance(system, dict):
        raise InputError(f"{path} has an unknown version", f"got {version!a}, expected {_LEGACY_VERSION}", _RESAVE)
    if not system.get("little_endian", True):
        _refuse_byte_order(path, "big")
    state, keys = read_pickle(stream), read_pickle(stream)
    dtypes = {tensor.storage.key: tensor.storage.dtype for tensor in tensors_in(state)}
    end = os.fstat(file.fileno()).st_size
    records = {}
    offset = stream.tell()
    for key in keys:
        file.seek(offset)
        (count,) = _LENGTH.unpack(file.read(_LENGTH.size))
        offset += _LENGTH.size
        dtype = dtypes.get(key)
        # A storage without a tensor must be passed over too, but only tensors tell its dtype.
        if dtype is None or count < 0 or offset + count * dtype.itemsize > end:
            raise InputError(
                f"{path} is damaged or cut short",
                f"storage {key!a} of {count} elements does not fit between bytes {offset} and {end}",
                DAMAGED,
            )
        records[key] = _Record(offset, count * dtype.itemsize)
        offset += count * dtype.itemsize
    return state, records


def _refuse_byte_order(path: Path, order: str) -> NoReturn:
    raise InputError(
        f"{path} was saved on a machine with another byte order",
        f"got {order!a}, expected 'little'",
        "load it with torch and save it again",
    )


def _records(path: Path, file: IO[bytes]) -> Mapping[str, _Record]:
    """The members of the archive by their names below its one directory, placed by their local headers."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except zipfile.BadZipFile as error:
        raise InputError(f"{path} is damaged, or older than torch 1.6", str(error), _RESAVE) from error
    tops = [PurePosixPath(member.filename).parent for member in members if member.filename.endswith("/data.pkl")]
    if len(tops) != 1:
        raise InputError(f"{path} is no archive of torch.save", f"got {len(tops)} data.pkl, expected 1", _RESAVE)
    prefix = f"{tops[0]}/"
    records: dict[str, _Record] = {}
    end = os.fstat(file.fileno()).st_size
    # The order is from the last to the first: none may reach into the next one.
    for member in sorted(members, key=lambda member: member.header_offset, reverse=True):
        name = member.filename.removeprefix(prefix)
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & _ENCRYPTED:
            raise InputError(f"{path} is a compressed archive", "expected plain torch.save", _RESAVE)
        if name in records:
            raise InputError(f"{path} is damaged", f"it holds {name!a} twice", DAMAGED)
        file.seek(member.header_offset)
        signature, *lengths = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        offset = member.header_offset + _LOCAL_HEADER.size + sum(lengths)
        if signature != b"PK\3\4" or member.compress_size != member.file_size or offset + member.file_size > end:
            raise InputError(
                f"{path} is damaged",
                f"its record {name!a} of {member.file_size} bytes does not fit between bytes {offset} and {end}",
                DAMAGED,
            )
        records[name] = _Record(offset, member.file_size)
        end = member.header_offset
    return records


def _content(file: IO[bytes], record: _Record) -> bytes:
    file.seek(record.offset)
    return file.read(record.size_bytes)


def _require_one_dtype(path: Path, state: Mapping[Any, Any]) -> None:
    """Refuse a storage that tensors take for numbers of several dtypes: `torch.load` goes by the first to come."""
    dtypes: dict[Any, Any] = {}
    for tensor in tensors_in(state):
        storage = tensor.storage
        first = dtypes.setdefault(storage.key, storage.dtype)
        if first != storage.dtype:
            both = " and ".join(sorted(map(str, (first, storage.dtype))))
            raise InputError(f"{path} is damaged", f"its storage {storage.key!a} is {both}", DAMAGED)


def _entry(path: Path, name: Any, value: Any, records: Mapping[str, _Record]) -> Entry:
    if isinstance(value, Foreign):
        raise InputError(
            f"{path} is not a plain table of tensors, and detune never runs code from a pickle",
            f"entry {name!a} would be made by {value.what}",
            "convert it to safetensors with a tool you trust",
        )
    dtype = value.dtype if isinstance(value, StoredTensor) else None
    if not isinstance(name, str) or not isinstance(value, StoredTensor) or dtype is None or dtype not in DTYPE_NAMES:
        raise InputError(
            f"{path} holds something other than plain tensors",
            f"entry {name!a} is {dtype or type(value).__name__}",
            "save the bare state dict of the model",
        )
    check_name(path, name)
    where = f"tensor {name!r} in {path}"
    # Negated or conjugated views store other numbers than they show.
    if value.lazy:
        raise InputError(f"{where} is a lazy view", "expected stored values", "save a clone")
    shape = check_shape(where, value.shape)
    stride = tuple(step for step in value.stride if type(step) is int and 0 <= step <= MAX_ELEMENTS)
    record = records.get(value.storage.key)
    if record is None or not len(stride) == len(value.stride) == len(shape) or value.offset < 0:
        raise InputError(f"{where} cannot be located", "its record is missing or its view is malformed", DAMAGED)
    start = value.offset * dtype.itemsize
    entry = Entry(name, dtype, shape, record.offset + start, None if _is_contiguous(shape, stride) else stride)
    # A longer record has bytes that were never saved, and nobody knows where.
    if value.storage.nbytes != record.size_bytes or start + entry.span_bytes > record.size_bytes:
        raise InputError(
            f"{where} does not fit its record",
            f"its storage has {value.storage.nbytes} bytes, it ends at {start + entry.span_bytes}, and the record has "
            f"{record.size_bytes}",
            DAMAGED,
        )
    if entry.nbytes > max(record.size_bytes, MAX_REPEATED_BYTES):
        raise InputError(
            f"{where} repeats its elements",
            f"it stands for {entry.nbytes} bytes, and its record has {record.size_bytes}",
            "save a clone of it, if you trust the model",
        )
    return entry


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return 0 in shape
        expected *= size
    return True
