import hashlib
import json
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from detune.errors import InputError
from detune.lineage import EdgeKind, Lineage, Node
from detune.lineage.bom import to_cyclonedx, weight_hashes
from tests.families import stored
from tests.lineage.trees import Descent

TREE = Lineage(
    (
        Node("ancestor-1", None, recover_from=("x/a", "x/b", "x/c")),
        Node("a", "x/a", "ancestor-1", EdgeKind.LORA, 8, why="their difference is rounded to its steps"),
        Node("b", "x/b", "a", EdgeKind.LIGHT, sure=False, why="too little tells which is older"),
        Node("c", "x/c", "a", EdgeKind.MERGE, other_parent="b", share=0.4),
    ),
    (),
    3,
    0.1,
)


def test_each_model_has_its_ancestors_for_a_pedigree():
    content = json.loads(to_cyclonedx(TREE, {"x/a": {"model.safetensors": "ab" * 32}}))
    models = {each["name"]: each for each in content["components"]}
    assert list(models) == ["a", "b", "c"]
    assert {each["type"] for each in models.values()} == {"machine-learning-model"}
    (parent,) = models["b"]["pedigree"]["ancestors"]
    assert (parent["name"], parent["pedigree"]["ancestors"][0]["name"]) == ("a", "ancestor-1")
    assert models["b"]["pedigree"]["notes"] == "light fine-tune"
    assert {each["name"] for each in models["c"]["pedigree"]["ancestors"]} == {"a", "b"}
    (file,) = models["a"]["components"]
    assert (file["name"], file["hashes"]) == ("model.safetensors", [{"alg": "SHA-256", "content": "ab" * 32}])
    assert {"name": "detune:sure", "value": "false"} in models["b"]["properties"]
    assert "x/a" not in json.dumps(content)


def test_it_fits_the_schema():
    text = to_cyclonedx(TREE, {})
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text.replace("SHA-256", "x", 1)) is None
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text.replace("machine-learning-model", "x")) is not None


def test_the_command_writes_it_with_hashes(command, tmp_path):
    models = Descent()
    for name in ("a", "b", "c"):
        models.lora(name, "base")
    specs = models.saved(tmp_path, "a", "b", "c")
    ran = command("family", *specs, "--bom", tmp_path / "bom.json")
    assert (ran.code, ran.err) == (0, "")
    content = json.loads((tmp_path / "bom.json").read_text())
    first = next(each for each in content["components"] if each["name"] == "a")
    expected = hashlib.sha256((tmp_path / "a" / "model.safetensors").read_bytes()).hexdigest()
    assert first["components"][0]["hashes"][0]["content"] == expected
    assert first["pedigree"]["ancestors"][0]["name"] == "ancestor-1"


def test_what_is_hashed_is_told_in_bytes(tmp_path):
    models = Descent()
    models.lora("a", "base")
    models.lora("b", "base")
    specs = models.saved(tmp_path, "a", "b")
    starts, done = [], []
    weight_hashes(specs, starts.append, lambda name, became: became and done.append(name))
    assert starts == [{spec: sum(tensor.nbytes for tensor in stored(Path(spec)).values()) for spec in specs}]
    assert done == specs


def test_hashes_need_the_files(tmp_path):
    with pytest.raises(InputError, match="gone"):
        weight_hashes([str(tmp_path / "gone")])
