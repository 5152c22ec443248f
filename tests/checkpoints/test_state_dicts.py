"""Weights beside all that a training run saves, and files of the time before torch wrote zips."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detune.checkpoints import open_checkpoint
from detune.errors import InputError


@pytest.fixture
def state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 3, generator=generator)
    return {"net.a.weight": weight, "net.b.weight": weight.half().T, "net.steps": torch.tensor(3)}


def assert_read(path: Path, state: dict[str, Tensor]) -> None:
    with open_checkpoint(path) as model:
        assert set(model.tensors) == set(state)
        for name, tensor in state.items():
            assert torch.equal(model.read(name), tensor)
            assert model.read(name).dtype is tensor.dtype


def lightning(state: dict[str, Tensor]) -> dict[str, Any]:
    """What `Trainer.save_checkpoint` writes, after a step of AdamW."""
    layer = nn.Linear(3, 4)
    layer(torch.ones(3)).sum().backward()
    optimizer = torch.optim.AdamW(layer.parameters())
    optimizer.step()
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer)
    return {
        "epoch": 1,
        "global_step": 20,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 2}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_path": "", "best_k_models": {}}},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{key: value for key, value in schedule.state_dict().items() if key != "_last_lr"}],
        "hyper_parameters": {"lr": 1e-3, "sizes": [3, 4]},
    }


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state},
        lightning,
        lambda state: {"model": state, "ema": state, "optimizer": {"state": {0: state}}, "args": {"lr": 1.0}},
        lambda state: {"epoch": 3, "checkpoint": {"model": state}},
        lambda state: {"whatever": state, "seeds": [1, 2]},
    ],
)
def test_the_weights_are_found(tmp_path, state, wrap, legacy):
    path = tmp_path / "model.ckpt"
    torch.save(wrap(state), path, _use_new_zipfile_serialization=not legacy)
    assert_read(path, state)


def test_several_tables_are_not_chosen_between(tmp_path, state):
    torch.save({"encoder": state, "decoder": state}, tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"holds 2 tables of tensors; they are 'encoder', 'decoder'; save the model's"):
        open_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize("legacy", [False, True])
def test_what_is_no_plain_data_is_refused(tmp_path, state, legacy):
    path = tmp_path / "model.ckpt"
    saved = {"state_dict": state, "hyper_parameters": argparse.Namespace(lr=1.0)}
    torch.save(saved, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InputError, match=r"other than plain data, and detune never runs code.*argparse\.Namespace"):
        open_checkpoint(path)


def test_the_weights_come_out_as_safetensors(tmp_path, state):
    from detune.checkpoints import CheckpointWriter

    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    with open_checkpoint(tmp_path / "model.ckpt") as model, CheckpointWriter(model, tmp_path / "out") as writer:
        for name in model.tensors:
            writer.copy(name)
    assert_read(tmp_path / "out" / "model.safetensors", state)


@pytest.mark.parametrize("length", [10, 200, -5])
def test_a_legacy_file_that_is_cut_short_is_refused(tmp_path, state, length):
    path = tmp_path / "model.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError, match=r"model\.pth is damaged"):
        open_checkpoint(path)


def test_a_pickle_of_another_program_is_refused(tmp_path):
    import pickle

    (tmp_path / "model.pth").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(InputError, match=r"damaged, or was not saved by torch"):
        open_checkpoint(tmp_path / "model.pth")
