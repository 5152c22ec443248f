import pytest
import torch

from detune.defences.permutation import Permutation
from detune.defences.rescaling import Rescaling
from detune.defences.rotation import Rotation
from tests.symmetries.models import KINDS, build, defended, load

DEFENCES = {
    "permutation": (Permutation(),),
    "rotation": (Rotation(),),
    "rescaling": (Rescaling(),),
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
