"""What an audit says of the releases' adapters."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from detune.audit import AuditReport, audit
from detune.errors import InputError
from tests.cases import normal, seeded
from tests.families import Fine, save_plain

SIZES = (10, 100, 1000)


def about(report: AuditReport, rule: str):
    return [result for result in report.results if result.rule_id == rule]


@pytest.fixture
def trained(fine: Fine, tmp_path: Path) -> Path:
    """Adapters of three groups, whose changes shrink with the size of the training set, and their table.

    Those of 100 examples are as large as the releases' own.
    """
    base, model = (load_file(path / "model.safetensors") for path in (fine.base, fine.models[0]))
    generator, lines = seeded(3), ["adapter,examples,group"]
    for group in ("red", "green", "blue"):
        for size in SIZES:
            state = {}
            for name in (name for name in base if "layer" in name and base[name].ndim == 2):
                values = torch.linalg.svdvals(model[name].double() - base[name].double())[:2]
                U, V = (torch.linalg.qr(normal(generator, side, 2))[0] for side in base[name].shape)
                module = name.removesuffix(".weight")
                state[f"base_model.model.{module}.lora_A.weight"] = V.mT.contiguous().float()
                factor = 100 / size * (1 + 0.01 * float(normal(generator)))
                state[f"base_model.model.{module}.lora_B.weight"] = (factor * U * values).float().contiguous()
            folder = save_plain(tmp_path / f"{group}-{size}", state)
            (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
            (folder / "config.json").rename(folder / "adapter_config.json")
            (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
            lines.append(f"{group}-{size},{size},{group}")
    file = tmp_path / "trained.csv"
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.mark.parametrize("which", ["report", "blind"])
def test_layers_and_ranks_are_told_of_each_release(fine, which, request):
    found = about(request.getfixturevalue(which), "adapters")
    assert len(found) == 4
    for result, model in zip(found, fine.models, strict=True):
        assert (result.level, result.properties["release"]) == ("note", str(model))
        assert (result.properties["matrices"], result.properties["ranks"]) == (4, [2])
        assert f"{model}: a LoRA of rank 2 on 4 matrices: " in result.message


def test_nothing_is_told_of_what_is_not_given_away(fine):
    assert not about(audit(fine.models[:2], weights_only=True), "adapters")


@pytest.mark.parametrize("with_base", [True, False])
def test_the_size_of_the_training_set_is_estimated(fine, trained, with_base):
    report = audit(fine.models, fine.base if with_base else None, weights_only=True, trained=trained)
    found = about(report, "dataset-size")
    assert len(found) == 4
    own = found[0].properties
    assert (own["examples"], own["layers"], own["votes"]) == (100, 4, 1.0)
    assert own["low"] == own["high"] == pytest.approx(100)
    assert "trained on about 100 examples, between 100 and 100 in nine cases of ten; 100% of 4 layers agree" in (
        found[0].message
    )


def test_the_command_prints_it(command, fine, trained):
    ran = command("audit", *fine.models, "--base", fine.base, "--weights-only", "--trained", trained)
    assert "a LoRA of rank 2 on 4 matrices" in ran.out
    assert "trained on about 100 examples" in ran.out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is no table of adapters; found nothing, expected adapter, examples, group"),
        ("adapter,size\na,1\n", "is no table of adapters; found adapter, size, expected adapter, examples, group"),
        ("adapter,examples,group\na,many,x\n", r"does not say what 'a' was trained on; got 'many' examples"),
        ("adapter,examples,group\na,0,x\n", r"got '0' examples, expected a number from 1 on"),
        ("adapter,examples,group\nnowhere,5,x\n", "nowhere"),
        (b"\xff\xfe", "trained.csv"),
    ],
)
def test_bad_tables(fine, tmp_path, content, message):
    file = tmp_path / "trained.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        audit(fine.models, fine.base, weights_only=True, trained=file)


def test_too_few_groups(fine, trained):
    text = trained.read_text()
    trained.write_text("\n".join(line for line in text.splitlines() if "blue" not in line) + "\n")
    with pytest.raises(InputError, match="references of 2 groups"):
        audit(fine.models, fine.base, weights_only=True, trained=trained)


def test_no_such_table(fine, tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*nothing.csv; No such file"):
        audit(fine.models, fine.base, weights_only=True, trained=tmp_path / "nothing.csv")
