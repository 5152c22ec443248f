"""One table says which files hold weights."""

from collections import Counter

import pytest
import torch
from safetensors.torch import save_file

from detune.checkpoints import identity, open_checkpoint
from detune.checkpoints.formats import FORMATS, SAFETENSORS, WEIGHT_SUFFIXES, format_of, safetensors_name


def test_a_suffix_belongs_to_one_format():
    assert set(Counter(WEIGHT_SUFFIXES).values()) == {1}
    assert all(format_of(f"a/model{suffix}") is form for form in FORMATS for suffix in form.suffixes)
    assert format_of("model.onnx") is None


@pytest.mark.parametrize("suffix", WEIGHT_SUFFIXES)
def test_any_weight_file_is_named_as_safetensors(suffix):
    assert safetensors_name(f"unet/pytorch_model{suffix}").endswith("model.safetensors")
    assert format_of(safetensors_name(f"one{suffix}")) is SAFETENSORS


@pytest.mark.parametrize("suffix", WEIGHT_SUFFIXES)
def test_a_weight_file_of_any_format_is_part_of_what_a_model_is(suffix, tmp_path):
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as model:
        before = identity(model)
        (tmp_path / f"other{suffix}").write_bytes(b"1")
        assert identity(model) != before
