"""Places that may not be read or written, or where a killed run left something: one line, and nothing is made."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree

import pytest
from safetensors.torch import save_file

import detune
from detune.checkpoints.disk import require_writable
from detune.checkpoints.staging import LOCK
from tests.cases import normal, seeded
from tests.command import run_command
from tests.families import plain_family, shard
from tests.permissions import bound_by_permissions

MODELS = ("models/model-0", "models/model-1")
OTHERS = (*MODELS, "models/model-2")
READING = {
    "recover": ("recover", *MODELS, "{bad}", "--out", "out"),
    "recover --dry-run": ("recover", *MODELS, "{bad}", "--out", "out", "--dry-run"),
    "extract": ("extract", "{bad}", "--base", "models/base", "--out", "out"),
    "extract --base": ("extract", *MODELS, "--base", "{bad}", "--out", "out"),
    "pack": ("pack", *MODELS, "{bad}", "--out", "out"),
    "inspect": ("inspect", *MODELS, "{bad}"),
    "family": ("family", *MODELS, "{bad}"),
    "compare": ("compare", "models/base", "{bad}"),
    "audit": ("audit", *MODELS, "{bad}", "--base", "models/base", "--out", "out"),
    "defend": ("defend", "bf16", "{bad}", "out"),
    "push --dry-run": ("push", "{bad}", "org/base", "--dry-run"),
}
WRITING = {
    "recover": ("recover", *OTHERS, "--out", "{place}"),
    "recover --adapters": ("recover", *OTHERS, "--out", "out", "--adapters", "{place}"),
    "recover --mask": ("recover", *OTHERS, "--out", "out", "--mask", "{place}"),
    "recover --dry-run": ("recover", *OTHERS, "--out", "out", "--dry-run", "--adapters", "{place}"),
    "extract": ("extract", *MODELS, "--base", "models/base", "--out", "{place}"),
    "pack": ("pack", *OTHERS, "--out", "{place}"),
    "unpack": ("unpack", "pack", "--out", "{place}"),
    "audit": ("audit", *OTHERS, "--out", "{place}"),
    "audit --sarif": ("audit", *OTHERS, "--sarif", "{place}"),
    "family --bom": ("family", *OTHERS, "--bom", "{place}"),
    "defend": ("defend", "bf16", "models/model-2", "{place}"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three models and their base, one model in shards, and a LoRA."""
    folder = tmp_path_factory.mktemp("permissions")
    fine = plain_family(folder / "models")
    shard(fine.models[2])
    lora = folder / "lora"
    lora.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["0"]}
    (lora / "adapter_config.json").write_text(json.dumps(config))
    generator = seeded(5)
    factors = {"A": normal(generator, 2, 64).float(), "B": normal(generator, 80, 2).float()}
    save_file(
        {f"base_model.model.layer.0.lora_{name}.weight": factor for name, factor in factors.items()},
        lora / "adapter_model.safetensors",
    )
    detune.pack(fine.specs, folder / "pack")
    return folder


@contextmanager
def closed(path: Path, mode: int) -> Iterator[None]:
    before = path.stat().st_mode
    path.chmod(mode)
    try:
        with bound_by_permissions():
            yield
    finally:
        path.chmod(before)


@pytest.mark.parametrize("command", READING)
@pytest.mark.parametrize(
    ("bad", "path"),
    [
        ("models/model-2", "models/model-2"),
        ("models/model-2", "models/model-2/model-00002-of-00002.safetensors"),
        ("models/model-2", "models/model-2/model.safetensors.index.json"),
        ("models/base+lora", "lora"),
        ("models/base+lora", "lora/adapter_config.json"),
    ],
    ids=["directory", "shard", "index", "adapter", "adapter's configuration"],
)
def test_what_may_not_be_read_is_named(folder, monkeypatch, capsys, command, bad, path) -> None:
    if "+" in bad and command == "push --dry-run":
        bad = path = "models/base"
    monkeypatch.chdir(folder)
    before = sorted(path.name for path in folder.iterdir())
    with closed(folder / path, 0):
        ran = run_command(monkeypatch, capsys, *(word.format(bad=bad) for word in READING[command]))
    assert ran.code == 2
    assert ran.err.startswith("detune: error: ")
    assert ran.err.endswith(f"cannot read {path}; Permission denied; change its permissions, or ask its owner\n")
    assert (ran.out, ran.err.count("\n")) == ("", 1)
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize("command", WRITING)
@pytest.mark.parametrize("mode", [0o555, 0], ids=["read-only", "closed"])
def test_a_place_that_may_not_be_written_is_named_before_anything_is_made(
    folder, monkeypatch, capsys, command, mode
) -> None:
    monkeypatch.chdir(folder)
    home = folder / "home"
    home.mkdir(exist_ok=True)
    before = sorted(path.name for path in folder.iterdir())
    with closed(home, mode):
        ran = run_command(monkeypatch, capsys, *(word.format(place="home/out") for word in WRITING[command]))
    assert ran.code == 2
    assert ran.err.count("\n") == 1
    assert str(home) in ran.err
    assert "permissions" in ran.err
    assert sorted(path.name for path in folder.iterdir()) == before
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("command", [command for command in WRITING if command not in ("recover", "recover --dry-run")])
def test_a_command_that_finds_its_output_done_cleans_up_after_the_run_that_was_killed_there(
    folder, monkeypatch, capsys, command
) -> None:
    monkeypatch.chdir(folder)
    home = folder / "done"
    home.mkdir()
    (home / "out").write_text("")
    left = home / ".out.partial-0123456789abcdef"
    left.mkdir()
    (left / LOCK).touch()
    ran = run_command(monkeypatch, capsys, *(word.format(place="done/out") for word in WRITING[command]))
    assert ran.code == 2
    assert "exists" in ran.err
    assert [path.name for path in home.iterdir()] == ["out"]
    rmtree(home)


@pytest.mark.parametrize("command", ["inspect", "family", "compare"])
def test_commands_that_need_no_configuration_do_not_ask_for_it(folder, monkeypatch, capsys, command) -> None:
    monkeypatch.chdir(folder)
    with closed(folder / "models/model-2/config.json", 0):
        ran = run_command(monkeypatch, capsys, *(word.format(bad="models/model-2") for word in READING[command]))
    assert (ran.code, ran.err) == (0, "")


def test_a_place_in_a_file_is_none(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Exception, match=r"cannot write .*/file/out; .*/file is no directory; choose another place"):
        require_writable(tmp_path / "file" / "out")
