"""Names of tensors as an attacker would choose them: nothing is written but what was asked for."""

import json
from pathlib import Path

import pytest

import detune
from tests.families import Fine, State, edit, plain_family, shard, tree

NAMES = [
    "../../elsewhere/x.weight",
    "../elsewhere/x.weight",
    "{root}/elsewhere/x.weight",
    "//x.weight",
    "./x.weight",
    "unet/../../elsewhere/x.weight",
    "elsewhere/x.weight",
    "x\x1b]0;owned\x07/y.weight",
]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A directory with something beside it that must stay as it is."""
    (tmp_path / "elsewhere").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.data"):
        (tmp_path / "elsewhere" / name).write_text("mine")
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def hostile_family(folder: Path, name: str) -> Fine:
    fine = plain_family(folder)

    def rename(state: State) -> None:
        state[name] = state.pop("layer.0.weight")

    for model in (fine.base, *fine.models):
        edit(model, rename)
    return fine


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sharded", [False, True])
def test_adapters_stay_in_their_directory(work: Path, name: str, sharded: bool) -> None:
    fine = hostile_family(work / "models", name.format(root=work.parent))
    if sharded:
        for model in (fine.base, *fine.models):
            shard(model)
    before = tree(work.parent)
    detune.recover(fine.specs, work / "base", adapters=work / "adapters")
    detune.extract(fine.specs, work / "loras", base=fine.base)
    after = tree(work.parent)
    made = [path for path in after if path not in before]
    assert {path: after[path] for path in before} == before
    assert all(path.startswith(("work/base/", "work/adapters/", "work/loras/")) for path in made)
    # One adapter a model, with its files and no directories of its own.
    for out in ("adapters", "loras"):
        expected = {"adapter_config.json", "adapter_model.safetensors"}
        cards = {"README.md", *(f"model-{i}/README.md" for i in range(3))}
        files = {f"model-{i}/{file}" for i in range(3) for file in expected}
        assert set(tree(work / out)) == {"detune.json"} | cards | files


@pytest.mark.parametrize("component", ["README.md", "detune.json"])
def test_components_are_no_files_that_are_written(work: Path, component: str) -> None:
    fine = plain_family(work / "models")
    for model in fine.models:
        (model / "model_index.json").write_text(json.dumps({component: ["library", "Class"]}))
        (model / component).mkdir()
        (model / "model.safetensors").rename(model / component / "model.safetensors")
    with pytest.raises(
        detune.InputError, match=r"names a file as a component; got '(README\.md|detune\.json)'; do not"
    ):
        detune.recover(fine.specs, work / "base")


@pytest.mark.parametrize("component", ["../elsewhere", "/elsewhere", "a/../../elsewhere", "a\nb", ".."])
def test_components_are_plain_names(work: Path, component: str) -> None:
    fine = plain_family(work / "models")
    for model in fine.models:
        (model / "model_index.json").write_text(json.dumps({component: ["library", "Class"]}))
    before = tree(work.parent)
    with pytest.raises(detune.InputError, match=r"names a component outside itself; got .*; do not trust"):
        detune.recover(fine.specs, work / "base", adapters=work / "adapters")
    assert tree(work.parent) == before
