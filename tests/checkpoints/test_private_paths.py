import json
import zipfile
from pathlib import Path

import pytest
import zstandard

from detune.checkpoints.private_paths import PrivatePaths, from_out
from tests.bench.tiny_models import save_bert
from tests.command import run_command
from tests.families import Fine, plain_family, tree

HOME = Path("/home/ada")


@pytest.fixture(autouse=True)
def at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(HOME))


@pytest.mark.parametrize(
    ("place", "out", "shown"),
    [
        ("/home/ada/work/base", "/home/ada/work/out", "../base"),
        ("/home/ada/work/out", "/home/ada/work/out", "."),
        ("~/work/base", "/home/ada/work/out", "../base"),
        ("/home/ada/models/a/b", "/home/ada/work/x/out", "../../../models/a/b"),
        ("/home/ada/secret/base", "/data/out", "base"),
        ("/home/ada/base", "/home/bob/out", "base"),
        ("/data/models/base", "/data/out", "../models/base"),
        ("/data/base", "/tmp/out", "base"),
    ],
)
def test_paths_are_told_from_where_the_file_is(place: str, out: str, shown: str) -> None:
    assert from_out(place, Path(out)) == shown


def test_places_are_rewritten_wherever_they_stand() -> None:
    given = ["/home/ada/work/ft", "/home/ada/work/ft-2", "~/work/base+/home/ada/loras/x", "org/model@main", "ft-3"]
    places = PrivatePaths(Path("/home/ada/work/out"), given)
    content = {
        "inputs": [{"spec": spec, "size": 3} for spec in given],
        "/home/ada/work/ft-2": ("tensor 'a' of /home/ada/work/ft is damaged", None, 1.5),
        "other": "in /home/ada/.cache",
    }
    shown = ["../ft", "../ft-2", "../base+../../loras/x", "org/model@main", "ft-3"]
    assert places.within(content) == {
        "inputs": [{"spec": spec, "size": 3} for spec in shown],
        "../ft-2": ["tensor 'a' of ../ft is damaged", None, 1.5],
        "other": "in ~/.cache",
    }


def test_only_whole_places_are_rewritten() -> None:
    """In a container models lie in places as short as "/a"."""
    places = PrivatePaths(Path("/out"), ["/a", "/b.c", "--like=/a", "/home/ada/x+y"])
    kept = ["unet/attn.weight", "unet/a/b.c", "/ab", "/a-b", "/a.bin", "/home/adam", "https://example.org/a"]
    assert places.within(kept) == kept
    assert places.within(["in /a", "/a/model.bin, /b.c.", "--like=/a", "(/a)", "base+/a", "file:///home/ada/z"]) == [
        "in a", "a/model.bin, b.c.", "--like=a", "(a)", "base+a", "file://~/z",
    ]  # fmt: skip


@pytest.fixture
def fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fine:
    home = tmp_path / "home-of-ada"
    monkeypatch.setenv("HOME", str(home))
    return plain_family(home / "private" / "models")


def texts(folder: Path) -> dict[str, bytes]:
    """All that is written but weights, the members of packs unpacked."""
    found = {name: data for name, data in tree(folder).items() if not name.endswith((".safetensors", ".mask"))}
    for name in [name for name in found if name.endswith(".pack")]:
        with zipfile.ZipFile(folder / name) as archive:
            found[name] = zstandard.ZstdDecompressor().decompress(archive.read("manifest.json"))
    return found


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_no_file_that_may_be_published_names_the_home(fine, where, tmp_path, monkeypatch, capsys) -> None:
    out = (fine.base.parents[1] if where == "inside" else tmp_path) / "made"
    save_bert(fine.base.parent / "bert", ["a"])
    merged = f"{out / 'base'}+{out / 'loras' / 'model-0'}"
    audited = [merged, *fine.models[1:], "--base", fine.base, "--weights-only"]
    commands = [
        ["recover", *fine.models, "--out", out / "base", "--adapters", out / "loras", "--mask", out / "m.mask"],
        ["extract", *fine.models, "--base", out / "base", "--out", out / "extracted"],
        ["extract", *fine.models, "--base", fine.base, "--out", out / "of-the-base"],
        ["audit", *audited, "--out", out / "audit"],
        ["audit", *fine.models, f"--html={out / 'page.html'}", "--weights-only"],
        ["audit", *fine.models, f"--sarif={out / 'audit.sarif'}", "--weights-only"],
        ["pack", *fine.models, "--base", fine.base, "--out", out / "models.pack"],
        ["family", *fine.models, fine.base, "--mermaid", out / "tree.mmd", "--bom", out / "bom.json"],
        ["defend", "bf16", fine.models[0], out / "release"],
        ["defend", "frozen-a", fine.base.parent / "bert", out / "start", "--rank", "4"],
    ]
    for words in commands:
        ran = run_command(monkeypatch, capsys, *words)
        assert ran.code == (words[0] == "audit"), ran.err
    written = texts(out)
    assert {name.partition("/")[0] for name in written} == {
        *(
            "base",
            "loras",
            "extracted",
            "of-the-base",
            "audit",
            "page.html",
            "audit.sarif",
            "models.pack",
            "tree.mmd",
            "bom.json",
            "release",
            "start",
        ),
    }
    for name, data in written.items():
        assert b"home-of-ada" not in data, name
        if where == "inside":
            assert str(tmp_path).encode() not in data, name
    # What a reader needs is still there.
    report = json.loads(written["base/detune.json"])
    expected = "../../models/model-0" if where == "inside" else "model-0"
    assert report["command"]["argv"][:2] == ["detune", "recover"]
    if where == "inside":
        assert report["inputs"][0]["spec"] == expected
    config = json.loads(written["loras/model-0/adapter_config.json"])
    assert config["base_model_name_or_path"] == "../../base"


def test_words_that_only_look_like_places_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    words = ["", "~", "~nobody-has-this-name/x", "+", "/", "--out", str(tmp_path / "loop"), "a\0b"]
    places = PrivatePaths(tmp_path, words)
    assert places.within(["--out", "a/b", 1, None, ""]) == ["--out", "a/b", 1, None, ""]
