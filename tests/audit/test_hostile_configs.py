"""Configurations that no library takes, that stall it or that eat all memory: the audit keeps what it has found."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM

import detune
from detune.audit import audit, behaviour, model_process
from detune.audit.behaviour import Judge
from detune.audit.record import AuditReport, Behaviour
from detune.checkpoints import open_checkpoint
from detune.defences.running import load_model
from detune.errors import InputError
from tests.bench.tiny_models import save_bert
from tests.families import Fine, fine_tune

# The other process, once it has read the request.
ANSWERING = """
import sys, torch
from detune.audit import model_process
def compare(request): {}
model_process._compare = compare
model_process.main()
"""
CONFIGS: dict[str, Any] = {
    "attention of another package": {"_attn_implementation": "flash_attention_2", "attn_implementation": "sage"},
    "a quantiser that is not there": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
    "an unknown activation": {"hidden_act": "magic"},
    "no heads": {"num_attention_heads": 0},
    "negative heads": {"num_attention_heads": -2},
    "heads that do not divide": {"num_attention_heads": 3},
    "a bad padding index": {"pad_token_id": 10**6},
    "a width that is text": {"hidden_size": "wide"},
    "a width beyond int64": {"hidden_size": 2**70},
    "no layers": {"num_hidden_layers": 0},
    "fewer layers than none": {"num_hidden_layers": -1},
    "10^5 layers": {"num_hidden_layers": 10**5},
    "10^9 labels": {"num_labels": 10**9},
    "10^9 positions": {"max_position_embeddings": 10**9},
    "layers for ever": {"num_hidden_layers": float("inf")},
    "an epsilon that is text": {"layer_norm_eps": "small"},
    "a type that is a list": {"model_type": ["bert"]},
    "an unknown type": {"model_type": "magic"},
    "classes in a table": {"architectures": {"a": "b"}},
    "an unknown dtype": {"dtype": "float7", "torch_dtype": "float7"},
    "code of its own": {
        "auto_map": {"AutoModel": "modeling_x.X", "AutoConfig": "configuration_x.X"},
        "model_type": "x",
    },
}


@pytest.fixture(scope="module")
def fine(tmp_path_factory: pytest.TempPathFactory) -> Fine:
    folder = tmp_path_factory.mktemp("hostile")
    save_bert(folder / "origin", ["whales", "breathe", "air"])
    model = AutoModelForMaskedLM.from_pretrained(folder / "origin", dtype="auto")
    fine = fine_tune(model, ["query.weight"], folder, n=3)
    for model_dir in (fine.base, *fine.models):
        for file in (folder / "origin").glob("*token*"):
            (model_dir / file.name).write_bytes(file.read_bytes())
    return fine


@pytest.fixture
def configure(fine: Fine) -> Any:
    """Change the configuration of all of the family, until the test is over."""
    before = {path: path.read_bytes() for model in (fine.base, *fine.models) for path in [model / "config.json"]}

    def change(changes: Any) -> None:
        for path, content in before.items():
            path.write_text(json.dumps(json.loads(content) | changes) if isinstance(changes, dict) else changes)

    yield change
    for path, content in before.items():
        path.write_bytes(content)


def judge(fine: Fine) -> Behaviour:
    """What an audit says of the outputs, the base standing in for the recovered model."""
    with open_checkpoint(fine.models[0]) as release, open_checkpoint(fine.base) as base:
        judge = Judge(release, base, None)
        return judge.judge(fine.base) if judge.is_ready else Behaviour(note=judge.note)


def test_a_sound_configuration_is_run(fine: Fine, here: None) -> None:
    found = judge(fine)
    assert (found.metric, found.note) == ("activation", "")
    assert found.recovered == 0 < found.release


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_what_no_library_takes_is_a_sentence(
    fine: Fine, here: None, configure: Callable[[Any], None], changes: dict[str, Any]
) -> None:
    configure(changes)
    found = judge(fine)
    assert found.metric is None
    assert re.fullmatch(r"not run: [^\n]{12,}", found.note)


@pytest.mark.parametrize(
    "changes",
    [
        {"quantization_config": {"quant_method": "magic"}},
        {"architectures": ["Magic"]},
        {"architectures": [3]},
        {"architectures": ["AutoTokenizer"]},
    ],
    ids=str,
)
def test_what_the_library_passes_over_is_run(
    fine: Fine, here: None, configure: Callable[[Any], None], changes: dict[str, Any]
) -> None:
    configure(changes)
    assert judge(fine).metric == "activation"


@pytest.mark.parametrize("text", ["[]", "3", "{", "null", '{"architectures": [' + "[" * 2000, "\x00"])
def test_what_is_no_configuration_is_a_sentence(
    fine: Fine, here: None, configure: Callable[[Any], None], text: str
) -> None:
    configure(text)
    assert judge(fine).note.startswith("not run: ")


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_what_a_defence_cannot_run_is_one_line(
    fine: Fine, configure: Callable[[Any], None], changes: dict[str, Any]
) -> None:
    configure(changes)
    try:
        model = load_model(fine.base, torch.float32)
    except InputError as error:
        assert re.fullmatch(r"[^\n]+; [^\n]+; [^\n]+", str(error))  # noqa: PT017  # some are loaded
    else:
        assert model.config.hidden_size == 16


class TestTheProcess:
    """The other process itself: started, answered, and what becomes of it."""

    def test_it_answers(self, fine: Fine) -> None:
        assert judge(fine).metric == "activation"

    @pytest.mark.parametrize(
        ("code", "note"),
        [
            (
                ANSWERING.format("model_process._limit_memory(2**28); torch.ones(2**28)"),
                "not run: RuntimeError: .*memory",
            ),
            (ANSWERING.format("sys.exit('gone')"), "not run: the process that ran the models failed; gone"),
            # Whatever it was at when it ended.
            ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", r"was killed \(signal 9\)"),
            ("import time; time.sleep(600)", "the models were still running after 1 s"),
        ],
    )
    def test_whatever_becomes_of_it(
        self, fine: Fine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, note: str
    ) -> None:
        run = behaviour.subprocess.run
        monkeypatch.setattr(
            behaviour.subprocess,
            "run",
            lambda command, **options: run([command[0], "-c", code], **options),
        )
        monkeypatch.setattr(behaviour, "SECONDS", 1.0 if "sleep" in code else 120.0)
        with open_checkpoint(fine.models[0]) as release:
            found = Judge(release, None, None).judge(tmp_path / "recovered")
        assert found.metric is None
        assert re.search(note, found.note), found.note

    def test_an_error_that_nobody_foresees_is_its_answer(
        self, fine: Fine, here: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any) -> Behaviour:
            raise RecursionError("too deep")

        monkeypatch.setattr(model_process, "_compare", fail)
        assert judge(fine).note == "not run: RecursionError: too deep"


def test_the_report_is_not_lost(fine: Fine, here: None, configure: Callable[[Any], None]) -> None:
    configure({"hidden_act": "magic"})
    report: AuditReport = audit(fine.models, fine.base)
    assert report.verdict.one_too_many == 3
    assert report.behaviour.metric is None
    assert report.behaviour.note.startswith("not run: ")


@pytest.mark.parametrize("changes", [CONFIGS["10^5 layers"], CONFIGS["10^9 labels"], CONFIGS["no heads"]])
def test_adapters_of_a_model_that_no_library_takes(
    fine: Fine, configure: Callable[[Any], None], tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Names and shapes have to tell, as they do for models that transformers does not know."""
    configure(changes)
    detune.recover(fine.specs, tmp_path / "base", adapters=tmp_path / "adapters")
    assert (tmp_path / "adapters" / "model-0" / "adapter_config.json").is_file()
