"""Files that keep a reader waiting, never end, or are not what their place says."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file

from detune.checkpoints import open_checkpoint, open_lora
from detune.errors import InputError
from detune.files import MAX_JSON_BYTES
from tests.checkpoints.loras import Mixed, train

NOT_REGULAR = "is no regular file; expected bytes on a disk; remove it from the model"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A base in one file, and a LoRA of it."""
    torch.manual_seed(0)
    save_file(Mixed().state_dict(), tmp_path / "base.safetensors")
    train(Mixed(), LoraConfig(r=3, lora_alpha=5, target_modules=["linear", "square"]), tmp_path / "adapter")
    return tmp_path / "adapter"


def open_edited(adapter: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    open_lora(adapter, open_checkpoint(adapter.parent / "base.safetensors"))


def test_a_pipe_for_a_configuration(adapter: Path) -> None:
    (adapter / "adapter_config.json").unlink()
    os.mkfifo(adapter / "adapter_config.json")
    with pytest.raises(InputError, match=f"adapter_config.json {NOT_REGULAR}"):
        open_lora(adapter, open_checkpoint(adapter.parent / "base.safetensors"))


def test_a_device_for_a_configuration(adapter: Path) -> None:
    (adapter / "adapter_config.json").unlink()
    (adapter / "adapter_config.json").symlink_to("/dev/zero")
    with pytest.raises(InputError, match=f"adapter_config.json {NOT_REGULAR}"):
        open_lora(adapter, open_checkpoint(adapter.parent / "base.safetensors"))


def test_a_configuration_without_end(adapter: Path) -> None:
    with (adapter / "adapter_config.json").open("wb") as file:
        file.truncate(100 * MAX_JSON_BYTES)
    with pytest.raises(InputError, match=rf"adapter_config.json is too large; expected at most {MAX_JSON_BYTES} bytes"):
        open_lora(adapter, open_checkpoint(adapter.parent / "base.safetensors"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(lora_alpha=10**400), "lora_alpha in .* is no number to multiply by; got inf"),
        (lambda c: c.update(lora_alpha=float("nan")), "lora_alpha in .* is no number to multiply by; got nan"),
        (lambda c: c.update(lora_alpha="8"), "has no lora_alpha; got '8'"),
        (lambda c: c.update(lora_alpha=True), "has no lora_alpha; got True"),
        (lambda c: c.update(alpha_pattern={"linear": [1]}), r"has no lora_alpha; got \[1\]"),
        (lambda c: c.update(alpha_pattern=[1]), "alpha_pattern of .* is malformed"),
        (lambda c: c.update(rank_pattern="x"), "rank_pattern of .* is malformed"),
        (lambda c: c.update(rank_pattern={"linear": {}}), r"has rank 3, expected \{\}"),
        (lambda c: c.update(rank_pattern={"(": 3}), r"the expression '\(' in rank_pattern of .* is damaged"),
        (lambda c: c.update(modules_to_save=7), "adapter .* is damaged; TypeError"),
        (lambda c: c.update(r=None), "has rank 3, expected None"),
    ],
)
def test_settings_of_the_wrong_kind(adapter: Path, change: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        open_edited(adapter, change)
    assert "\n" not in str(caught.value)


def test_an_alpha_that_is_no_number(tmp_path: Path) -> None:
    save_file({"x.weight": torch.ones(4, 4)}, tmp_path / "base.safetensors")
    factors = {"lora_unet_x.lora_down.weight": torch.ones(2, 4), "lora_unet_x.lora_up.weight": torch.ones(4, 2)}
    for alpha in (torch.tensor(1j), torch.tensor(float("inf")), torch.ones(2)):
        save_file(factors | {"lora_unet_x.alpha": alpha}, tmp_path / "lora.safetensors")
        with pytest.raises(InputError, match=r"is no number"):
            open_lora(tmp_path / "lora.safetensors", open_checkpoint(tmp_path / "base.safetensors"))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([2**70], "has the impossible shape .* expected at most 9223372036854775807 elements"),
        ([0, 2**70], "has the impossible shape"),
        ([2**40, 2**40, 0], "has the impossible shape"),
        ([1] * 100, "has 100 dimensions; expected at most 64"),
    ],
)
def test_shapes_that_no_tensor_has(
    tmp_path: Path, write_raw: Callable[..., Path], shape: list[int], message: str
) -> None:
    size = 0 if 0 in shape else 1
    table = {"w": {"dtype": "U8", "shape": shape, "data_offsets": [0, size]}}
    with pytest.raises(InputError, match=message):
        open_checkpoint(write_raw(tmp_path / "x.safetensors", table, bytes(size)))


@pytest.mark.parametrize("name", ["a\0b", "a\ud800", "w" * 2000])
def test_names_that_are_no_text(tmp_path: Path, write_raw: Callable[..., Path], name: str) -> None:
    table = {name: {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
    with pytest.raises(InputError, match=r"has a tensor whose name (is no text|has 2000 characters)"):
        open_checkpoint(write_raw(tmp_path / "x.safetensors", table, b"1"))


@pytest.mark.parametrize("metadata", [{"a": "\ud800"}, {"\ud800": "a"}, {"a": None}, [], 3])
def test_metadata_that_is_no_text(tmp_path: Path, write_raw: Callable[..., Path], metadata: Any) -> None:
    table = {"__metadata__": metadata, "w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
    path = write_raw(tmp_path / "x.safetensors", table, b"1")
    with pytest.raises(InputError, match="malformed __metadata__"):
        open_checkpoint(path)


@pytest.mark.parametrize("metadata", [[1], "x", 3])
def test_an_index_with_metadata_of_the_wrong_kind(tmp_path: Path, metadata: Any) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model-00001-of-00001.safetensors")
    index = {"metadata": metadata, "weight_map": {"w": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"index\.json has malformed metadata; expected a table"):
        open_checkpoint(tmp_path)


def test_a_pipe_for_a_model(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors is neither a file nor a directory; expected a model"):
        open_checkpoint(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"holds no weights"):
        open_checkpoint(tmp_path)


def test_a_path_that_no_system_takes() -> None:
    with pytest.raises(InputError, match=r"cannot read x+; File name too long"):
        open_checkpoint("x" * 300)


def test_a_directory_without_permission(bert_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(InputError, match=rf"cannot read {bert_dir}; Permission denied"):
        open_checkpoint(bert_dir)
