"""What `--overwrite` may replace: what `recover` wrote, and nothing else."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import detune
from detune.checkpoints import Target, require_outside
from detune.errors import OutputError
from tests.families import Fine, plain_family, plain_state, save_plain, tree


@pytest.fixture
def fine(tmp_path: Path) -> Fine:
    return plain_family(tmp_path / "models")


@pytest.fixture
def out(fine: Fine, tmp_path: Path) -> Path:
    detune.recover(fine.models, tmp_path / "out", "single")
    return tmp_path / "out"


def replace(fine: Fine, out: Path) -> None:
    detune.recover(fine.models, out, "mean", overwrite=True)


def test_a_recovery_is_replaced(fine: Fine, out: Path) -> None:
    before = tree(out)
    replace(fine, out)
    assert tree(out).keys() == before.keys()
    assert tree(out)["model.safetensors"] != before["model.safetensors"]
    # And what came of that, with a file less.
    (out / "config.json").unlink()
    replace(fine, out)
    assert tree(out).keys() == before.keys()


def save(*names: str) -> Callable[[Path], None]:
    def make(out: Path) -> None:
        for name in names:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text("mine")

    return make


def train_further(out: Path) -> None:
    """Another model of the same size in the place of ours, as `save_pretrained` would leave it."""
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(data)
    os.utime(out / "model.safetensors", ns=(1, 1))


def link(out: Path) -> None:
    (out / "model.safetensors").rename(out.parent / "weights")
    (out / "model.safetensors").symlink_to(out.parent / "weights")


def copy(out: Path) -> None:
    """The mark of a recovery in somebody's own directory."""
    (out / "detune.json").rename(out.parent / "detune.json")
    shutil.rmtree(out)
    save("thesis.tex")(out)
    shutil.copy(out.parent / "detune.json", out / "detune.json")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (save("README.md"), "README.md has changed since the recovery"),
        (save("NOTES.md"), "NOTES.md is not of the recovery"),
        (save(".git/config"), ".git/config is not of the recovery"),
        (save("runs/0/model.safetensors"), "runs/0/model.safetensors is not of the recovery"),
        (lambda out: (out / "checkpoint.ckpt").mkdir(), "checkpoint.ckpt is not of the recovery"),
        (lambda out: (out / "docs").symlink_to("/"), "docs is not of the recovery"),
        (lambda out: os.mkfifo(out / "pipe"), "pipe is not of the recovery"),
        (save("config.json"), "config.json has changed since the recovery"),
        (train_further, "model.safetensors has changed since the recovery"),
        (link, "model.safetensors has changed since the recovery"),
        (copy, "thesis.tex is not of the recovery"),
        (lambda out: (out / "detune.json").unlink(), "it holds README.md and no detune.json of a recovery"),
    ],
)
def test_what_was_added_or_changed_stays(fine: Fine, out: Path, change: Callable[[Path], None], found: str) -> None:
    change(out)
    names = sorted(os.listdir(out))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    with pytest.raises(OutputError, match=rf"out cannot be overwritten; {found}, expected what recover wrote"):
        replace(fine, out)
    assert sorted(os.listdir(out)) == names
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before
    assert sorted(os.listdir(out.parent)) == sorted({"models", "out", *os.listdir(out.parent)})
    assert not [name for name in os.listdir(out.parent) if name.startswith(".")]


@pytest.mark.parametrize(
    "names",
    [
        ("epoch=1.ckpt", "last.pt"),
        ("detune.json", "main.py"),
        ("model_index.json", "main.py"),
        ("model.safetensors", "config.json", ".git/HEAD"),
        ("a.bin/mine", "b.bin/mine"),
        ("x.safetensors",),
    ],
)
@pytest.mark.parametrize("mark", ["[]", "{}", "{", '{"format": "detune-recover/1"}', '{"format": 1, "files": {}}'])
def test_what_recover_did_not_write_stays(fine: Fine, tmp_path: Path, names: tuple[str, ...], mark: str) -> None:
    out = tmp_path / "out"
    save(*names)(out)
    if "detune.json" in names:
        (out / "detune.json").write_text(mark)
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=r"out cannot be overwritten; it holds .* and no detune.json of a recovery"):
        replace(fine, out)
    assert tree(tmp_path) == before


def test_a_mark_that_is_a_link_or_a_giant_is_none(out: Path) -> None:
    target = Target(out, overwrite=True)
    target.check(out)
    with (out / "detune.json").open("ab") as file:
        file.truncate(2**30 + 1)
    with pytest.raises(OutputError, match=r"no detune.json of a recovery"):
        target.check(out)
    (out / "detune.json").unlink()
    (out / "detune.json").symlink_to("/dev/zero")
    with pytest.raises(OutputError, match=r"no detune.json of a recovery"):
        target.check(out)


def test_inputs_stay(fine: Fine, out: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(fine.models[0])
    (fine.models[0] / "sub").mkdir()
    for place in (fine.models[0], fine.models[0].parent, fine.models[0] / "sub", link):
        (place / "mine").touch()
        with pytest.raises(OutputError, match="is, contains or lies inside the input"):
            replace(fine, place)
    for model in fine.models:
        (model / "mine").unlink(missing_ok=True)
        assert set(tree(model)) >= {"config.json", "model.safetensors"}


@pytest.mark.parametrize("what", ["file", "directory"])
def test_weights_that_an_input_only_links_to_stay(fine: Fine, out: Path, tmp_path: Path, what: str) -> None:
    """A recovery that is an input again, under another name."""
    if what == "file":
        (fine.models[0] / "model.safetensors").unlink()
        (fine.models[0] / "model.safetensors").symlink_to(out / "model.safetensors")
    else:
        for model in fine.models:
            (model / "unet").mkdir()
            (model / "model.safetensors").rename(model / "unet" / "model.safetensors")
            (model / "model_index.json").write_text('{"unet": ["a", "b"]}')
        shutil.rmtree(fine.models[0] / "unet")
        (fine.models[0] / "unet").symlink_to(out)
    before = tree(out)
    with pytest.raises(OutputError, match=r"out cannot be overwritten; it is, contains or lies inside the input"):
        replace(fine, out)
    assert tree(out) == before


def test_a_single_file_may_share_its_directory(tmp_path: Path) -> None:
    model = save_plain(tmp_path / "model", plain_state())
    file = model / "model.safetensors"
    out = tmp_path / "out"
    detune.recover([file], out, "single")
    detune.recover([file], out, "single", overwrite=True)
    with pytest.raises(OutputError, match="contains or lies inside the input"):
        detune.recover([file], model, "single", overwrite=True)


def test_a_file_is_never_replaced(fine: Fine, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(OutputError, match="out exists; it is not a directory"):
        replace(fine, tmp_path / "out")


def test_nothing_is_made_in_a_model(fine: Fine, tmp_path: Path) -> None:
    for place in (fine.models[0], fine.models[0] / "x", fine.models[0] / "a" / "b"):
        with pytest.raises(OutputError, match=r"is the input .*model-0, or lies inside it; expected a place elsewhere"):
            require_outside(place, [fine.base, fine.models[0]])
    require_outside(tmp_path / "models" / "model-00", fine.models)


def test_the_mark_names_every_file(fine: Fine, out: Path) -> None:
    content = json.loads((out / "detune.json").read_text())
    expected = {
        path.relative_to(out).as_posix(): [path.stat().st_size, path.stat().st_mtime_ns]
        for path in out.rglob("*")
        if path.name != "detune.json"
    }
    assert content["files"] == expected
    assert content["format"] == "detune-recover/1"
