"""A base's own bits, from checkpoints: the file that comes out is the file that went in."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import detune
from detune.certificate.verdict import Verdict
from tests.cases import normal, seeded
from tests.families import save_plain, stored

SCALE = 0.02
STEP = 2.0**-13  # of the bf16 grid at SCALE
LAYERS = ("layers.0.weight", "layers.1.weight")


def base_state():
    generator = seeded(21)
    layers = {name: (SCALE * normal(generator, 192, 160)).bfloat16() for name in LAYERS}
    return (
        layers
        | {"embed_tokens.weight": (SCALE * normal(generator, 64, 160)).bfloat16()}
        | {"norm.weight": torch.ones(160).bfloat16()}
    )


def fine_tunes(folder: Path, n: int, steps: float, dtype: torch.dtype, rank: int = 3) -> list[Path]:
    """Merges of LoRAs whose root mean square is given in steps of the base's grid, in `dtype` throughout."""
    generator = seeded(22)
    models = []
    for i in range(n):
        state = {name: tensor.to(dtype) for name, tensor in base_state().items()}
        for name in LAYERS:
            delta = normal(generator, 192, rank) @ normal(generator, rank, 160) * steps * STEP / rank**0.5
            state[name] = (base_state()[name].double() + delta).to(dtype)
        models.append(save_plain(folder / f"model-{i}", state))
    return models


def digest(path: Path) -> str:
    return hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("n", "steps", "method"), [(3, 20.0, "auto"), (2, 0.4, "lattice"), (1, 0.2, "lattice")], ids=["three", "two", "one"]
)
def test_the_file_hashes_to_the_bases(tmp_path, n, steps, method):
    base = save_plain(tmp_path / "base", base_state())
    models = fine_tunes(tmp_path, n, steps, torch.float32)
    report = detune.recover(models, tmp_path / "out", method, dtype=torch.bfloat16)
    if n > 1:
        assert digest(tmp_path / "out") == digest(base)
    rows = {row.name: row for row in report.tensors}
    found, truth = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", base))
    for name in LAYERS:
        # One model alone can lock a row onto wrong points, and the smallest weights need not be certain to be right.
        assert float((found[name] == truth[name]).float().mean()) > 0.99
        assert rows[name].grid == "bfloat16"
        assert rows[name].certain > 0.95 or (n == 1 and rows[name].certain == 0)
        assert rows[name].log10_false_positive < -9
    # Where a row is locked the fit leaves more than rounding, and nothing is certain.
    assert any(rows[name].certain > 0.95 for name in LAYERS)


def test_without_a_dtype_the_bits_are_the_bases_in_the_models_dtype(tmp_path):
    models = fine_tunes(tmp_path, 3, 20.0, torch.float32)
    detune.recover(models, tmp_path / "out")
    for name, tensor in stored(tmp_path / "out").items():
        assert tensor.dtype is torch.float32
        assert tensor.equal(base_state()[name].float())


def test_the_table_says_what_is_certain(tmp_path, command):
    ran = command("recover", *fine_tunes(tmp_path, 4, 4.0, torch.bfloat16), "--out", tmp_path / "out")
    report = json.loads((tmp_path / "out" / "detune.json").read_text())
    least = min(row["certain"] for row in report["tensors"] if row["name"] in LAYERS)
    assert "certain bits" in ran.out
    shown = min(map(float, re.findall(r"([0-9.]+) % bfloat16 *$", ran.out, re.MULTILINE)))
    assert 0 <= 100 * least - shown < 0.01


def test_a_mask_marks_what_is_certain(tmp_path):
    models = fine_tunes(tmp_path, 4, 4.0, torch.bfloat16)
    report = detune.recover(models, tmp_path / "out", mask=tmp_path / "certain.npz")
    found = load_file(tmp_path / "out" / "model.safetensors")
    with np.load(tmp_path / "certain.npz") as masks:
        assert sorted(masks) == list(LAYERS)
        for name in LAYERS:
            certain, right = torch.from_numpy(masks[name]), found[name] == base_state()[name]
            assert certain.shape == right.shape
            assert not bool((certain & ~right).any())
            row = next(row for row in report.tensors if row.name == name)
            assert row.certain == pytest.approx(float(certain.double().mean()))
            assert 0.5 < row.certain < 1.0


def test_a_mask_never_overwrites(tmp_path):
    models = fine_tunes(tmp_path, 3, 20.0, torch.float32)
    (tmp_path / "certain.npz").write_text("mine")
    with pytest.raises(detune.OutputError, match=r"certain.npz exists; expected a new file; choose another"):
        detune.recover(models, tmp_path / "out", mask=tmp_path / "certain.npz")
    assert (tmp_path / "certain.npz").read_text() == "mine"
    assert not (tmp_path / "out").exists()


def test_a_dtype_that_would_round_what_is_copied_is_refused(tmp_path):
    models = fine_tunes(tmp_path, 3, 20.0, torch.float32)
    with pytest.raises(
        detune.InputError, match=r"tensor 'embed_tokens.weight' would be rounded; .*float16; leave out --dtype"
    ):
        detune.recover(models, tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("n", [1, 2])
def test_too_large_deltas_of_too_few_models_are_refused(tmp_path, n):
    models = fine_tunes(tmp_path, n, 30.0, torch.float32)
    with pytest.raises(detune.InputError, match=rf"{n} models? shows? no delta against a grid.*add models"):
        detune.recover(models, tmp_path / "out", "lattice")
    assert not (tmp_path / "out").exists()


def test_one_rounded_merge_is_not_taken_for_the_base(tmp_path):
    """In float32 files, merged in bf16: every entry lies on the grid, and nothing says where the base was."""
    rounded = fine_tunes(tmp_path / "bf16", 1, 4.0, torch.bfloat16)[0]
    model = save_plain(tmp_path / "model", {name: tensor.float() for name, tensor in stored(rounded).items()})
    with pytest.raises(detune.InputError, match=r"1 model shows no delta against a grid of the base"):
        detune.recover([model], tmp_path / "out", "lattice")


def test_a_base_off_the_grid_has_no_bits(tmp_path):
    generator = seeded(23)
    W = {name: SCALE * normal(generator, 192, 160) for name in LAYERS}
    models = []
    for i in range(4):
        state = {
            name: (W[name] + 4 * STEP * normal(generator, 192, 2) @ normal(generator, 2, 160)).bfloat16() for name in W
        }
        models.append(save_plain(tmp_path / f"model-{i}", state))
    report = detune.recover(models, tmp_path / "out")
    assert all(row.grid is None and row.certain is None for row in report.tensors)
    assert all(row.verdict is not Verdict.EXACT for row in report.tensors)
