"""Archives of `torch.save` that another program wrote anew, that lie, or that were made elsewhere."""

import io
import random
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detune.checkpoints import open_checkpoint
from detune.errors import InputError

Members = list[tuple[str, bytes]]


def example() -> dict[str, torch.Tensor]:
    """Several storages of odd sizes, views of one, and tensors of the kinds that `torch.save` writes differently."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(7, 5, generator=generator)
    return OrderedDict(
        first=torch.randn(3, 5, generator=generator).bfloat16(),
        whole=shared,
        rows=shared[2:5],
        turned=shared.T,
        repeated=torch.randn(4, 1, generator=generator).expand(4, 6),
        parameter=torch.nn.Parameter(torch.randn(9, generator=generator)),
        small=torch.randn(11, generator=generator).to(torch.float8_e4m3fn),
        unsigned=torch.tensor([1, 2, 65535], dtype=torch.uint16),
        flags=torch.tensor([True, False, True]),
        scalar=torch.tensor(3.5, dtype=torch.float64),
        empty=torch.empty(0, 4),
        last=torch.randn(2, 3, 2, 2, generator=generator).half(),
    )


def members_of(path: Path) -> Members:
    with zipfile.ZipFile(path) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def write(path: Path, members: Members, method: int = zipfile.ZIP_STORED, extra: Callable[[], bytes] = bytes) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members:
            info = zipfile.ZipInfo(name)
            info.compress_type, info.extra = method, extra()
            archive.writestr(info, content)
    return path


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "saved.bin"
    torch.save(example(), path)
    return path


def assert_read_as_torch_reads(path: Path) -> None:
    """Bit for bit; a view that torch loads as one is contiguous here."""
    expected = torch.load(path, weights_only=True)
    checkpoint = open_checkpoint(path)
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in expected.items():
        found = checkpoint.read(name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert found.reshape(-1).view(torch.uint8).equal(tensor.detach().contiguous().reshape(-1).view(torch.uint8))


def test_reads_as_torch_does(saved: Path) -> None:
    assert_read_as_torch_reads(saved)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), aligned=st.booleans(), renamed=st.sampled_from(["saved", "archive", "a b"]))
def test_reads_what_zipfile_wrote_anew(
    tmp_path_factory: pytest.TempPathFactory, seed: int, aligned: bool, renamed: str
) -> None:
    """In any order, with extra fields of any length, below a directory of any name."""
    draw = random.Random(seed)
    directory = tmp_path_factory.mktemp("anew")
    torch.save(example(), directory / "saved.bin")
    members = [(f"{renamed}/{name.partition('/')[2]}", data) for name, data in members_of(directory / "saved.bin")]
    draw.shuffle(members)

    def extra() -> bytes:
        length = 60 if aligned else draw.randrange(4, 200)
        return b"FB" + (length - 4).to_bytes(2, "little") + bytes(length - 4)

    assert_read_as_torch_reads(write(directory / "anew.bin", members, extra=extra))


def test_reads_a_plain_copy_of_the_archive(saved: Path, tmp_path: Path) -> None:
    assert_read_as_torch_reads(write(tmp_path / "copy.bin", members_of(saved)))


def test_reads_what_was_written_for_large_files(saved: Path, tmp_path: Path) -> None:
    """With zip64 fields in the local headers, as archives of more than 4 GiB have them."""
    with zipfile.ZipFile(tmp_path / "large.bin", "w") as archive:
        for name, content in members_of(saved):
            with archive.open(zipfile.ZipInfo(name), "w", force_zip64=True) as record:
                record.write(content)
    assert_read_as_torch_reads(tmp_path / "large.bin")


def test_reads_what_was_written_to_a_pipe(saved: Path, tmp_path: Path) -> None:
    """With sizes behind the records, and none in the local headers."""

    class Pipe(io.RawIOBase):
        def __init__(self) -> None:
            self.content = bytearray()

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            self.content += data
            return len(data)

    with zipfile.ZipFile(pipe := Pipe(), "w") as archive:
        for name, content in members_of(saved):
            archive.writestr(name, content)
    (tmp_path / "piped.bin").write_bytes(pipe.content)
    assert_read_as_torch_reads(tmp_path / "piped.bin")


def test_reads_archives_of_older_kinds(saved: Path, tmp_path: Path) -> None:
    """Without the records that say how the storages are aligned and in which byte order, as up to torch 2.0."""
    kept = [(name, data) for name, data in members_of(saved) if not name.endswith(("byteorder", "version", "ment"))]
    assert_read_as_torch_reads(write(tmp_path / "old.bin", [*kept, ("saved/version", b"3\n")]))


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_refuses_compressed_archives(saved: Path, tmp_path: Path, method: int) -> None:
    with pytest.raises(InputError, match=r"x\.bin is a compressed archive; expected plain torch\.save"):
        open_checkpoint(write(tmp_path / "x.bin", members_of(saved), method))


@pytest.mark.parametrize("order", [b"big", b"", b"middle", b"little" * 5])
def test_refuses_another_byte_order(saved: Path, tmp_path: Path, order: bytes) -> None:
    members = [(name, order if name.endswith("byteorder") else data) for name, data in members_of(saved)]
    with pytest.raises(
        InputError, match=rf"another byte order; got '{order[:10].decode()}', expected 'little'; load it"
    ):
        open_checkpoint(write(tmp_path / "x.bin", members))


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"x", lambda data: b"x" + data])
def test_refuses_a_record_shorter_or_longer_than_its_storage(
    saved: Path, tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    """The neighbour's bytes do not fill it, and what is too much may be anywhere."""
    for shortened, data in members_of(saved):
        if "/data/" not in shortened or not data:
            continue
        members = [(name, change(data) if name == shortened else data) for name, data in members_of(saved)]
        with pytest.raises(InputError, match=r"tensor '\w+' in .*x\.bin does not fit its record; its storage has \d+"):
            open_checkpoint(write(tmp_path / "x.bin", members))


def test_refuses_headers_that_lie(saved: Path, tmp_path: Path) -> None:
    """Central entries that stretch a record over its neighbour, or past the end of the file."""
    for stated in (10**6, 200):
        path = write(tmp_path / "x.bin", members_of(saved))
        raw = bytearray(path.read_bytes())
        at = raw.index(b"PK\1\2")
        while not raw[at + 46 :].startswith(b"saved/data/0"):
            at = raw.index(b"PK\1\2", at + 4)
        raw[at + 20 : at + 28] = stated.to_bytes(4, "little") * 2
        path.write_bytes(raw)
        with pytest.raises(InputError, match=rf"x\.bin is damaged; its record 'data/0' of {stated} bytes does not fit"):
            open_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda members: [m for m in members if not m[0].endswith("data.pkl")], "got 0 data.pkl, expected 1"),
        (lambda members: [*members, ("other/data.pkl", b"")], "got 2 data.pkl, expected 1"),
        (lambda members: [m for m in members if not m[0].endswith("data/0")], "cannot be located"),
        (lambda members: [(n, d[:40] if n.endswith(".pkl") else d) for n, d in members], r"x\.bin is damaged"),
        (lambda members: [(n, b"\x80\x02." if n.endswith(".pkl") else d) for n, d in members], r"x\.bin is damaged"),
    ],
)
def test_refuses_archives_with_a_part_missing(
    saved: Path, tmp_path: Path, change: Callable[[Members], Members], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        open_checkpoint(write(tmp_path / "x.bin", change(members_of(saved))))


def test_refuses_a_record_that_is_there_twice(saved: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = write(tmp_path / "x.bin", [*members_of(saved), ("saved/data/0", b"other")])
    with pytest.raises(InputError, match="it holds 'data/0' twice"):
        open_checkpoint(path)


def test_refuses_a_stride_that_stands_for_all_memory(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1).expand(2**36)}, tmp_path / "x.bin")
    with pytest.raises(InputError, match=r"tensor 'w' in .* repeats its elements; it stands for 274877906944 bytes"):
        open_checkpoint(tmp_path / "x.bin")


@pytest.mark.parametrize("name", ["a\0b", "a\ud800", "w" * 5000])
def test_refuses_names_that_are_no_text(tmp_path: Path, name: str) -> None:
    torch.save({name: torch.ones(2)}, tmp_path / "x.bin")
    with pytest.raises(InputError, match=r"x\.bin has a tensor whose name (is no text|has 5000)"):
        open_checkpoint(tmp_path / "x.bin")


def test_refuses_lazy_views(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2, dtype=torch.complex64).conj()}, tmp_path / "x.bin")
    with pytest.raises(InputError, match=r"tensor 'w' in .* is a lazy view"):
        open_checkpoint(tmp_path / "x.bin")


def test_refuses_what_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"weights")
    with pytest.raises(InputError, match=r"x\.bin is damaged, or was not saved by torch"):
        open_checkpoint(tmp_path / "x.bin")


def test_torch_does_not_load_it(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("torch.load was called")

    monkeypatch.setattr(torch, "load", refuse)
    assert len(open_checkpoint(saved).tensors) == len(example())


def test_a_storage_of_two_dtypes_is_refused(tmp_path: Path) -> None:
    """torch would read both tensors with the dtype of the first."""
    tensors = {"a": torch.arange(4).half(), "b": torch.tensor(7)}
    torch.save(tensors, tmp_path / "saved.bin")
    members = [
        (name, data.replace(b"X\1\0\0\0" + b"1", b"X\1\0\0\0" + b"0") if name.endswith("data.pkl") else data)
        for name, data in members_of(tmp_path / "saved.bin")
    ]
    path = write(tmp_path / "x.bin", members)
    assert torch.load(path, weights_only=True)["b"].dtype == torch.float16
    with pytest.raises(InputError, match=r"x\.bin is damaged; its storage '0' is torch\.float16 and torch\.int64"):
        open_checkpoint(path)
