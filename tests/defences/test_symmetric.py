import pytest
import torch

from detune.checkpoints import open_checkpoint
from detune.defences.invertible import Invertible
from detune.defences.permutation import Permutation
from detune.defences.rearrangement import Rearrangement
from detune.defences.rescaling import Rescaling
from detune.defences.rotation import Rotation
from detune.errors import InputError
from tests.families import same_bits, save_plain, stored
from tests.symmetries.models import KINDS, build, defended, load

DEFENCES = {
    "permutation": (Permutation(),),
    "rotation": (Rotation(),),
    "rescaling": (Rescaling(),),
    "rearrangement": (Rearrangement(),),
    "invertible": (Invertible(),),
    "rescaling by powers of two": (Rescaling(exact=True),),
    "all": (Permutation(), Rotation(), Rescaling()),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DEFENCES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-4)])
def test_outputs_stay(tmp_path, kind, name, dtype, tolerance):
    model = build(kind).to(dtype)
    model.save_pretrained(tmp_path / "model")
    before = KINDS[kind].ask(model)
    changed = load(model, defended(tmp_path / "model", tmp_path / "out", 3, *DEFENCES[name]))
    after = KINDS[kind].ask(changed)
    assert float((after - before).abs().max()) < tolerance * float(before.abs().max())


@pytest.mark.parametrize("name", DEFENCES)
def test_tensors_may_come_in_any_order(tmp_path, name):
    build("llama").save_pretrained(tmp_path)
    model = open_checkpoint(tmp_path)
    (defence, *_) = DEFENCES[name]
    forwards, backwards = defence.prepare(model, 1), defence.prepare(model, 1)
    there = {tensor: forwards(tensor, model.read(tensor)) for tensor in model.tensors}
    back = {tensor: backwards(tensor, model.read(tensor)) for tensor in reversed(model.tensors)}
    assert all(same_bits(there[tensor], back[tensor]) for tensor in there)


@pytest.mark.parametrize("name", DEFENCES)
def test_another_seed_gives_another_release(tmp_path, name):
    build("vit").save_pretrained(tmp_path / "model")
    one, other = (stored(defended(tmp_path / "model", tmp_path / str(i), i, *DEFENCES[name])) for i in (1, 2))
    assert sum(not same_bits(one[tensor], other[tensor]) for tensor in one) >= 12


def test_parts_can_be_left_alone(tmp_path):
    build("bert").save_pretrained(tmp_path / "model")
    plain = stored(tmp_path / "model")

    def changed(defence):
        release = stored(defended(tmp_path / "model", tmp_path / repr(defence), 0, defence))
        return {name.partition(".layer.0.")[2] for name in plain if not same_bits(plain[name], release[name])} - {""}

    assert changed(Permutation(heads=False)) == {
        "intermediate.dense.weight",
        "intermediate.dense.bias",
        "output.dense.weight",
    }
    assert "attention.output.dense.weight" not in changed(Rotation(values=False))
    assert "attention.self.key.weight" not in changed(Rotation(keys=False))
    assert not {name for name in changed(Invertible()) if not name.startswith("attention.")}
    assert {"intermediate.dense.weight", "attention.self.key.weight"} <= changed(Rearrangement())
    # After a sum no norm can be rescaled, and GELU takes no scale.
    assert not {name for name in changed(Rescaling()) if "LayerNorm" in name or "intermediate" in name}


class TestBadInput:
    @pytest.mark.parametrize("defence", [Rescaling, Rearrangement, Invertible])
    @pytest.mark.parametrize("spread", [1.0, 0.0, float("nan"), 1e9])
    def test_spread(self, tmp_path, defence, spread):
        build("bert").save_pretrained(tmp_path)
        with pytest.raises(InputError, match="expected more than 1 and at most 1024"):
            defence(spread=spread).prepare(open_checkpoint(tmp_path), 0)

    def test_an_architecture_that_is_not_known(self, tmp_path):
        save_plain(tmp_path / "model", {"layer.weight": torch.zeros(4, 4)})
        with pytest.raises(InputError, match="no symmetries are known of model_type None"):
            Permutation().prepare(open_checkpoint(tmp_path / "model"), 0)

    def test_integers(self, tmp_path):
        build("bert").save_pretrained(tmp_path)
        change = Rotation().prepare(open_checkpoint(tmp_path), 0)
        name = "encoder.layer.0.attention.self.query.weight"
        with pytest.raises(InputError, match=r"is stored as torch\.int8; expected floats; dequantise it first"):
            change(name, torch.zeros(64, 64, dtype=torch.int8))
