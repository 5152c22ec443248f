"""Parts of a model's tensors under other names."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from detune.checkpoints import CheckpointFiles, Excerpt, Part, View, open_checkpoint, raw

PARTS = {
    "head": Part("embed", 0, 7),
    "tail": Part("embed", 7, 10),
    "second": Part("experts", 1, 2, alone=True),
    "second.T": Part("experts", 1, 2, alone=True, turned=True),
    "embed.T": Part("embed", turned=True),
    "all": Part("experts"),
}


@pytest.fixture
def state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed": (10, 4), "experts": (3, 6, 4)}
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def path(tmp_path: Path, state: dict[str, Tensor]) -> Path:
    save_file(state, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def expected(state: dict[str, Tensor]) -> dict[str, Tensor]:
    embed, experts = state["embed"], state["experts"]
    parts = {"head": embed[:7], "tail": embed[7:], "second": experts[1], "second.T": experts[1].T}
    return parts | {"embed.T": embed.T, "all": experts}


def test_every_way_of_reading_gives_the_part(path, state):
    with open_checkpoint(path) as model:
        view = View(model, PARTS)
        for name, tensor in expected(state).items():
            content = tensor.contiguous().numpy().tobytes()
            assert (view.tensors[name].shape, view.tensors[name].nbytes) == (tuple(tensor.shape), len(content))
            assert torch.equal(view.read(name), tensor)
            assert torch.equal(view.read_rows(name, [slice(1, 3), slice(0, 1)]), tensor[[1, 2, 0]])
            assert bytes(view.read_bytes(name)) == content
            assert bytes(view.read_bytes(name, 5, 20)) == content[5:25]
            assert bytes(view.read_bytes(name, len(content) - 3, 20)) == content[-3:]
        assert raw(View(view, {"x": Part("head")})) is model


def test_excerpts_of_one_model_count_what_they_read_together(path):
    with open_checkpoint(path, rows=2) as excerpt:
        assert isinstance(excerpt, Excerpt)
        excerpt.read("embed")
        other = excerpt.over(View(excerpt.whole, PARTS))
        assert other.read("second").shape == (2, 4)
        assert excerpt.read_total_bytes == other.read_total_bytes == 2 * 2 * 4 * 4


def test_parts_are_written_in_their_places(path, state, tmp_path):
    parts = {"head": Part("embed", 0, 7), "tail": Part("embed", 7, 10)}
    parts |= {f"experts[{k}]": Part("experts", k, k + 1, alone=True) for k in range(3)}
    out = tmp_path / "out"
    out.mkdir()
    with open_checkpoint(path) as model:
        files = CheckpointFiles(model, out, torch.bfloat16, parts=parts)
        files.prepare()
        files.write("tail", state["embed"][7:].double())
        files.write("head", state["embed"][:7])
        for k in (2, 0, 1):
            files.write(f"experts[{k}]", state["experts"][k])
        with pytest.raises(ValueError, match=r"'head' has shape \(3, 4\), expected \(7, 4\)"):
            files.write("head", state["embed"][7:])
        assert files.stored_bytes(parts) == files.stored_bytes(["head"]) * 10 // 7 + 72 * 2
        files.finish({})
    written = load_file(out / "model.safetensors")
    assert all(torch.equal(written[name], tensor.bfloat16()) for name, tensor in state.items())


def test_parts_are_copied(path, state, tmp_path):
    parts = {"embed": Part("embed")} | {f"experts[{k}]": Part("experts", k, k + 1, alone=True) for k in range(3)}
    out = tmp_path / "out"
    out.mkdir()
    with open_checkpoint(path) as model:
        files = CheckpointFiles(model, out, parts=parts)
        files.prepare()
        for name in parts:
            files.copy(name)
        files.finish({})
    assert (out / "model.safetensors").read_bytes() == path.read_bytes()
