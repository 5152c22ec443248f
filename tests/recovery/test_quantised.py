"""Models in fp8, int8 and GGUF: recovered to what their levels leave, and said to be."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import detune
from detune.certificate.verdict import Verdict
from detune.metrics import w_error
from tests.cases import normal, seeded
from tests.families import State, add, delta

NAMES = ("a.weight", "b.weight")
# The changes of a trained adapter beside the weights they change.
SHARE = 0.1


@pytest.fixture(scope="module")
def family() -> tuple[State, list[State]]:
    generator = seeded(3)
    base = {name: (0.05 * normal(generator, 192, 128)).float() for name in NAMES}
    base["norm.weight"] = torch.ones(128)
    changed = [{name: add(base[name], delta(generator, base[name], 3, SHARE)) for name in NAMES} for _ in range(3)]
    return base, [base | each for each in changed]


def fp8(state: State) -> State:
    stored = {"norm.weight": state["norm.weight"].bfloat16()}
    for name in NAMES:
        scale = state[name].abs().amax(dim=1, keepdim=True) / 448
        stored |= {name: (state[name] / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}
    return stored


def int8(state: State) -> State:
    stored = {"norm.weight": state["norm.weight"].bfloat16()}
    for name in NAMES:
        scale = state[name].abs().amax(dim=1, keepdim=True) / 127
        stored |= {name: (state[name] / scale).round().to(torch.int8), f"{name}_scale": scale}
    return stored


def save(path: Path, state: State) -> Path:
    save_file(state, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def save_gguf(path: Path, state: State, kind: gguf.GGMLQuantizationType) -> Path:
    writer = gguf.GGUFWriter(path.with_suffix(".gguf"), "other")
    for name, tensor in state.items():
        own = kind if tensor.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(tensor.numpy().astype(np.float32), own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.with_suffix(".gguf")


def dequantised(path: Path) -> dict[str, Tensor]:
    with detune.checkpoints.open_checkpoint(path) as model:
        return {name: model.read(name).double() for name in NAMES}


@pytest.mark.parametrize(
    ("store", "gain"),
    [
        (lambda path, state: save(path, fp8(state)), 0.5),
        (lambda path, state: save(path, int8(state)), 1.0),
        (lambda path, state: save_gguf(path, state, gguf.GGMLQuantizationType.Q8_0), 1.0),
    ],
    ids=["fp8", "int8", "Q8_0"],
)
def test_it_is_better_than_the_average_and_no_better_than_said(
    family, tmp_path, store: Callable[[Path, State], Path], gain
):
    base, models = family
    paths = [store(tmp_path / f"model-{i}", state) for i, state in enumerate(models)]
    report = detune.recover(paths, tmp_path / "out")
    written = load_file(next((tmp_path / "out").glob("*.safetensors")))
    values = [dequantised(path) for path in paths]
    for row in report.tensors:
        if row.name not in NAMES:
            assert row.verdict is Verdict.SHARED
            continue
        assert written[row.name].dtype is torch.bfloat16
        error = w_error(written[row.name], base[row.name])
        average = torch.stack([value[row.name] for value in values]).mean(dim=0)
        assert error < w_error(average, base[row.name]) - gain
        assert row.verdict is not Verdict.EXACT
        assert row.predicted_w_error == pytest.approx(error, abs=0.3)
    assert detune.check_family(paths).suffices


def test_deltas_below_the_levels_are_not_promised_to_be_undone(family, tmp_path):
    """Models that are rounded alike err alike: no average helps, and no residual shows it."""
    base, models = family
    paths = []
    for i, state in enumerate(models):
        small = {name: base[name] + 0.02 * (state[name] - base[name]) for name in NAMES}
        paths.append(save(tmp_path / f"model-{i}", fp8(state | small)))
    report = detune.recover(paths, tmp_path / "out")
    written = load_file(next((tmp_path / "out").glob("*.safetensors")))
    for row in report.tensors:
        if row.name in NAMES:
            assert row.verdict is Verdict.APPROXIMATE
            assert "rounded alike" in row.reason
            assert row.predicted_w_error == pytest.approx(w_error(written[row.name], base[row.name]), abs=0.3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_eight_bits_that_were_turned_back_are_noticed(family, tmp_path, dtype):
    base, models = family
    paths = []
    for i, state in enumerate(models):
        stored = save(tmp_path / f"int8-{i}", int8(state))
        values = {name: tensor.to(dtype) for name, tensor in dequantised(stored).items()}
        paths.append(save(tmp_path / f"model-{i}", values))
    report = detune.recover(paths, tmp_path / "out")
    written = load_file(next((tmp_path / "out").glob("*.safetensors")))
    for row in report.tensors:
        error = w_error(written[row.name], base[row.name])
        average = torch.stack([load_file(path)[row.name].double() for path in paths]).mean(dim=0)
        assert error < w_error(average, base[row.name]) - 1
        assert "quantised models, with noise of" in row.reason
        assert row.predicted_w_error == pytest.approx(error, abs=0.3)


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.BF16])
def test_plain_gguf_comes_out_as_safetensors_do(family, tmp_path, kind):
    _, models = family
    dtype = torch.float16 if kind.name == "F16" else torch.bfloat16
    ours = [save_gguf(tmp_path / f"g{i}", state, kind) for i, state in enumerate(models)]
    theirs = [
        save(tmp_path / f"s{i}", {name: t.to(dtype) if t.ndim > 1 else t for name, t in state.items()})
        for i, state in enumerate(models)
    ]
    for paths, out in ((ours, "a"), (theirs, "b")):
        detune.recover(paths, tmp_path / out)
    one, other = (load_file(next((tmp_path / out).glob("*.safetensors"))) for out in "ab")
    assert all(torch.equal(one[name], other[name]) and one[name].dtype is dtype for name in NAMES)
